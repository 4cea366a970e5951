"""Run ONNX files with ONNX Runtime on the CPU."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F

from ffnet.evaluation.compilation import image_by_image
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.onnx.validation import check_onnx
from ffnet.system.errors import UserError
from ffnet.system.text import runtime_reason


class OnnxBackend:
    """An ONNX file as a backend. It uses as many threads as torch, and resizes images to the size of the file."""

    def __init__(self, path: Path | str, input_format: InputFormat = NORMALIZED_RGB) -> None:
        self.path = Path(path)
        self.input_format = input_format
        self.header = check_onnx(path)
        self.session = open_session(path)
        self.buffer = torch.empty(0)  # for all inputs: a new one for each takes a tenth of the backend's time

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return logits (N, 19, h, w) float32 of normalized images (N, 3, H, W) float32, on the CPU."""
        images = resize(self.input_format.convert(images.cpu()), self.header.input_shape[2:])
        return image_by_image(self._run)(images) if self.header.input_shape[0] == 1 else self._run(images)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        if self.buffer.shape != images.shape:
            self.buffer = torch.empty(images.shape)
        feed = {self.header.input_name: self.header.encode(self.buffer.copy_(images).numpy())}
        (logits,) = run_session(self.session, [self.header.output_name], feed, self.path)
        return torch.from_numpy(self.header.decode(logits))

    def with_input(self, input_format: InputFormat) -> "OnnxBackend":
        """Return the same backend, in the same session, for another input."""
        backend = copy.copy(self)
        backend.input_format = input_format
        return backend


def resize(images: torch.Tensor, size: Sequence[int | None]) -> torch.Tensor:
    """Return images (N, 3, H, W) resized bilinearly to (height, width); None keeps that side as it is."""
    new_size = [wanted or length for wanted, length in zip(size, images.shape[2:], strict=True)]
    if new_size == list(images.shape[2:]):
        return images
    return F.interpolate(images, new_size, mode="bilinear", align_corners=False, antialias=True)


def open_session(
    path: Path | str, proto: onnx.ModelProto | None = None, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU for an ONNX file or, if given, its changed content `proto`.

    Write the graph that ONNX Runtime really runs to `optimized`, if given. Raise a UserError if it can't run the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the other backends down
    options.log_severity_level = 4
    if not torch.cpu._is_vnni_supported():
        # Kernels without VNNI let sums of uint8 times int8 overflow 16 bits. This takes exact ones, half as fast.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    source = proto.SerializeToString() if proto else str(path)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        message = f"{path}: ONNX Runtime {onnxruntime.__version__} can't run this file ({runtime_reason(error)})"
        raise UserError(f"{message}. Export it with operators that ONNX Runtime has on CPUs.") from error


def run_session(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], feed: dict[str, np.ndarray], path: Path | str
) -> list[np.ndarray]:
    """Return the arrays of the named outputs, or raise a UserError that names `path`."""
    try:
        return session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        message = f"{path}: ONNX Runtime failed while running this file ({runtime_reason(error)})"
        raise UserError(f"{message}. Check that the file takes images of this size.") from error

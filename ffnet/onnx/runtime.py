"""Run ONNX files with ONNX Runtime on the CPU, and find which convolutions run on integer kernels."""

import copy
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F

from ffnet.evaluation.compilation import image_by_image
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.onnx.reading import read_onnx
from ffnet.onnx.validation import OnnxHeader, check_onnx
from ffnet.system.errors import UserError
from ffnet.system.memory import describe_lack, is_out_of_memory
from ffnet.system.text import list_names, runtime_reason

INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")


class OnnxBackend:
    """An ONNX file as a backend. It uses as many threads as torch, and resizes images to the size of the file."""

    def __init__(self, path: Path | str, input_format: InputFormat = NORMALIZED_RGB) -> None:
        self.path = Path(path)
        self.input_format = input_format
        self.header = check_onnx(path)
        self.session = open_session(path)
        self.buffer = torch.empty(0)  # shared by all inputs: a new one for each takes a tenth of the backend's time

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return logits (N, classes, h, w) float32 of normalized images (N, 3, H, W) float32, on the CPU."""
        images = self.prepare(images)
        return image_by_image(self._run)(images) if self.header.input_shape[0] == 1 else self._run(images)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalized images in the value range, channel order and size that the file takes, on the CPU."""
        return resize(self.input_format.convert(images.cpu()), self.header.input_shape[2:])

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
    content = (proto or read_onnx(path)).SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        if optimized and optimized.exists():  # the graph was read, and could not be written
            message = f"TMPDIR: {optimized} can't be written. Free some space, or set it to a folder with more."
            raise UserError(message) from error
        if is_out_of_memory(error):
            raise UserError(f"{path}: {describe_lack(error, ' to run this file')}") from error
        message = f"{path}: ONNX Runtime {onnxruntime.__version__} can't run this file ({runtime_reason(error)})"
        raise UserError(f"{message}. Export it with operators that ONNX Runtime has on CPUs.") from error


def run_session(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], feed: dict[str, np.ndarray], path: Path | str
) -> list[np.ndarray]:
    """Return the arrays of the named outputs, or raise a UserError that names `path`."""
    try:
        return session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        if is_out_of_memory(error):
            raise UserError(f"{path}: {describe_lack(error, ' to run this file')}") from error
        message = f"{path}: ONNX Runtime failed while running this file ({runtime_reason(error)})"
        raise UserError(f"{message}. Check that the file takes images of this size.") from error


@dataclass(frozen=True)
class OnnxDescription:
    """What is in an ONNX file, and how ONNX Runtime runs it here."""

    header: OnnxHeader
    quantized: bool
    convolutions: int
    integer: int  # convolutions that run on integer kernels
    floats: tuple[str, ...]  # names of the convolutions of a quantized file that run in float

    def lines(self) -> list[str]:
        """Return the description as sentences."""
        height, width = self.header.input_shape[2:]
        kind = "quantized (QDQ or integer operators)" if self.quantized else "not quantized"
        size = (
            f"{height}x{width} pixels; other images are resized bilinearly to it, and logits to the size of the labels"
        )
        if None in (height, width):
            size = "any size, so images are not resized"
        first = f"The file is {kind}, of opset {self.header.opset}."
        return [first, f"Its input {self.header.input_name!r} takes {size}.", *self.kernel_lines()]

    def kernel_lines(self) -> list[str]:
        """Return sentences on the kernels that run the convolutions."""
        lines = [f"Convolutions that run on integer kernels: {self.integer} of {self.convolutions}."]
        if self.floats:
            lines.append(f"Convolutions that run in float: {len(self.floats)} ({list_names(self.floats)}).")
        return lines


def inspect_onnx(path: Path | str) -> OnnxDescription:
    """Return the description of an ONNX file, or raise a UserError if it can't be run."""
    header = check_onnx(path)
    proto = read_onnx(path)
    operators = {node.op_type for node in proto.graph.node}
    quantized = any("QuantizeLinear" in operator or operator.startswith("QLinear") for operator in operators)
    convolutions = [node for node in proto.graph.node if node.op_type in ("Conv", *INTEGER_CONVOLUTIONS)]
    names = [node.name or node.output[0] for node in convolutions]
    for index, node in enumerate(convolutions):
        node.name = f"convolution{index}"
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, proto, optimized)
        nodes = [node for node in onnx.load(optimized).graph.node if node.op_type in INTEGER_CONVOLUTIONS]
    matches = (re.match(r"convolution(\d+)(_token_\d+)?$", node.name) for node in nodes)
    integer = {int(match[1]) for match in matches if match}
    floats = [name for index, name in enumerate(names) if quantized and index not in integer]
    return OnnxDescription(header, quantized, len(names), len(integer), tuple(floats))

"""Open a file that --onnx names: what it takes, what it returns, and the notes about both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch.utils.data import Subset

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation.backends import ONNX_FILE
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.onnx.heads import describe_head
from ffnet.onnx.input_format import InputFormat, choose_input
from ffnet.onnx.input_operations import first_operations
from ffnet.onnx.inspection import inspect_onnx
from ffnet.onnx.runtime import OnnxBackend
from ffnet.run.session import Run
from ffnet.system.errors import UserError

TRIAL_IMAGES = 4  # spread evenly over the scored ones


def open_onnx(path: Path, images: CityscapesSplit, run: Run) -> OnnxBackend:
    """Return the file as a backend that feeds it what it takes, and add notes on it to the run.

    Every rank finds the same, because all of them try the same images.

    Raises:
        UserError: if the file can't be run.
        DatasetError: if an image or a label is wrong.
    """
    with run.stage("load ONNX file"):
        backend = OnnxBackend(path)
        run.notes += inspect_onnx(path).lines()
    with run.stage("find the input of the ONNX file"):
        model = run.config.model
        proto = onnx.load(path)
        first = first_operations(proto, backend.header.input_name)
        chosen = choose_input(first, (model.onnx_input, model.onnx_channels), trial(backend, images, run))
        backend = backend.with_input(chosen)
        run.notes.append(chosen.describe())
        with torch.inference_mode():
            logits = backend(normalize(images[0][0][None]))
        head = describe_head(proto, backend.header.output_name, logits)
        if head and tuple(logits.shape[2:]) != (images.height, images.width):
            run.notes.append(head)
    return backend


def trial(backend: OnnxBackend, images: CityscapesSplit, run: Run) -> Callable[[InputFormat], float]:
    """Return a function that returns the mIoU of an input format on a few images, in percent."""
    indices = evenly_spaced(len(images), TRIAL_IMAGES).tolist()
    runtime = replace(run.runtime, batch_size=1, num_workers=0, progress=False)

    def score(input_format: InputFormat) -> float:
        backends = {ONNX_FILE: backend.with_input(input_format)}
        try:
            return evaluate(backends, Subset(images, indices), runtime).miou(ONNX_FILE)
        except UserError:  # logits that are not finite
            return float("nan")

    return score

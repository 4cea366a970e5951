"""Open a file that --onnx names: what it takes, what it returns, and the notes on both."""

from dataclasses import replace
from pathlib import Path

import onnx
import torch

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.scores import ONNX_FILE
from ffnet.onnx.input_format import InputFormat, choose_input
from ffnet.onnx.runtime import OnnxBackend, inspect_onnx
from ffnet.onnx.validation import describe_head
from ffnet.system.errors import UserError

TRIAL_IMAGES = 4  # number of images in the trial, spread evenly over the scored ones


def open_onnx(
    path: Path, images: CityscapesSplit, runtime: Runtime, given: tuple[str | None, str | None] = (None, None)
) -> tuple[OnnxBackend, list[str]]:
    """Return a file as a backend that feeds it what it takes, and notes on the file.

    Args:
        path: The ONNX file.
        images: Scored images; some are used to find what the file takes, if options and metadata do not say it.
        runtime: How images are loaded.
        given: Value range and channels that options name; None for what is not given.

    Raises:
        UserError: If the file can't be run.
        DatasetError: If an image or a label is wrong.
    """
    backend = OnnxBackend(path)
    notes = inspect_onnx(path).lines()
    few = images.select(evenly_spaced(len(images), TRIAL_IMAGES).tolist())
    one_by_one = replace(runtime, batch_size=1, num_workers=0, quiet=True)

    def trial(input_format: InputFormat) -> float:
        try:
            return evaluate({ONNX_FILE: backend.with_input(input_format)}, few, one_by_one).miou(ONNX_FILE)
        except UserError:  # logits that are not finite
            return float("nan")

    proto = onnx.load(path)
    chosen = choose_input(proto, given, trial)
    backend = backend.with_input(chosen)
    notes.append(chosen.describe())
    with torch.inference_mode():
        logits = backend(normalize(images[0][0][None]))
    head = describe_head(proto, backend.header.output_name, logits)
    if head and tuple(logits.shape[2:]) != images.size:
        notes.append(head)
    return backend, notes

"""The evaluation loop. Each image is decoded once and runs through all backends."""

import functools
import itertools
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ffnet.config import Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.compilation import PreparedBackends
from ffnet.evaluation.devices import Mark, mark, moved, seconds_between
from ffnet.evaluation.loading import (
    Images,
    Sample,
    describe_tensors,
    label_set_of,
    normalize,
    open_batches,
)
from ffnet.evaluation.postprocessing import agreeing_pixels, confusion_matrices, predict
from ffnet.evaluation.scores import Backend, Scores, concatenate, no_scores
from ffnet.labels import LabelSet
from ffnet.system.errors import UserError, check_type
from ffnet.system.memory import first_sentence, is_out_of_gpu_memory
from ffnet.system.text import count

Predictions = dict[str, torch.Tensor]  # {backend: train ids uint8 (N, H, W), on the device}
T = TypeVar("T")
K = TypeVar("K")
REMEDY = "Use another checkpoint or ONNX file."


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of consecutive images."""

    positions: np.ndarray  # (images,) int64, positions in the dataset of the loop
    scores: Scores
    predictions: Predictions


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch whose predictions and counts a GPU may still be computing, or copying back."""

    predictions: Predictions
    finite: dict[str, torch.Tensor]  # backend -> whether its logits are finite
    matrices: dict[str, torch.Tensor]  # backend -> confusion matrices
    agreeing: dict[tuple[str, str], torch.Tensor]
    pixels: np.ndarray
    marks: dict[str, tuple[Mark, Mark]]  # backend -> begin and end of its network
    span: tuple[Mark, Mark]  # begin and end of everything
    processor_seconds: float
    batch_size: int | None = None  # the batch size after backoff

    def scores(self) -> Scores:
        """Wait for the device, and return the scores; raise a UserError if logits are not finite."""
        whole = seconds_between(*self.span)
        for name, finite in self.finite.items():
            if not finite:
                raise UserError(f"{name}: the logits of this backend are not finite. {REMEDY}")
        seconds = {name: seconds_between(*marks) for name, marks in self.marks.items()}
        return Scores(
            {name: matrices.numpy() for name, matrices in self.matrices.items()},
            {pair: pixels.numpy() for pair, pixels in self.agreeing.items()},
            self.pixels,
            seconds,
            whole - sum(seconds.values()),
            self.processor_seconds,
            self.batch_size,
        )


def evaluate(
    backends: Mapping[str, Backend] | PreparedBackends,
    images: Images,
    runtime: Runtime = Runtime(),
    title: str = "evaluate",
) -> Scores:
    """Score every backend on all images.

    If the GPU's memory does not suffice for a batch, this batch and all after it are split into smaller ones.

    Args:
        backends: By name; each a callable from normalized images (N, 3, H, W) to logits (N, classes, h, w).
            Torch modules must be in eval mode and on the device of `runtime`, to which only images and labels are
            moved.
        images: A CityscapesSplit, or another dataset of (image uint8 (3, H, W), train ids uint8 (H, W)). The classes
            are those of its attribute `label_set`, a LabelSet; without one they are Cityscapes'.
        runtime: Device and data loading.
        title: Text before the progress bar.

    Raises:
        UserError: If an argument is wrong, if a backend returns anything but finite logits, or if the memory does not
            suffice for decoding a batch or, on a GPU, for one image.
    """
    prepared = backends if isinstance(backends, PreparedBackends) else PreparedBackends(_checked(backends))
    check_type("runtime", runtime, Runtime, "Give a Runtime")
    batches = score_batches(prepared, images, runtime, title)
    nothing = no_scores(prepared.backends, len(label_set_of(images).classes))
    return concatenate([nothing, *(batch.scores for batch in batches)])


def _checked(backends: Mapping[str, Backend]) -> Mapping[str, Backend]:
    """Return backends that are callable and, if they are torch modules, in eval mode; raise a UserError otherwise."""
    check_type("backends", backends or None, Mapping, 'Give at least one by its name, such as {"FP32": model}')
    for name, backend in backends.items():
        check_type(f"backend {name!r}", backend, Callable, "Give a network: a checkpoint's `model`, or `lowered`")
        if getattr(backend, "training", False):
            raise UserError(f"backend {name!r}: the network is in training mode. Call its eval() first.")
    return backends


@torch.inference_mode()
def score_batches(
    prepared: PreparedBackends, images: Images, runtime: Runtime = Runtime(), title: str = "evaluate"
) -> Iterator[ScoredBatch]:
    """Yield the scores of the images batch by batch; the arguments and errors are those of `evaluate`."""
    label_set = label_set_of(images)
    totals = dict.fromkeys(prepared.backends, 0)
    start, batch_size = 0, runtime.batch_size
    pending: deque[LaunchedBatch] = deque()

    def finished(most_pending: int) -> Iterator[ScoredBatch]:
        nonlocal start
        while len(pending) > most_pending:
            batch = pending.popleft()
            scores = batch.scores()
            yield ScoredBatch(np.arange(start, start + scores.images), scores, batch.predictions)
            bar.set_postfix_str(_running_mious(totals, scores))
            start += scores.images

    with open_batches(images, runtime, title) as (batches, bar):
        for batch in moved(batches, runtime.device):
            work = functools.partial(_launch_pieces, prepared, batch, label_set, runtime)
            pieces, batch_size = with_backoff(work, batch_size)
            reduced = batch_size if batch_size < runtime.batch_size else None
            pending.extend(replace(piece, batch_size=reduced) for piece in pieces)
            yield from finished(len(pieces) if runtime.on_gpu else 0)  # a GPU computes while earlier counts are read
        yield from finished(0)


def calibration_batches(images: Images, runtime: Runtime) -> Generator[torch.Tensor, None, None]:
    """Yield normalized batches (N, 3, H, W) float32 on the device of `runtime`, with its progress bar."""
    with open_batches(images, runtime, "calibrate") as (batches, _):
        for batch, _ in moved(batches, runtime.device):
            yield normalize(batch, runtime.allow_tf32)


def with_backoff(work: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """Call `work` with a batch size, which is halved whenever the GPU runs out of memory.

    Returns:
        The result of `work`, and the batch size that sufficed.

    Raises:
        UserError: If the memory does not suffice for one image.
    """
    while True:
        try:
            return work(batch_size), batch_size
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
            if batch_size == 1:
                raise UserError(
                    f"The GPU's memory does not suffice for one image ({first_sentence(error)}). Use --use-cuda false."
                ) from error
            traceback.clear_frames(error.__traceback__)  # frees the tensors of the batch that did not fit
        torch.cuda.empty_cache()
        batch_size //= 2
        tqdm.write(f"Out of GPU memory: continuing with batches of {count(batch_size, 'image')}.", file=sys.stderr)


def _running_mious(totals: dict[str, Any], scores: Scores) -> str:
    """Add the counts of `scores` to the totals, and return the mIoU of every backend so far."""
    for name in totals:
        totals[name] += scores.total(name)
    return ", ".join(f"{name} {100 * metrics.mean_iou(total):.2f}" for name, total in totals.items())


@torch.inference_mode()
def warm_up(prepared: PreparedBackends, images: Images, runtime: Runtime) -> None:
    """Run backends once on the first image, so that their times include neither compiling nor cuDNN's set-up."""
    if not runtime.on_gpu and prepared.kernel is None:  # nothing is compiled
        return
    number = runtime.batch_size if runtime.on_gpu else 1
    image, labels = (tensor.expand(number, *tensor.shape) for tensor in images[0])
    try:
        (batch,) = moved([(image, labels.byte())], runtime.device)
        _launch(prepared, batch, label_set_of(images), runtime).scores()
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):  # the evaluation loop handles it
            raise


def _launch_pieces(
    prepared: PreparedBackends, batch: Sample, label_set: LabelSet, runtime: Runtime, size: int
) -> list[LaunchedBatch]:
    """Launch a batch in pieces of at most `size` images."""
    pieces = zip(*(tensor.split(size) for tensor in batch), strict=True)
    return [_launch(prepared, piece, label_set, runtime) for piece in pieces]


def _check_logits(name: str, logits: torch.Tensor, images: torch.Tensor, label_set: LabelSet) -> None:
    """Raise a UserError if what a backend returned for a batch is not logits, float (N, classes, h, w)."""
    classes = len(label_set.classes)
    is_float = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.numel() > 0
    if not (is_float and logits.dim() == 4 and logits.shape[:2] == (len(images), classes)):
        raise UserError(
            f"{name}: for {count(len(images), 'image')} this backend returned {describe_tensors(logits)} in place of "
            f"logits, float [{len(images)}, {classes}, height, width], for the {classes} classes of the label set "
            f"{label_set.name!r}. {REMEDY}"
        )


def _launch(prepared: PreparedBackends, batch: Sample, label_set: LabelSet, runtime: Runtime) -> LaunchedBatch:
    """Run a batch on the device of `runtime` through all backends, and compare the predictions with the labels."""
    device = runtime.device
    images, labels = batch
    inputs = normalize(images, runtime.allow_tf32)
    predictions, marks, finite, processor_seconds, start = {}, {}, {}, 0.0, mark(device)
    for name, backend in prepared.backends.items():
        before, processor_before = mark(device), time.process_time()
        logits = backend(inputs)
        marks[name] = before, mark(device)
        processor_seconds += time.process_time() - processor_before
        _check_logits(name, logits, images, label_set)
        finite[name] = logits.sum(dtype=torch.float32).isfinite()  # a sum in float16 could overflow
        logits = logits.to(device)  # from ONNX Runtime and the NPU: a CPU upsamples a hundred times slower
        predictions[name] = predict(logits, labels.shape[1:], prepared.kernel)
    classes, pairs = len(label_set.classes), itertools.combinations(predictions, 2)
    matrices = {name: confusion_matrices(labels, ids, classes) for name, ids in predictions.items()}
    agreeing = {(a, b): agreeing_pixels(predictions[a], predictions[b]) for a, b in pairs}
    pixels = np.full(len(labels), labels[0].numel())
    counts = _to_host(finite), _to_host(matrices), _to_host(agreeing)
    return LaunchedBatch(predictions, *counts, pixels, marks, (start, mark(device)), processor_seconds)


def _to_host(tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Begin to copy tensors to pinned memory; they are there once the device has reached a later mark."""
    return {key: tensor.to("cpu", non_blocking=True) for key, tensor in tensors.items()}

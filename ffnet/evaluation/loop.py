"""The evaluation loop. Each image is decoded once and runs through all backends."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ffnet.backends import Backend
from ffnet.errors import UserError
from ffnet.evaluation.compilation import FixedBatchSize, PreparedBackends
from ffnet.evaluation.loading import Sample, open_batches
from ffnet.evaluation.postprocessing import confusion_matrices, predict
from ffnet.evaluation.preprocessing import normalize
from ffnet.evaluation.runtime import Runtime
from ffnet.evaluation.scores import Scores, concatenate
from ffnet.variants import NUM_CLASSES
from ffnet.wording import count

Predictions = dict[str, torch.Tensor]  # {backend: train ids uint8 (N, H, W), on the device}
Writer = Callable[[int, dict[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}


def calibration_batches(images: Dataset[Sample], runtime: Runtime) -> Generator[torch.Tensor, None, None]:
    """Yield normalized batches (N, 3, H, W) float32 on the device of `runtime`, with its progress bar."""
    with open_batches(images, runtime, "calibrate") as batches:
        for batch, _ in batches:
            yield normalize(batch.to(runtime.device, non_blocking=True))


def evaluate(
    backends: Mapping[str, Backend] | PreparedBackends,
    images: Dataset[Sample],
    runtime: Runtime = Runtime(),
    writer: Writer | None = None,
    title: str = "evaluate",
) -> Scores:
    """Score every backend on all images.

    If the GPU's memory does not suffice for a batch, this batch and all after it are split into smaller ones.

    Args:
        backends: by name; each a callable from normalized images (N, 3, H, W) to logits (N, 19, h, w). Torch
            modules must be in eval mode and on the device of `runtime`, to which only images and labels are moved.
        images: a CityscapesSplit, or another dataset of (image uint8 (3, H, W), train ids uint8 (H, W)).
        runtime: the device, and how images are loaded.
        writer: is called with the index and the predictions of each image. After an OSError it is not called again,
            and `Scores.unsaved` says why; the evaluation goes on.
        title: stands before the progress bar.

    Raises:
        UserError: if logits are not finite, or if the memory does not suffice for decoding a batch or, on a
            GPU, for one image.
    """
    scores = _no_scores(())
    for scores in running_scores(backends, images, runtime, writer, title):  # noqa: B007 - the last one is wanted
        pass
    return scores


@torch.inference_mode()
def running_scores(
    backends: Mapping[str, Backend] | PreparedBackends,
    images: Dataset[Sample],
    runtime: Runtime = Runtime(),
    writer: Writer | None = None,
    title: str = "evaluate",
) -> Iterator[Scores]:
    """Yield what `evaluate` returns, of no image and then of all images so far, after every batch.

    See `evaluate` for the arguments.
    """
    prepared = backends if isinstance(backends, PreparedBackends) else PreparedBackends(backends)
    done, unsaved = _no_scores(prepared.backends), None
    yield done
    with open_batches(images, runtime, title) as bar:
        for batch in bar:
            for scores, predictions in _score_in_pieces(prepared, batch, runtime.device, done.batch_size):
                if writer and not unsaved:
                    unsaved = _write(writer, done.images, predictions)
                done = concatenate(done, scores)
            bar.set_postfix_str(", ".join(f"{name} {done.miou(name):.2f}" for name in prepared.backends))
            done = replace(done, unsaved=unsaved)
            yield done


@torch.inference_mode()
def warm_up(prepared: PreparedBackends, size: tuple[int, int], runtime: Runtime) -> None:
    """Run compiled backends once on noise of `size` (H, W), so that their times do not include compiling."""
    if prepared.compiled:
        batch_size = 1 if runtime.device.type == "cpu" else runtime.batch_size
        images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # the evaluation loop handles it
            _score(prepared, (images, images[:, 0]), runtime.device)


def _score(prepared: PreparedBackends, batch: Sample, device: torch.device) -> tuple[Scores, Predictions]:
    """Run a batch through all backends and compare the predictions with the labels."""
    images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    inputs = normalize(images)
    predictions, seconds, start = {}, {}, synchronized_clock(device)
    for name, backend in prepared.backends.items():
        before = synchronized_clock(device)
        logits = backend(inputs)
        seconds[name] = synchronized_clock(device) - before
        if not logits.sum().isfinite():
            raise UserError(f"{name}: this backend's logits are not finite. Use another checkpoint or ONNX file.")
        predictions[name] = predict(logits, labels.shape[1:], prepared.kernel).to(device)
    matrices = {name: confusion_matrices(labels, ids) for name, ids in predictions.items()}
    pairs = itertools.combinations(predictions, 2)
    agreeing = {(a, b): (predictions[a] == predictions[b]).sum((1, 2)).cpu().numpy() for a, b in pairs}
    scoring_seconds = synchronized_clock(device) - start - sum(seconds.values())
    return Scores(matrices, agreeing, labels[0].numel(), seconds, scoring_seconds), predictions


def _no_scores(backends: Iterable[str]) -> Scores:
    """Return the scores of no image."""
    matrices = {name: np.empty((0, NUM_CLASSES, NUM_CLASSES), np.int64) for name in backends}
    agreeing = {pair: np.empty(0, np.int64) for pair in itertools.combinations(matrices, 2)}
    return Scores(matrices, agreeing, 0, dict.fromkeys(matrices, 0.0))


def _write(writer: Writer, first: int, predictions: Predictions) -> str | None:
    """Pass the predictions of a batch to the writer; return why it failed, or None."""
    try:
        for offset in range(len(next(iter(predictions.values())))):
            writer(first + offset, {name: ids[offset].cpu().numpy() for name, ids in predictions.items()})
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None


def _score_in_pieces(
    prepared: PreparedBackends, batch: Sample, device: torch.device, batch_size: int | None
) -> Iterator[tuple[Scores, Predictions]]:
    """Yield the scores and predictions of a batch in pieces of `batch_size`, or smaller ones if memory requires it."""
    images, labels = batch
    start = 0
    while start < len(images):
        piece = slice(start, start + (batch_size or len(images)))
        try:
            scores, predictions = _score(prepared, (images[piece], labels[piece]), device)
        except torch.cuda.OutOfMemoryError as error:
            batch_size = smaller_batch_size(len(images[piece]), error)
            for backend in prepared.backends.values():
                if isinstance(backend, FixedBatchSize):
                    backend.batch_size = batch_size
        else:
            yield replace(scores, batch_size=batch_size), predictions
            start = piece.stop


def smaller_batch_size(batch_size: int, error: torch.cuda.OutOfMemoryError) -> int:
    """Return half the batch size after an out-of-memory error and say so on stderr; at 1, raise a UserError."""
    if batch_size == 1:
        raise UserError("GPU: its memory does not suffice for one image. Use --use-cuda false.") from error
    torch.cuda.empty_cache()
    tqdm.write(f"Out of GPU memory: continuing with batches of {count(batch_size // 2, 'image')}.", file=sys.stderr)
    return batch_size // 2


def synchronized_clock(device: torch.device) -> float:
    """Return the time in seconds once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

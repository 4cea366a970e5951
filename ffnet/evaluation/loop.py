"""The evaluation loop. Each image is decoded once and runs through all backends."""

import itertools
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ffnet.backends import Backend
from ffnet.evaluation import metrics
from ffnet.evaluation.compilation import FixedBatchSize, PreparedBackends
from ffnet.evaluation.loading import Sample, open_batches
from ffnet.evaluation.postprocessing import agreeing_pixels, confusion_matrices, predict
from ffnet.evaluation.preprocessing import normalize
from ffnet.evaluation.runtime import Runtime, synchronized_clock
from ffnet.evaluation.scores import Scores, concatenate, no_scores
from ffnet.system.errors import UserError
from ffnet.system.memory import first_sentence, is_out_of_gpu_memory
from ffnet.system.text import count
from ffnet.variants import NUM_CLASSES

Predictions = dict[str, torch.Tensor]  # {backend: train ids uint8 (N, H, W), on the device}


def calibration_batches(images: Dataset[Sample], runtime: Runtime) -> Generator[torch.Tensor, None, None]:
    """Yield normalized batches (N, 3, H, W) float32 on the device of `runtime`, with its progress bar."""
    with open_batches(images, runtime, "calibrate") as batches:
        for batch, _ in batches:
            yield normalize(batch.to(runtime.device, non_blocking=True), runtime.allow_tf32)


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of some images in the backends of one model."""

    model: int  # index of the model
    positions: np.ndarray  # (images,) int64, of the images in the dataset of the loop
    scores: Scores
    predictions: Predictions


def evaluate(
    backends: Mapping[str, Backend] | PreparedBackends,
    images: Dataset[Sample],
    runtime: Runtime = Runtime(),
    title: str = "evaluate",
) -> Scores:
    """Score every backend on all images.

    If the GPU's memory does not suffice for a batch, this batch and all after it are split into smaller ones.

    Args:
        backends: by name; each a callable from normalized images (N, 3, H, W) to logits (N, 19, h, w). Torch
            modules must be in eval mode and on the device of `runtime`, to which only images and labels are moved.
        images: a CityscapesSplit, or another dataset of (image uint8 (3, H, W), train ids uint8 (H, W)).
        runtime: the device, and how images are loaded.
        title: stands before the progress bar.

    Raises:
        UserError: if logits are not finite, or if the memory does not suffice for decoding a batch or, on a
            GPU, for one image.
    """
    prepared = backends if isinstance(backends, PreparedBackends) else PreparedBackends(backends)
    batches = score_batches([prepared], images, runtime, title)
    return concatenate([no_scores(prepared.backends), *(batch.scores for batch in batches)])


@torch.inference_mode()
def score_batches(
    models: Sequence[PreparedBackends],
    images: Dataset[Sample],
    runtime: Runtime = Runtime(),
    title: str = "evaluate",
    wanted: np.ndarray | None = None,
) -> Iterator[ScoredBatch]:
    """Yield the scores of every batch in the backends of one model after the other; an image is decoded once.

    Args:
        models: the backends of each model; for them and the other arguments see `evaluate`.
        images: see `evaluate`.
        runtime: see `evaluate`.
        title: see `evaluate`.
        wanted: which images each model is scored on, (models, images) bool; None: all.
    """
    backoff = _Backoff(models)
    totals = {name: np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64) for name in models[0].backends}
    start = 0
    with open_batches(images, runtime, title) as bar:
        for batch in bar:
            everything = np.ones((len(models), len(batch[0])), bool)
            chosen = everything if wanted is None else wanted[:, start : start + len(batch[0])]
            for model, prepared in enumerate(models):
                pieces = _score_in_pieces(prepared, batch, chosen[model].nonzero()[0], runtime, backoff)
                for positions, scores, predictions in pieces:
                    yield ScoredBatch(model, start + positions, scores, predictions)
                    if len(models) == 1:
                        bar.set_postfix_str(_running_mious(totals, scores))
            start += len(batch[0])


class _Backoff:
    """The batch size, which is halved whenever the memory of the GPU does not suffice."""

    def __init__(self, models: Sequence[PreparedBackends]) -> None:
        backends = itertools.chain(*(prepared.backends.values() for prepared in models))
        self._compiled = [backend for backend in backends if isinstance(backend, FixedBatchSize)]
        self.batch_size: int | None = None  # None: that of the data loading

    def halve(self, images: int, error: RuntimeError) -> None:
        """Set the batch size to half of so many images, which did not fit; raise a UserError if it was only one.

        Compiled backends pad smaller batches, so that more images may have been run.
        """
        run = max([images, *(backend.batch_size for backend in self._compiled)])
        self.batch_size = smaller_batch_size(run, error)
        for backend in self._compiled:
            backend.batch_size = self.batch_size


def _running_mious(totals: dict[str, np.ndarray], scores: Scores) -> str:
    """Add the counts of `scores` to the totals, and return the mIoU of every backend so far."""
    for name in totals:
        totals[name] += scores.total(name)
    return ", ".join(f"{name} {100 * metrics.mean_iou(total):.2f}" for name, total in totals.items())


@torch.inference_mode()
def warm_up(prepared: PreparedBackends, size: tuple[int, int], runtime: Runtime) -> None:
    """Run backends once on noise of `size` (H, W), so that their times include neither compiling nor cuDNN's set-up."""
    on_cpu = runtime.device.type == "cpu"
    if on_cpu and prepared.kernel is None:  # nothing is compiled
        return
    images = torch.randint(0, 256, (1 if on_cpu else runtime.batch_size, 3, *size), dtype=torch.uint8)
    try:
        _score(prepared, (images, images[:, 0]), runtime)
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):  # which the evaluation loop handles
            raise


def _score(prepared: PreparedBackends, batch: Sample, runtime: Runtime) -> tuple[Scores, Predictions]:
    """Run a batch through all backends and compare the predictions with the labels, on the device of `runtime`."""
    device = runtime.device
    images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    inputs = normalize(images, runtime.allow_tf32)
    predictions, seconds, start = {}, {}, synchronized_clock(device)
    for name, backend in prepared.backends.items():
        before = synchronized_clock(device)
        logits = backend(inputs)
        seconds[name] = synchronized_clock(device) - before
        if not logits.sum().isfinite():
            model = f"{prepared.model}, " if prepared.model else ""
            raise UserError(
                f"{model}{name}: this backend's logits are not finite. Use another checkpoint or ONNX file."
            )
        logits = logits.to(device)  # those of ONNX Runtime and the NPU: a CPU upsamples a hundred times slower
        predictions[name] = predict(logits, labels.shape[1:], prepared.kernel)
    matrices = {name: confusion_matrices(labels, ids) for name, ids in predictions.items()}
    pairs = itertools.combinations(predictions, 2)
    agreeing = {(a, b): agreeing_pixels(predictions[a], predictions[b]) for a, b in pairs}
    scoring_seconds = synchronized_clock(device) - start - sum(seconds.values())
    return Scores(matrices, agreeing, labels[0].numel(), seconds, scoring_seconds), predictions


def _score_in_pieces(
    prepared: PreparedBackends, batch: Sample, chosen: np.ndarray, runtime: Runtime, backoff: _Backoff
) -> Iterator[tuple[np.ndarray, Scores, Predictions]]:
    """Score the images of a batch at the positions `chosen`, in pieces of the batch size after backoff.

    Each piece is yielded as positions in the batch, scores and predictions.
    """
    while len(chosen):
        piece = chosen[: backoff.batch_size]
        try:
            scores, predictions = _score(prepared, _select(batch, piece), runtime)
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
            backoff.halve(len(piece), error)
        else:
            yield piece, replace(scores, batch_size=backoff.batch_size), predictions
            chosen = chosen[len(piece) :]


def _select(batch: Sample, positions: np.ndarray) -> Sample:
    """Return some images of a batch; neighbours without a copy, so that they stay in pinned memory."""
    first, last = int(positions[0]), int(positions[-1])
    chosen = slice(first, last + 1) if last - first + 1 == len(positions) else torch.from_numpy(positions)
    return batch[0][chosen], batch[1][chosen]


def smaller_batch_size(batch_size: int, error: RuntimeError) -> int:
    """Return half the batch size after an out-of-memory error and say so on stderr; at 1, raise a UserError."""
    if batch_size == 1:
        raise UserError(
            f"GPU: its memory does not suffice for one image ({first_sentence(error)}). "
            "Give a smaller --models-at-once if the run has several models, or use --use-cuda false."
        ) from error
    traceback.clear_frames(error.__traceback__)  # which hold the tensors of the batch that did not fit
    torch.cuda.empty_cache()
    tqdm.write(f"Out of GPU memory: continuing with batches of {count(batch_size // 2, 'image')}.", file=sys.stderr)
    return batch_size // 2

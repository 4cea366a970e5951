"""The backends, which run the same network in different arithmetic, and what the evaluation loop measures of them.

The constants are the keys of scores and of saved records; `BackendNames` gives their names in results.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ffnet.evaluation import metrics

if TYPE_CHECKING:
    import torch

# A network as the evaluation loop calls it: normalized images (N, 3, H, W) -> logits (N, classes, h, w), both float32.
Backend = Callable[["torch.Tensor"], "torch.Tensor"]

FP32 = "FP32"
SIMULATED = "simulated"  # AIMET's simulation, lowered to plain torch modules
ONNX_RUNTIME = "ONNX Runtime"  # the exported file on ONNX Runtime's integer kernels
NPU = "NPU"  # the exported file on Qualcomm's NPU
ONNX_FILE = "ONNX file"  # a file that was given with --onnx


@dataclass(frozen=True)
class BackendNames:
    """The names of backends in results and reports: those of a quantized network begin with its precision.

    Precision is "INT8" for 8-bit weights and activations and otherwise their bits, such as "W4A8", followed by "mixed"
    if some have more; "" if it is unknown, as for a file that was given with --onnx.
    """

    precision: str = "INT8"

    def of(self, backend: str) -> str:
        """Return the name of a backend, such as "INT8 simulated" of SIMULATED."""
        return backend if backend in (FP32, ONNX_FILE) else f"{self.precision} {backend}".lstrip()


@dataclass(frozen=True)
class Scores:
    """Confusion matrices per image and backend, and the number of pixels on which two backends agree."""

    confusion_matrices: dict[str, np.ndarray]  # backend -> (images, classes, classes) int64, row = label
    agreeing_pixels: dict[tuple[str, str], np.ndarray]  # two backends -> (images,) int64
    pixels: np.ndarray  # (images,) int64, pixels of each label, scored or not
    seconds: dict[str, float]  # backend -> time in the network, without decoding and scoring
    scoring_seconds: float = 0.0  # from logits to counts, all backends together
    processor_seconds: float = 0.0  # processor time of this process while it was in the networks
    batch_size: int | None = None  # the batch size after backoff; None if no batch ran out of memory
    unsaved: str | None = None  # why some predictions or records were not written; None if all were

    @property
    def images(self) -> int:
        """Number of images."""
        return len(next(iter(self.confusion_matrices.values())))

    def total(self, backend: str) -> np.ndarray:
        """Return the confusion matrix (classes, classes) int64 of a backend over all images."""
        return self.confusion_matrices[backend].sum(0)

    def miou(self, backend: str) -> float:
        """Return the mIoU of a backend over all images, in percent; nan if no pixel is labelled."""
        return 100 * metrics.mean_iou(self.total(backend))

    def agreement(self, first: str, second: str) -> float:
        """Return the prediction agreement of two backends, given in evaluation order, in percent."""
        return 100 * float(self.agreeing_pixels[first, second].sum() / self.pixels.sum())


@dataclass(frozen=True)
class Shard:
    """The scores of some images of a split."""

    indices: np.ndarray  # (images,) int64, indices of these images in the split
    scores: Scores


def no_scores(backends: Iterable[str], classes: int) -> Scores:
    """Return the scores of no image."""
    matrices = {name: np.empty((0, classes, classes), np.int64) for name in backends}
    agreeing = {pair: np.empty(0, np.int64) for pair in itertools.combinations(matrices, 2)}
    return Scores(matrices, agreeing, np.empty(0, np.int64), dict.fromkeys(matrices, 0.0))


def concatenate(pieces: Sequence[Scores], reduce_times: Callable[[Iterable[float]], float] = sum) -> Scores:
    """Return the scores of all images of several pieces, in their order; `reduce_times` combines the times."""
    first = pieces[0]
    return Scores(
        {n: np.concatenate([piece.confusion_matrices[n] for piece in pieces]) for n in first.confusion_matrices},
        {pair: np.concatenate([piece.agreeing_pixels[pair] for piece in pieces]) for pair in first.agreeing_pixels},
        np.concatenate([piece.pixels for piece in pieces]),
        {name: reduce_times(piece.seconds[name] for piece in pieces) for name in first.seconds},
        reduce_times(piece.scoring_seconds for piece in pieces),
        reduce_times(piece.processor_seconds for piece in pieces),
        min((piece.batch_size for piece in pieces if piece.batch_size), default=None),
        next((piece.unsaved for piece in pieces if piece.unsaved), None),
    )


def merge_shards(shards: Sequence[Shard], reduce_times: Callable[[Iterable[float]], float] = max) -> Shard:
    """Merge shards in the order of their images' indices; an image that is in several counts once.

    Args:
        shards: At least one.
        reduce_times: `max` for ranks that worked at the same time, `sum` for shards that were computed one after the
            other.
    """
    indices = np.concatenate([shard.indices for shard in shards])
    scores = concatenate([shard.scores for shard in shards], reduce_times)
    indices, order = np.unique(indices, return_index=True)
    return Shard(indices, _take(scores, order))


def _take(scores: Scores, order: np.ndarray) -> Scores:
    """Return the scores of the images at the positions `order`, in this order."""
    return replace(
        scores,
        confusion_matrices={name: matrices[order] for name, matrices in scores.confusion_matrices.items()},
        agreeing_pixels={pair: counts[order] for pair, counts in scores.agreeing_pixels.items()},
        pixels=scores.pixels[order],
    )

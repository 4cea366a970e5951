"""What the evaluation loop measures: pixel counts per image for every backend, and times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ffnet.evaluation import metrics


@dataclass(frozen=True)
class Scores:
    """Confusion matrices per image and backend, and the pixels that each two backends predict alike."""

    confusion_matrices: dict[str, np.ndarray]  # backend -> (images, 19, 19) int64, row = label, column = prediction
    agreeing_pixels: dict[tuple[str, str], np.ndarray]  # two backends -> (images,) int64
    pixels_per_image: int  # scored or not
    seconds: dict[str, float]  # backend -> time in the network, without decoding and scoring
    scoring_seconds: float = 0.0  # from logits to counts, all backends together
    batch_size: int | None = None  # the batch size after backoff; None if no batch ran out of memory
    unsaved: str | None = None  # why some predictions were not written; None if all were

    @property
    def images(self) -> int:
        """Number of images."""
        return len(next(iter(self.confusion_matrices.values())))

    def total(self, backend: str) -> np.ndarray:
        """Return the confusion matrix (19, 19) int64 of a backend over all images."""
        return self.confusion_matrices[backend].sum(0)

    def miou(self, backend: str) -> float:
        """Return the mIoU of a backend over all images, in percent; nan if no pixel is labelled."""
        return 100 * metrics.mean_iou(self.total(backend))

    def agreement(self, first: str, second: str) -> float:
        """Return the prediction agreement of two backends, given in evaluation order, in percent."""
        return 100 * float(self.agreeing_pixels[first, second].mean() / self.pixels_per_image)


def merge_shards(shards: Sequence[Scores]) -> Scores:
    """Merge the scores of ranks that each took every n-th image; the times are those of the slowest rank.

    A rank that stopped early may have fewer images than the others.
    """
    return _combine(shards, interleave, max)


def concatenate(*batches: Scores) -> Scores:
    """Merge the scores of successive images; the times are added."""
    return _combine(batches, np.concatenate, sum)


def _combine(pieces: Sequence[Scores], join: Callable[..., np.ndarray], reduce_times: Callable[..., float]) -> Scores:
    first = pieces[0]
    return Scores(
        {name: join([piece.confusion_matrices[name] for piece in pieces]) for name in first.confusion_matrices},
        {pair: join([piece.agreeing_pixels[pair] for piece in pieces]) for pair in first.agreeing_pixels},
        max(piece.pixels_per_image for piece in pieces),
        {name: reduce_times(piece.seconds[name] for piece in pieces) for name in first.seconds},
        reduce_times(piece.scoring_seconds for piece in pieces),
        min((piece.batch_size for piece in pieces if piece.batch_size), default=None),
        next((piece.unsaved for piece in pieces if piece.unsaved), None),
    )


def interleave(shards: Sequence[np.ndarray]) -> np.ndarray:
    """Return the array from which shard k of n holds the rows k, k + n, k + 2n, ... as far as they exist."""
    places = [np.arange(rank, rank + len(rows) * len(shards), len(shards)) for rank, rows in enumerate(shards)]
    return np.concatenate(shards)[np.argsort(np.concatenate(places))]

"""Confusion matrices, IoU and accuracy, and confidence intervals of the mIoU by a paired bootstrap over images.

Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
The bootstrap is paired: each resample draws the same images for every backend. What makes an image hard for all
backends therefore cancels in the mIoU drop, whose interval is usually much shorter than those of the two mIoUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ffnet.labels import NUM_CLASSES

RESAMPLES = 2000
LIMITS = (0.025, 0.975)  # quantiles of the resamples that bound the 95 % interval
SEED = 0

Interval = tuple[float, float]  # lower and upper limit


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return counts (19, 19) int64 of uint8 train ids, row = label, column = prediction; labels >= 19 do not count."""
    codes = labels.astype(np.uint16) * np.uint16(NUM_CLASSES) + predictions
    counts = np.bincount(codes.ravel(), minlength=256 * NUM_CLASSES)
    return counts.reshape(256, NUM_CLASSES)[:NUM_CLASSES].astype(np.int64)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Return TP / (TP + FP + FN) per class, float64; nan for a class in neither labels nor predictions."""
    hits = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(matrix: np.ndarray) -> float:
    """Return the mean IoU of the classes that occur; nan if none does."""
    ious = iou(matrix)
    present = ious[~np.isnan(ious)]
    return float(present.mean()) if present.size else float("nan")


def pixel_accuracy(matrix: np.ndarray) -> float:
    """Return the share of the scored pixels that are predicted correctly; nan if none is scored."""
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")


def image_ious(matrices: np.ndarray) -> np.ndarray:
    """Return the IoUs (images, 19) of confusion matrices (images, 19, 19); nan if an image's label lacks the class."""
    return np.where(matrices.sum(2) > 0, [iou(matrix) for matrix in matrices], np.nan)


def image_mious(matrices: np.ndarray) -> np.ndarray:
    """Return the mIoU (images,) of each image over the classes in its label; nan if it has none."""
    # A class that is only predicted does not count: one stray pixel would weigh as much as a whole class.
    ious = image_ious(matrices)
    counts = (~np.isnan(ious)).sum(1)
    return np.divide(np.nansum(ious, 1), counts, out=np.full(len(ious), np.nan), where=counts > 0)


def percent(share: float) -> float | None:
    """Return a share in percent; None for nan."""
    return None if np.isnan(share) else 100 * float(share)


@dataclass(frozen=True)
class MiouIntervals:
    """The 95 % confidence intervals of one backend; None for an interval that is undefined."""

    miou: Interval | None  # percent
    drop: Interval | None  # percentage points below the baseline; None for the baseline itself and without one


def miou_intervals(matrices: Mapping[str, np.ndarray], baseline: str) -> dict[str, MiouIntervals]:
    """Return the 95 % confidence intervals of the mIoU, and of its drop against a baseline, for every backend.

    Images without a labelled pixel have no influence on the mIoU and are not drawn. Without at least two other images,
    all intervals are None.

    Args:
        matrices: Backend -> confusion matrices (images, 19, 19) of the same images, row = label, column = prediction.
        baseline: Backend that drops are measured against; all drops are None if `matrices` lacks it.
    """
    mious = {name: resampled_mious(counts) for name, counts in matrices.items()}
    intervals = {}
    for name, miou in mious.items():
        drop = difference_interval(mious[baseline], miou) if baseline in mious and name != baseline else None
        intervals[name] = MiouIntervals(_interval(miou), drop)
    return intervals


def resampled_mious(matrices: np.ndarray) -> np.ndarray:
    """Return the mIoU of each resample in percent, (RESAMPLES,) float64; empty with fewer than two labelled images.

    The resamples draw the same images for every backend and for every model that is scored on the same images.

    Args:
        matrices: Confusion matrices (images, 19, 19), row = label, column = prediction.
    """
    labelled = matrices.sum((1, 2)) > 0
    if labelled.sum() < 2:
        return np.empty(0)
    return _mean_ious(resampling_weights(int(labelled.sum())), matrices[labelled])


def difference_interval(first: np.ndarray, second: np.ndarray) -> Interval | None:
    """Return the paired 95 % interval of `first` - `second` in percentage points; None if there are no resamples.

    Args:
        first: `resampled_mious` of one backend or model.
        second: `resampled_mious` of another one on the same images.
    """
    return _interval(first - second)


def resampling_weights(images: int) -> np.ndarray:
    """Return how often each resample draws each image, (RESAMPLES, images) float64; always the same numbers."""
    draws = np.random.default_rng(SEED).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    return draws.astype(np.float64)  # so that matrix products use BLAS; the counts of pixels stay exact


def _mean_ious(weights: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Return the mIoU in percent of each resample, as `mean_iou` defines it, (RESAMPLES,) float64."""
    hits = matrices.diagonal(axis1=1, axis2=2)
    unions = weights @ (matrices.sum(1) + matrices.sum(2) - hits)
    ious = np.divide(weights @ hits, unions, out=np.zeros_like(unions), where=unions > 0)
    return 100 * ious.sum(1) / (unions > 0).sum(1)


def _interval(values: np.ndarray) -> Interval | None:
    if not values.size:
        return None
    lower, upper = np.quantile(values, LIMITS)
    return float(lower), float(upper)

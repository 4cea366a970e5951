"""Confusion matrices, IoU and accuracy, and their confidence intervals by a delete-one jackknife over images.

The mIoU is that of the official Cityscapes script: the mean over the classes that occur in labels or predictions. A
change between two backends or models is the difference of their means over the classes that have labelled pixels, which
are the same classes for both.

Source of the jackknife: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11; the interval
takes Student's t, as proposed by J. W. Tukey, Bias and confidence in not-quite large samples, 1958.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
LEAST_IMAGES = 4  # images without which there is no interval
FEW_IMAGES = 5  # the IoU of a class with fewer images is marked

Interval = tuple[float, float]  # lower and upper limit


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return counts (classes, classes) int64 of uint8 train ids, row = label, column = prediction.

    Labels that are no class do not count.
    """
    codes = labels.astype(np.uint16) * np.uint16(classes) + predictions
    counts = np.bincount(codes.ravel(), minlength=256 * classes)
    return counts.reshape(256, classes)[:classes].astype(np.int64)


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
    """Return the IoUs (images, classes) of confusion matrices; nan if an image's label lacks the class."""
    return np.where(matrices.sum(2) > 0, [iou(matrix) for matrix in matrices], np.nan)


def image_mious(matrices: np.ndarray) -> np.ndarray:
    """Return the mIoU (images,) of each image over the classes in its label; nan if it has none."""
    # A class that is only predicted does not count: one stray pixel would weigh as much as a whole class.
    ious = image_ious(matrices)
    counts = (~np.isnan(ious)).sum(1)
    return np.divide(np.nansum(ious, 1), counts, out=np.full(len(ious), np.nan), where=counts > 0)


def known(value: float) -> float | None:
    """Return a value; None for nan."""
    return None if np.isnan(value) else value


def percent(share: float) -> float | None:
    """Return a share in percent; None for nan."""
    return None if np.isnan(share) else 100 * float(share)


@dataclass(frozen=True)
class Estimate:
    """A statistic of all images, in percent, and the same without each one of them.

    The difference of two estimates on the same images is paired: what makes an image hard for both cancels.
    """

    value: float  # nan if it is undefined
    replicates: np.ndarray  # (labelled images,) float64; nan where it is undefined without an image
    images: int  # number of images that bear on the value

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return how far this statistic is above another one on the same images."""
        return Estimate(self.value - other.value, self.replicates - other.replicates, min(self.images, other.images))

    @property
    def standard_error(self) -> float:
        """The standard error; nan with fewer than LEAST_IMAGES images, or if the statistic is undefined."""
        replicates = self.replicates[~np.isnan(self.replicates)]
        if self.images < LEAST_IMAGES or np.isnan(self.value):
            return float("nan")
        return float(np.sqrt((1 - 1 / len(replicates)) * np.square(replicates - replicates.mean()).sum()))

    @property
    def interval(self) -> Interval | None:
        """The 95 % confidence interval; None if there is no standard error."""
        if np.isnan(self.standard_error):
            return None
        reach = float(stdtrit(self.images - 1, (1 + CONFIDENCE) / 2)) * self.standard_error
        return self.value - reach, self.value + reach

    @property
    def share_interval(self) -> Interval | None:
        """The interval of a share, which lies between 0 and 100 percent."""
        limits = self.interval
        return limits and (max(0.0, limits[0]), min(100.0, limits[1]))


@dataclass(frozen=True)
class Statistics:
    """The estimates of one backend on some images."""

    miou: Estimate  # over the classes that occur in labels or predictions, as in the official script
    labelled_miou: Estimate  # over the classes that have labelled pixels; changes are differences of this one
    ious: tuple[Estimate, ...]  # by class


def statistics(matrices: np.ndarray) -> Statistics:
    """Return the estimates of confusion matrices (images, classes, classes), row = label, column = prediction.

    Images without a labelled pixel have no influence and do not count. Where leaving an image out removes a class, the
    mean without it is that over the remaining classes.
    """
    matrices = matrices[matrices.sum((1, 2)) > 0]
    hits, labelled, predicted = matrices.diagonal(axis1=1, axis2=2), matrices.sum(2), matrices.sum(1)
    counts = np.stack((hits, labelled, labelled + predicted - hits))  # (3, images, classes)
    total = counts.sum(1)
    rows = np.concatenate((total[:, None], total[:, None] - counts), 1)  # all images, then all but one
    ious = np.divide(100.0 * rows[0], rows[2], out=np.full(rows[2].shape, np.nan), where=rows[2] > 0)
    images = (labelled > 0).sum(0)
    return Statistics(
        _estimate(_mean(ious, rows[2] > 0), len(matrices)),
        _estimate(_mean(ious, rows[1] > 0), len(matrices)),
        tuple(_estimate(values, int(number)) for values, number in zip(ious.T, images, strict=True)),
    )


def _mean(ious: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the mean of the classes that are present in each row; nan for a row without any."""
    counts = present.sum(1)
    return np.divide(np.where(present, ious, 0).sum(1), counts, out=np.full(len(ious), np.nan), where=counts > 0)


def _estimate(values: np.ndarray, images: int) -> Estimate:
    return Estimate(float(values[0]), values[1:], images)


def changed_cells(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return for which cells (classes, classes) the interval of the change excludes zero.

    Both are confusion matrices (images, classes, classes) of the same images, whose labels are the same.
    """
    change = after - before
    if len(change) < LEAST_IMAGES:
        return np.zeros(change.shape[1:], bool)
    standard_error = change.std(0, ddof=1) / np.sqrt(len(change))
    return np.abs(change.mean(0)) > stdtrit(len(change) - 1, (1 + CONFIDENCE) / 2) * standard_error

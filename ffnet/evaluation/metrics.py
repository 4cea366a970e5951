"""Confusion matrices, IoU and accuracy."""

import numpy as np

from ffnet.labels import NUM_CLASSES


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

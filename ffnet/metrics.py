"""Confusion matrix and IoU: pure functions on numpy arrays."""

import numpy as np

from ffnet.variants import NUM_CLASSES


def confusion_matrix(labels, predictions):
    """Counts (19, 19) int64, row = label, column = prediction.

    `labels`, `predictions`: uint8 train ids of one shape; predictions are below 19, labels from 19 on (255) left out.
    """
    codes = labels.astype(np.uint16) * np.uint16(NUM_CLASSES) + predictions
    counts = np.bincount(codes.ravel(), minlength=256 * NUM_CLASSES)
    return counts.reshape(256, NUM_CLASSES)[:NUM_CLASSES].astype(np.int64)


def iou(matrix):
    """IoU = TP / (TP + FP + FN) a class, float64; nan for a class in neither labels nor predictions."""
    hits = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(matrix):
    """Mean of the IoUs of the classes that occur, float64; nan where none does."""
    present = iou(matrix)
    present = present[~np.isnan(present)]
    return float(present.mean()) if present.size else float("nan")


def pixel_accuracy(matrix):
    """Share of the scored pixels that are right; nan where none is scored."""
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")

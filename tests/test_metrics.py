"""IoU by hand on the smallest case, and against the official Cityscapes evaluation on the same predictions."""

import json
import subprocess
import sys

import numpy as np
import pytest
from skimage.io import imread, imsave

from datasets.cityscapes import CLASSES, LABEL_IDS, TRAIN_IDS
from ffnet import metrics

NUM_CLASSES = 19


def test_matrix_worked_by_hand():
    labels = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    predictions = np.array([[0, 1, 1], [1, 3, 0]], np.uint8)
    matrix = metrics.confusion_matrix(labels, predictions)

    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 0] = 1, 1, 2, 1
    assert matrix.dtype == np.int64 and np.array_equal(matrix, expected)
    # Class 0: 1 hit, 1 missed, 1 too many. Class 1: 2 hits, 1 too many. Class 2: missed. Class 3: on void only.
    assert metrics.iou(matrix)[:3].tolist() == [1 / 3, 2 / 3, 0]
    assert np.isnan(metrics.iou(matrix)[3:]).all()
    assert metrics.mean_iou(matrix) == pytest.approx(1 / 3, abs=1e-15)
    assert metrics.pixel_accuracy(matrix) == 3 / 5


def test_nothing_scored_is_nan():
    empty = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    assert np.isnan(metrics.mean_iou(empty)) and np.isnan(metrics.pixel_accuracy(empty))


def test_official_evaluation_gives_the_same_figures(tree):
    """Two classes are absent from labels and predictions, one from the labels alone."""
    rng = np.random.default_rng(0)
    results = tree / "results"
    results.mkdir()
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for path in (tree / "gtFine" / "val").glob("*/*_gtFine_labelIds.png"):
        labels = imread(path)
        labels[np.isin(labels, LABEL_IDS[[3, 14, 16]])] = 0
        imsave(path, labels, check_contrast=False)
        truth = TRAIN_IDS[labels]
        guess = rng.integers(0, NUM_CLASSES, labels.shape)
        guess[np.isin(guess, [3, 14])] = 0
        predictions = np.where((rng.random(labels.shape) < 0.7) & (truth < NUM_CLASSES), truth, guess).astype(np.uint8)
        imsave(results / path.name.replace("_gtFine_labelIds", "_pred"), LABEL_IDS[predictions], check_contrast=False)
        total += metrics.confusion_matrix(truth, predictions)

    official = official_evaluation(tree, results)
    ours = dict(zip(CLASSES, metrics.iou(total), strict=True))
    assert np.isnan([ours["wall"], ours["truck"]]).all() and ours["train"] == 0
    for name, value in ours.items():
        assert np.isclose(value, official["classScores"][name], atol=1e-14, rtol=0, equal_nan=True), name
    assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)


def official_evaluation(root, results):
    """What `csEvalPixelLevelSemanticLabeling` writes, run as its users run it."""
    output = results / "official.json"
    script = (
        "import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official;"
        f"official.args.exportFile = {str(output)!r}; official.args.evalInstLevelScore = False; official.main()"
    )
    environment = {"CITYSCAPES_DATASET": str(root), "CITYSCAPES_RESULTS": str(results), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    return json.loads(output.read_text().replace("NaN", "null"), object_hook=_nan_for_null)


def _nan_for_null(entry):
    return {key: float("nan") if value is None else value for key, value in entry.items()}

"""The PNG files of predictions, scored by the official Cityscapes evaluation."""

import numpy as np
import pytest

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation import metrics
from ffnet.evaluation.scores import FP32, INT8_SIMULATED, short_name
from ffnet.run.predictions import prediction_file, prediction_writer, predictions_megabytes
from tests.helpers.official_evaluation import official_evaluation


def test_the_official_evaluation_gives_the_same_miou(tree):
    images = CityscapesSplit(tree, "val")
    rng = np.random.default_rng(0)
    total = np.zeros((19, 19), np.int64)
    write = prediction_writer(tree / "predictions", images.names, INT8_SIMULATED)
    for index, (_, labels) in enumerate(images):
        truth = labels.numpy()
        guess = rng.integers(0, 19, truth.shape).astype(np.uint8)
        predicted = np.where((rng.random(truth.shape) < 0.6) & (truth < 19), truth, guess)
        total += metrics.confusion_matrix(truth, predicted)
        write(index, {FP32: truth, INT8_SIMULATED: predicted})
    folder = tree / "predictions" / short_name(INT8_SIMULATED)
    expected = {prediction_file(tree / "predictions", name, INT8_SIMULATED) for name in images.names}
    assert {path for path in (tree / "predictions").rglob("*") if path.is_file()} == expected
    official = official_evaluation(tree, folder)
    assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)


def test_the_space_that_predictions_take_is_bounded():
    assert predictions_megabytes(4, (64, 128)) == pytest.approx(4 * 64 * 128 / 8 / 1e6)

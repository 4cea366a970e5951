"""The PNG files of predictions, scored by the official Cityscapes evaluation."""

import numpy as np
import pytest

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation import metrics
from ffnet.evaluation.scores import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, short_name
from ffnet.run.predictions import missing_predictions, prediction_writer, predictions_megabytes
from tests.helpers.official_evaluation import official_evaluation


def test_the_official_evaluation_gives_the_same_miou_for_every_backend(tree):
    images = CityscapesSplit(tree, "val")
    rng = np.random.default_rng(0)
    totals = {INT8_SIMULATED: 0, INT8_ONNX_RUNTIME: 0}
    write = prediction_writer(tree / "predictions", images.names, totals)
    for index, (_, labels) in enumerate(images):
        truth = labels.numpy()
        predictions = {FP32: truth}
        for name in totals:
            guess = rng.integers(0, 19, truth.shape).astype(np.uint8)
            predictions[name] = np.where((rng.random(truth.shape) < 0.6) & (truth < 19), truth, guess)
            totals[name] = totals[name] + metrics.confusion_matrix(truth, predictions[name])
        write(index, predictions)
    for name, total in totals.items():
        folder = tree / "predictions" / short_name(name)
        assert len(list(folder.iterdir())) == len(images)
        official = official_evaluation(tree, folder)
        assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)
    assert {path.name for path in (tree / "predictions").iterdir()} == {"INT8_simulated", "INT8_ONNX_Runtime"}

    next((tree / "predictions" / "INT8_simulated").glob(f"{images.names[2]}*")).unlink()
    assert missing_predictions(tree / "predictions", images.names, totals, [0, 2, 3]) == [2]


def test_the_space_that_predictions_take_is_bounded():
    assert predictions_megabytes(4, (64, 128), (INT8_SIMULATED, FP32)) == pytest.approx(2 * 4 * 64 * 128 / 8 / 1e6)

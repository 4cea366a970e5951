"""The PNG files of predictions, scored by the official Cityscapes evaluation."""

import numpy as np
import pytest

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation import metrics
from ffnet.evaluation.scores import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, short_name
from ffnet.run.storage import prediction_writer, predictions_megabytes
from tests.helpers.official_evaluation import official_evaluation


def test_the_official_evaluation_gives_the_same_miou_for_every_backend(tree):
    images = CityscapesSplit(tree, "val")
    rng = np.random.default_rng(0)
    totals = {INT8_SIMULATED: 0, INT8_ONNX_RUNTIME: 0}
    write = prediction_writer(tree / "predictions", images.images, totals)
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
    assert not (tree / "predictions" / FP32).exists()


def test_each_backend_has_a_folder_without_spaces_in_its_name(tmp_path):
    prediction_writer(tmp_path, [], [INT8_SIMULATED])
    assert [path.name for path in tmp_path.iterdir()] == ["INT8_simulated"]


def test_a_missing_backend_is_an_error(tmp_path):
    write = prediction_writer(tmp_path, ["zurich_000000_000019_leftImg8bit.png"], [INT8_SIMULATED])
    with pytest.raises(KeyError):
        write(0, {FP32: np.zeros((4, 4), np.uint8)})


def test_the_space_that_predictions_take_is_bounded(tree):
    images = CityscapesSplit(tree, "val")
    assert predictions_megabytes(images, (INT8_SIMULATED, FP32)) == pytest.approx(2 * 4 * 64 * 128 / 8 / 1e6)

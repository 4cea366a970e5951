"""The PNGs of predictions, scored by the official Cityscapes evaluation."""

import numpy as np
import pytest

from datasets.cityscapes import CityscapesSplit
from ffnet import metrics
from ffnet.predictions import megabytes, pass_folder, prediction_writer
from tests.test_metrics import official_evaluation


def test_official_evaluation_gives_the_same_miou_of_every_pass(tree):
    images = CityscapesSplit(tree, "val")
    rng = np.random.default_rng(0)
    totals = {"INT8": 0, "INT8 executed": 0}
    write = prediction_writer(tree / "predictions", images.images, tuple(totals))
    for index, (_, labels) in enumerate(images):
        truth = labels.numpy()
        predictions = {"FP32": truth}
        for name in totals:
            guess = rng.integers(0, 19, truth.shape).astype(np.uint8)
            predictions[name] = np.where((rng.random(truth.shape) < 0.6) & (truth < 19), truth, guess)
            totals[name] = totals[name] + metrics.confusion_matrix(truth, predictions[name])
        write(index, predictions)
    for name, total in totals.items():
        folder = pass_folder(tree / "predictions", name)
        assert len(list(folder.iterdir())) == len(images)
        official = official_evaluation(tree, folder)
        assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)
    assert not pass_folder(tree / "predictions", "FP32").exists()


def test_a_missing_pass_is_an_error(tmp_path):
    write = prediction_writer(tmp_path, ["zurich_000000_000019_leftImg8bit.png"])
    with pytest.raises(KeyError):
        write(0, {"FP32": np.zeros((4, 4), np.uint8)})


def test_space_that_predictions_take_is_bounded(tree):
    images = CityscapesSplit(tree, "val")
    assert megabytes(images, ("INT8", "FP32")) == pytest.approx(2 * 4 * 64 * 128 / 8 / 1e6)

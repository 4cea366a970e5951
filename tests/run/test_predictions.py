"""The PNG files of predictions, scored by the official Cityscapes evaluation."""

import numpy as np
import pytest

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config, ModelConfig
from ffnet.evaluation import metrics
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.run.predictions import prediction_writer, predictions_folder
from tests.helpers.official_evaluation import official_evaluation


def test_the_official_evaluation_gives_the_same_miou(tree):
    images = CityscapesSplit(tree, "val")
    rng = np.random.default_rng(0)
    folder, total = tree / "predictions" / "simulated", 0
    write = prediction_writer(folder, images, SIMULATED)
    for index, (_, labels) in enumerate(images):
        truth = labels.numpy()
        guess = rng.integers(0, 19, truth.shape).astype(np.uint8)
        predicted = np.where((rng.random(truth.shape) < 0.6) & (truth < 19), truth, guess)
        total = total + metrics.confusion_matrix(truth, predicted, 19)
        write(index, {FP32: truth, SIMULATED: predicted})
    assert len(list(folder.iterdir())) == len(images)
    official = official_evaluation(tree, folder)
    assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)


def test_the_folder_is_that_of_the_backend_that_is_saved(tmp_path):
    configs = Config(), Config(ModelConfig(onnx=tmp_path / "a.onnx"))
    assert [predictions_folder(tmp_path, config).name for config in configs] == ["simulated", "ONNX_file"]

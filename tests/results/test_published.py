"""Which published values stand beside a run's, against the table of the AIMET model zoo's model card."""

from pathlib import Path

import pytest

from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config, DataConfig, ModelConfig, QuantizationConfig
from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.results.published import Comparison
from ffnet.results.result import Calibration
from ffnet.run.pipeline import published_results

MODEL = "segmentation_ffnet40S_dBBB_mobile"  # published: 79.2 in FP32, 78.9 in INT8
WITHOUT_INT8 = "segmentation_ffnet46NS_CCC_mobile"  # published: 76.7 in FP32


class Images:
    """As much of a CityscapesSplit as is compared."""

    def __init__(self, number, size):
        self.number, (self.height, self.width) = number, size

    def __len__(self):
        return self.number


def comparison(number=500, size=(1024, 2048), calibrated=500, model=MODEL, equalized=False, data=None, **quantization):
    """What is shown beside a run that differs from the published ones in the arguments alone."""
    config = Config(ModelConfig((model,)), DataConfig(**data or {}), QuantizationConfig(**quantization))
    checkpoint = Checkpoint(None, "state_dict", equalized, "0" * 64, Path("a.pth"))
    return published_results(config, Images(number, size), checkpoint, Calibration(calibrated, ""))


def test_published_values_stand_beside_a_run_that_was_measured_alike():
    assert comparison() == Comparison({FP32: 79.2, INT8_SIMULATED: 78.9})
    assert comparison(cle=False, equalized=True) == Comparison({FP32: 79.2, INT8_SIMULATED: 78.9})
    assert comparison(model=WITHOUT_INT8) == Comparison({FP32: 76.7})


@pytest.mark.parametrize(
    ("changes", "difference"),
    (
        ({"number": 4}, "4 images"),
        ({"size": (512, 1024)}, "an image size of 512x1024"),
        ({"data": {"split": "train"}}, "the train split"),
    ),
)
def test_no_published_value_stands_beside_a_run_on_other_images(changes, difference):
    found = comparison(**changes)
    assert found.mious == {}
    assert found.notes == [
        "Published mIoU of this model: 79.2 % in FP32 and 78.9 % in INT8 simulated, on all 500 images of Cityscapes "
        f"val. Not comparable with this run, which has {difference}."
    ]


@pytest.mark.parametrize(
    ("changes", "difference"),
    (
        ({"param_bw": 4}, "4-bit weights"),
        ({"output_bw": 16}, "16-bit activations"),
        ({"quant_scheme": "tf"}, "the quantization scheme tf"),
        ({"config_file": "/c/aimet.json"}, "the quantization configuration /c/aimet.json"),
        ({"cle": False}, "no cross-layer equalization"),
        ({"encodings": Path("a.encodings"), "calibrated": 0}, "the encodings of a file"),
        ({"max_drop": 0.5}, "accuracy recovery"),
        ({"seq_mse": True}, "accuracy recovery"),
        ({"adaround": 500}, "accuracy recovery"),
        ({"calibrated": 100}, "100 calibration images of the val split"),
        ({"data": {"calibration_split": "train"}}, "500 calibration images of the train split"),
    ),
)
def test_only_the_fp32_value_stands_beside_a_run_with_another_quantization(changes, difference):
    found = comparison(**changes)
    assert found.mious == {FP32: 79.2}
    assert found.notes == [
        "Published mIoU of this model: 78.9 % in INT8 simulated, on all 500 images of Cityscapes val. "
        f"Not comparable with this run, which has {difference}."
    ]


def test_all_differences_are_named():
    (note,) = comparison(number=1, size=(64, 128), calibrated=1, param_bw=4).notes
    assert note.endswith(
        "which has 1 image, an image size of 64x128, 4-bit weights and 1 calibration image of the val split."
    )


def test_differences_in_quantization_do_not_matter_to_a_model_without_published_int8():
    assert comparison(model=WITHOUT_INT8, param_bw=4) == Comparison({FP32: 76.7})
    (note,) = comparison(model=WITHOUT_INT8, number=4, param_bw=4).notes
    assert note.endswith("model: 76.7 % in FP32, on all 500 images of Cityscapes val. Not comparable with this run, "
                         "which has 4 images.")  # fmt: skip


def test_nothing_is_published_for_the_demo():
    assert comparison(number=24, data={"demo": True}) == Comparison()

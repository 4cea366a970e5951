"""Which published values stand beside a run's, against the AIMET model zoo's model card and AI Hub's pages."""

import subprocess
import sys
from pathlib import Path

import pytest

from ffnet.config import Config, DataConfig, ModelConfig, NpuConfig, QuantizationConfig
from ffnet.evaluation.scores import FP32
from ffnet.results import published
from ffnet.results.published import CalibrationSetup, Comparison, DeviceResult, ImageSetup, ai_hub_result
from ffnet.variants import INPUT_SIZE
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.results import ZOO

MODEL = "segmentation_ffnet40S_dBBB_mobile"  # published: 79.2 in FP32, 78.9 in INT8
WITHOUT_INT8 = "segmentation_ffnet46NS_CCC_mobile"  # published: 76.7 in FP32


def comparison(
    number=500, size=INPUT_SIZE, calibrated=500, batch=8, model=MODEL, equalized=False, data=None, **quantization
):
    """What is shown beside a run that differs from the published ones in the arguments alone."""
    config = Config(ModelConfig((model,)), DataConfig(**data or {}), QuantizationConfig(**quantization))
    images = ImageSetup(config.data.split, number, size)
    return published.compare_with_variant(config, images, calibration_of(config, calibrated, batch), equalized)


def calibration_of(config, images, batch):
    return CalibrationSetup(images, config.data.calibration_split, batch) if images else None


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
        ({"batch": 4}, "calibration batches of 4 images"),
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


def ai_hub_comparison(
    images=50, size=INPUT_SIZE, model=MODEL, chip="sm8750", data=None, available=500, calibrated=100, **quantization
):
    data = DataConfig(**{"calibration_split": "train"} | (data or {}))
    config = Config(ModelConfig((model,)), data, QuantizationConfig(**quantization), NpuConfig((chip,)))
    calibration = calibration_of(config, calibrated, batch=4)  # AI Hub does not say its own
    return published.compare_with_ai_hub(config, (chip,), ImageSetup(data.split, images, size), available, calibration)


def test_ai_hubs_miou_stands_beside_a_run_that_was_measured_in_the_same_way():
    assert ai_hub_comparison() == Comparison({FP32: 76.8, INT8_NPU: 76.6})
    assert ai_hub_comparison(model="segmentation_ffnet78S_BCC_mobile", size=(512, 1024)) == Comparison(
        {FP32: 77.3, INT8_NPU: 77.4}
    )
    assert ai_hub_comparison(chip="sm8650") == Comparison()  # AI Hub published no mIoU for this chip


@pytest.mark.parametrize(
    ("changes", "difference"),
    (
        ({"images": 4}, "4 images"),
        ({"data": {"split": "train"}}, "the train split"),
        ({"size": (512, 1024)}, "an image size of 512x1024"),
        ({"model": "segmentation_ffnet78S_BCC_mobile"}, "an image size of 1024x2048"),
        ({"available": 100}, "images chosen from 100"),
    ),
)
def test_ai_hubs_miou_is_in_a_note_if_other_images_were_scored(changes, difference):
    found = ai_hub_comparison(**changes)
    (note,) = found.notes
    assert found.mious == {} and note.endswith(f"Not comparable with this run, which has {difference}.")
    assert "% in FP32 and " in note and "on a Samsung Galaxy S25 by ONNX: " in note


@pytest.mark.parametrize(
    ("changes", "difference"),
    (
        ({"output_bw": 16}, "16-bit activations"),
        ({"calibrated": 50}, "50 calibration images of the train split"),
        ({"data": {"calibration_split": "val"}}, "100 calibration images of the val split"),
    ),
)
def test_ai_hubs_int8_miou_is_in_a_note_if_the_quantization_differs(changes, difference):
    found = ai_hub_comparison(**changes)
    assert found.mious == {FP32: 76.8}
    assert found.notes == [
        "Qualcomm AI Hub Models 0.65.0: mIoU of this model on a Samsung Galaxy S25 by ONNX: 76.6 % in INT8 NPU, on 50 "
        "images of 1024x2048 pixels, calibrated on 100 images of train. Not comparable with this run, which has "
        f"{difference}."
    ]


def test_ai_hubs_latency_is_in_a_note():
    (note,) = published.ai_hub_notes(Config(model=ModelConfig((MODEL,)), npu=NpuConfig(("sm8750",))))
    assert "W8A8 at 1024x2048, on a Samsung Galaxy S25 by TFLite/DLC/ONNX: 4.0/7.2/4.9 ms" in note
    assert note.endswith("The mIoU changed there by -0.2 percentage points, W8A8 by ONNX against float.")
    (note,) = published.ai_hub_notes(Config(model=ModelConfig((MODEL,)), npu=NpuConfig(("sm8650",))))
    assert "on a Samsung Galaxy S24" in note and "changed" not in note
    for chips in (("sa8540",), ("sm8750", "sm8650")):
        assert published.ai_hub_notes(Config(model=ModelConfig((MODEL,)), npu=NpuConfig(chips))) == []


def test_ai_hubs_table_has_the_published_models():
    """The values are those of AI Hub's pages for release 0.65.0."""
    sizes = {name: ai_hub_result(name).input_size for name in ZOO}
    assert list(sizes.values()) == [INPUT_SIZE, INPUT_SIZE, INPUT_SIZE, (512, 1024), (512, 1024)]
    assert [ai_hub_result(name).float_miou for name in ZOO] == [76.8, 78.1, 79.9, 77.3, 76.2]
    assert [ai_hub_result(name).w8a8_miou["tflite"] for name in ZOO] == [76.6, 78.0, 79.9, 77.3, 76.2]
    assert all(list(ai_hub_result(name).w8a8_miou) == list(published.RUNTIMES) for name in ZOO)
    assert ai_hub_result("segmentation_ffnet78S_BCC_mobile_pre_down") is None


@pytest.mark.parametrize(
    ("chip", "device", "latency", "fastest"),
    (
        ("sm8750", "Samsung Galaxy S25", "4.0/7.2/4.9", 3.986),
        ("sm8850", "Samsung Galaxy S26", "3.0/5.4/3.6", 3.05),
        ("sc8380xp", "Snapdragon X Elite CRD", "-/16.1/10.6", 10.604),
        ("qcs9100", "Dragonwing IQ-9075 EVK", "8.1/16.2/11.6", 8.074),
        ("sa8255", "SA8775P ADP", "8.3/-/-", 8.273),
        ("sa8540", "Samsung Galaxy S25", "4.0/7.2/4.9", 3.986),
        (None, "Samsung Galaxy S25", "4.0/7.2/4.9", 3.986),
    ),
)
def test_the_latency_is_that_on_a_measured_chip_or_on_the_galaxy_s25(chip, device, latency, fastest):
    result = ai_hub_result(MODEL, chip)
    assert (result.device, result.describe_latency(), result.fastest) == (device, latency, fastest)


def test_a_device_without_a_latency_of_this_model_does_not_count():
    """AI Hub measured FFNet-122NS-LowRes on the SA8255P, but not on the SA8775P, whose chip is the same."""
    assert ai_hub_result("segmentation_ffnet122NS_CCC_mobile", "sa8255").device == "SA8255P ADP"


def test_no_runtime_is_the_fastest_if_none_was_published():
    assert DeviceResult("device", (1, 1), 50, 80.0, {}, {}).fastest is None


def test_published_values_need_no_torch():
    code = "import sys, ffnet.results.published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

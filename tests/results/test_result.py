"""The result's metrics, worked by hand, and its JSON form."""

import json

import numpy as np
import pytest

from ffnet.evaluation.scores import FP32, INT8_SIMULATED, ONNX_FILE
from ffnet.results import result
from ffnet.results.result import Result
from tests.helpers.results import PAIR, small_npu, small_recovery, small_result, small_scores


def test_metrics_are_percentages():
    entry = result.backend_results(small_scores())[INT8_SIMULATED]
    assert entry.iou["road"] == 100 * (7 / 8) and entry.iou["sidewalk"] == 100 * (4 / 5)
    assert entry.iou["sky"] is None
    assert entry.miou == 100 * (7 / 8 + 4 / 5) / 2
    assert entry.images_per_second == 2 and entry.pixel_accuracy == 100 * (11 / 12)
    assert result.agreement(small_scores()) == {"FP32|INT8 simulated": 100 * (15 / 16)}


def test_the_confidence_intervals_span_the_resamples_of_the_two_images():
    """A quarter of the resamples draw the wrong image alone, a quarter the right one alone."""
    found = result.backend_results(small_scores())
    assert found[FP32].miou_interval == (100, 100) and found[FP32].drop_interval is None
    lowest = 100 * (3 / 4 + 2 / 3) / 2
    assert found[INT8_SIMULATED].miou_interval == pytest.approx((lowest, 100))
    assert found[INT8_SIMULATED].drop_interval == pytest.approx((0, 100 - lowest))


def test_metrics_are_none_if_no_pixel_is_labelled():
    nothing = small_scores(confusion_matrices=dict.fromkeys(PAIR, np.zeros((2, 19, 19), np.int64)))
    entry = result.backend_results(nothing)[FP32]
    assert entry.miou is None and entry.pixel_accuracy is None and set(entry.iou.values()) == {None}
    assert entry.miou_interval is None
    assert result.miou_drops(small_result(nothing).backends)[INT8_SIMULATED] is None


@pytest.mark.parametrize(
    ("mious", "backend", "drop"),
    (
        ({FP32: 80.0, INT8_SIMULATED: 78.5}, INT8_SIMULATED, 1.5),
        ({FP32: 80.0, INT8_SIMULATED: 81.0}, INT8_SIMULATED, -1.0),
        ({FP32: 80.0, INT8_SIMULATED: None}, INT8_SIMULATED, None),
        ({FP32: None, INT8_SIMULATED: 80.0}, INT8_SIMULATED, None),
        ({FP32: 80.0}, FP32, None),
        ({FP32: 80.0}, INT8_SIMULATED, None),
        ({ONNX_FILE: 80.0}, ONNX_FILE, None),
    ),
)
def test_the_miou_drop_is_none_if_there_is_nothing_to_compare(mious, backend, drop):
    assert result.miou_drop(mious, backend) == drop


def test_the_iou_change_is_the_difference_to_another_backend():
    fp32, int8 = small_result().backends.values()
    assert int8.iou_change(fp32, "road") == pytest.approx(-12.5) and fp32.iou_change(fp32, "road") == 0
    assert int8.iou_change(fp32, "sky") is None and small_result().base == fp32


def test_json_holds_every_field_but_the_details():
    content = json.loads(json.dumps(small_result().to_json()))
    assert list(content) == [
        "model", "dataset", "images", "device", "notes", "published", "checkpoint", "calibration", "recovery",
        "backends", "agreement", "npu", "stage_seconds", "options", "command", "versions",
    ]  # fmt: skip
    assert content["checkpoint"] == {"path": "/weights/a.pth", "sha256": "0" * 64, "form": "state_dict"}
    assert content["calibration"]["images"] == 2
    assert content["backends"][FP32]["miou_interval"] == [100, 100]
    matrix = content["backends"][INT8_SIMULATED]["confusion_matrix"]
    assert matrix == small_scores().total(INT8_SIMULATED).tolist()


def test_json_holds_accuracy_recovery_with_its_steps_and_raised_quantizers():
    assert json.loads(json.dumps(small_result().to_json()))["recovery"] is None
    content = json.loads(json.dumps(small_result(recovery=small_recovery()).to_json()))["recovery"]
    assert list(content) == [
        "target", "fp32_miou", "steps", "chosen", "raised", "selection_images", "scored_too", "interrupted",
    ]  # fmt: skip
    assert content["steps"][0] == {
        "name": "plain",
        "miou": 78.0,
        "miou_interval": [70.0, 84.0],
        "drop": 2.0,
        "drop_interval": [1.0, 3.0],
        "bit_operations": 0.5,
        "weight_bytes": 0.5,
        "seconds": 10.0,
        "kept": True,
    }
    assert content["steps"][4]["miou_interval"] is None
    assert content["raised"][1] == {"layer": "relu", "tensor": "output", "bits": 16}


def test_the_npu_is_described_with_its_chip_images_and_nodes_on_the_cpu():
    assert small_npu().describe() == (
        "the NPU of sm8750 (Snapdragon 8 Elite), emulated by onnxruntime-qnn 2.7.0, ran 2 of 2 images. Nodes that ran "
        "on the CPU: none."
    )
    changed = small_npu(hardware=True, requested_images=50, cpu_nodes=["conv0", "softmax"])
    assert changed.describe() == (
        "this PC's NPU, driven by onnxruntime-qnn 2.7.0, ran 2 of 50 images, and then ended early. Nodes that "
        "ran on the CPU: conv0, softmax."
    )


def test_a_result_is_read_back_from_its_json():
    expected = small_result(recovery=small_recovery(), npu=small_npu())
    content = json.loads(json.dumps(expected.to_json()))
    found = Result.from_json(content, expected.details)
    assert found == expected and found.to_json() == expected.to_json()

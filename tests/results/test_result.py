"""The result's metrics, worked by hand, and its JSON form."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import torch

from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE, ONNX_RUNTIME, SIMULATED, BackendNames
from ffnet.labels import CITYSCAPES
from ffnet.results import result
from ffnet.results.result import Result
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.results import (
    PAIR,
    labels_and_predictions,
    scores_of,
    small_npu,
    small_recovery,
    small_result,
    small_scores,
)


def test_metrics_are_percentages():
    fp32, entry = small_result(small_scores()).backends.values()
    assert entry.iou["road"] == 100 * (7 / 8) and entry.iou["sidewalk"] == 100 * (4 / 5)
    assert entry.iou["sky"] is None
    assert entry.miou == entry.labelled_miou == 100 * (7 / 8 + 4 / 5) / 2
    assert entry.change == 100 * (7 / 8 + 4 / 5) / 2 - 100 and fp32.change is None
    assert entry.iou_change == pytest.approx({"road": -12.5, "sidewalk": -20}) and fp32.iou_change == {}
    assert entry.images_per_second == 2 and entry.pixel_accuracy == 100 * (11 / 12)
    assert small_result().agreement == {"FP32|INT8 simulated": 100 * (15 / 16)}


def test_every_interval_is_that_of_a_loop_that_leaves_out_each_image():
    """Of 12 images with few classes, the last one has no labelled pixel and 5 have a pole."""
    labels, predictions = labels_and_predictions(count=12)
    labels[6:11, :, :4] = predictions[FP32][6:11, :, :4] = 5
    for image in range(6, 11):
        predictions[SIMULATED][image, :image, :4] = 5
    found = small_result(scores_of(labels, predictions))
    fp32, entry = found.backends.values()
    assert found.classes["pole"] == result.ClassCount((153, 153, 153), 5, 5 * 16 * 4, few=False)

    def ious(images, name):
        truth, guess = labels[images], np.where(labels[images] == 255, 255, predictions[name][images])
        return np.array([
            100 * ((truth == c) & (guess == c)).sum() / max(1, ((truth == c) | (guess == c)).sum()) for c in range(19)
        ])  # fmt: skip

    def expected(statistic, images=11):
        without_one = [statistic([image for image in range(11) if image != left_out]) for left_out in range(11)]
        limits = scipy.stats.t.interval(0.95, images - 1, statistic(range(11)), np.sqrt(10 * np.var(without_one)))
        return pytest.approx(limits)

    present = [0, 1, 2, 5, 11, 13]
    assert fp32.miou_interval == expected(lambda images: ious(images, FP32).mean())
    assert entry.miou_interval == expected(lambda images: ious(images, SIMULATED).mean())
    assert entry.change_interval == expected(lambda i: (ious(i, SIMULATED) - ious(i, FP32))[present].mean())
    assert entry.iou_interval["pole"] == expected(lambda images: ious(images, SIMULATED)[5], 5)
    pole = expected(lambda images: ious(images, SIMULATED)[5] - ious(images, FP32)[5], 5)
    assert entry.iou_change_interval["pole"] == pole and fp32.change_interval is None
    assert list(entry.iou_change) == list(entry.iou_change_interval) == [CITYSCAPES.names[index] for index in present]


def test_metrics_are_none_if_no_pixel_is_labelled():
    nothing = small_scores(confusion_matrices=dict.fromkeys(PAIR, np.zeros((2, 19, 19), np.int64)))
    fp32, entry = small_result(nothing).backends.values()
    assert fp32.miou is None and fp32.pixel_accuracy is None and set(fp32.iou.values()) == {None}
    assert fp32.miou_interval is entry.labelled_miou is entry.change is entry.change_interval is None


def test_the_names_of_quantized_backends_begin_with_the_precision():
    backends = FP32, SIMULATED, ONNX_RUNTIME, NPU, ONNX_FILE
    names = [[BackendNames(precision).of(each) for each in backends] for precision in ("W4A8 mixed", "")]
    assert names[0] == [FP32, "W4A8 mixed simulated", "W4A8 mixed ONNX Runtime", "W4A8 mixed NPU", ONNX_FILE]
    assert names[1] == [FP32, "simulated", "ONNX Runtime", "NPU", ONNX_FILE]


def test_the_change_of_published_values_is_none_if_there_is_nothing_to_compare():
    changes = [result.miou_change({FP32: 80.0, INT8_SIMULATED: miou}, INT8_SIMULATED) for miou in (78.5, 81.0, None)]
    assert changes == [-1.5, 1.0, None]
    for fp32, backend in ((None, INT8_SIMULATED), (80.0, FP32), (80.0, ONNX_FILE)):
        assert result.miou_change({FP32: fp32, INT8_SIMULATED: 80.0}, backend) is None


def test_json_holds_every_field_but_the_details():
    content = json.loads(json.dumps(small_result().to_json()))
    assert list(content) == [
        "schema", "model", "dataset", "images", "device", "notes", "published", "checkpoint", "calibration", "recovery",
        "precision", "label_set", "classes", "backends", "agreement", "npu", "other_npus",
        "npu_chips", "layers", "baseline", "compilation", "processor_share", "stage_seconds", "options", "command",
        "versions",
    ]  # fmt: skip
    assert (content["schema"], content["precision"]) == (4, "INT8")
    assert content["classes"]["road"] == {
        "color": [128, 64, 128],
        "images": 2,
        "labelled_pixels": 8,
        "few": True,
    }
    assert content["checkpoint"] == {"path": "/weights/a.pth", "sha256": "0" * 64, "form": "state_dict"}
    assert content["calibration"]["images"] == 2
    entry = content["backends"][INT8_SIMULATED]
    assert (entry["change"], entry["iou_change"]["road"], entry["change_interval"]) == (-16.25, -12.5, None)
    assert entry["confusion_matrix"] == small_scores().total(SIMULATED).tolist()


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
        "change": -2.0,
        "change_interval": [-3.0, -1.0],
        "bit_operations": 0.5,
        "weight_bytes": 0.5,
        "seconds": 10.0,
        "kept": True,
        "met": False,
    }
    assert content["steps"][4]["miou_interval"] is None
    assert content["raised"][1] == {"layer": "relu", "tensor": "output", "bits": 16}


def test_the_npu_is_described_with_its_chip_images_and_nodes_on_the_cpu():
    assert small_npu().describe() == (
        "Qualcomm's compiler and emulator (onnxruntime-qnn 2.7.0) for the NPU of sm8750 (Snapdragon 8 Elite) ran 2 of "
        "2 images. Nodes that ran on the CPU: none."
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


def test_a_class_that_is_only_predicted_has_a_note_with_the_means_over_the_labelled_classes():
    assert result.definition_notes(small_result().backends) == []
    matrices = {name: counts.copy() for name, counts in small_scores().confusion_matrices.items()}
    matrices[SIMULATED][0, 0, [0, 5]] = 2, 1  # one pixel as pole, which no label has
    entries = result.backend_results(small_scores(confusion_matrices=matrices), BackendNames(), CITYSCAPES.names)
    (note,) = result.definition_notes(entries)
    assert note.endswith("percent: FP32 100.00, INT8 simulated 77.50.")  # of 6/8 and 4/5
    assert entries[INT8_SIMULATED].miou == pytest.approx(100 * (6 / 8 + 4 / 5 + 0) / 3)


@pytest.mark.parametrize(("target", "change", "noted"), ((1.0, -1.5, True), (1.0, -1.0, False), (None, -9.0, False)))
def test_a_target_that_is_missed_on_the_scored_images_has_a_note(target, change, noted):
    entry = dataclasses.replace(small_result().base, change=change)
    notes = result.recovery_notes(small_recovery(target=target), entry)
    assert [note[:72] for note in notes] == noted * [
        "The mIoU drop on the scored images, 1.50 percentage points, exceeds --ma"
    ]


def test_the_speed_is_marked_if_other_processes_used_the_processor():
    """Wall time times threads is 1.5 seconds a thread."""
    threads = torch.get_num_threads()
    share = result.processor_share(small_scores(processor_seconds=0.75 * threads), "cpu")
    assert share == pytest.approx(0.5) and result.processor_share(small_scores(), "cuda:0") is None
    assert (
        small_result(processor_share=share)
        .describe_speed()
        .endswith("busy, so that the networks got 50 % of the processor time of their threads.")
    )
    assert "busy" not in small_result(processor_share=0.9).describe_speed()

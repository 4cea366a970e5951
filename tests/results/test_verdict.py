"""The verdict follows from the interval of the change, not from its point estimate."""

import dataclasses

import pytest

from ffnet.results.verdict import ClassLoss, format_range, verdict
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.results import small_npu, small_result

COMMAND = "python ffnet_quanteval.py --dataset-path '/a b' --limit 4 --output-dir out --resume --baseline old"
FEW = "2 images are too few to tell what INT8 costs"


def changed(result, backend, **changes):
    """`result` with changes to the metrics of one of its backends."""
    return dataclasses.replace(
        result, backends=result.backends | {backend: dataclasses.replace(result.backends[backend], **changes)}
    )


def judged(change, interval, **changes):
    result = small_result(command=COMMAND, published={}, **changes)
    return verdict(changed(result, INT8_SIMULATED, change=change, change_interval=interval))


@pytest.mark.parametrize(
    ("change", "interval", "answer"),
    [
        (-0.45, (-0.6, -0.3), "INT8 costs 0.3 to 0.6 percentage points of mIoU."),
        (-0.02, (-0.031, -0.012), "INT8 costs 0.01 to 0.03 percentage points of mIoU."),
        (0.4, (0.1, 0.7), "INT8 loses nothing: it gains 0.1 to 0.7 percentage points of mIoU."),
        (-0.1, (-0.25, 0.05), "INT8 has no measurable loss: at most 0.25 percentage points of mIoU."),
        (-0.6, (-2.5, 1.3), f"{FEW}: between a loss of 2.5 and a gain of 1.3 percentage points of mIoU."),
        (-6.25, None, f"{FEW}: here the mIoU changed by -6.25 percentage points."),
        (None, None, "What INT8 costs is unknown, because there is no mIoU in FP32 to compare with."),
    ],
)
def test_the_interval_decides(change, interval, answer):
    assert judged(change, interval).sentences == (answer,)


def test_the_numbers_stand_beside_the_answer():
    assert judged(-0.45, (-0.6, -0.3)).numbers == (
        "mIoU 100.00 % in FP32, 83.75 % in INT8 simulated; change -0.45 percentage points, 95 % CI [-0.60, -0.30]; "
        "2 images."
    )


def test_a_range_has_enough_decimals():
    assert [format_range(*limits) for limits in ((0.3, 0.6), (0.31, 0.34), (0.001, 0.002))] == [
        "0.3 to 0.6", "0.31 to 0.34", "0.001 to 0.002",
    ]  # fmt: skip


def test_a_file_alone_is_not_judged():
    result = small_result(precision="", checkpoint=None, calibration=None)
    found = verdict(dataclasses.replace(result, backends={"ONNX file": result.base}))
    assert found.sentences == ("The file has a mIoU of 100.0 %.",)
    assert not found.next_steps


def test_the_npu_and_the_published_latency_get_sentences():
    npu = changed(small_npu(), INT8_NPU, change=-0.2, change_interval=(-0.3, -0.1))
    _, on_npu, latency = verdict(small_result(npu=npu, size=(1024, 2048))).sentences
    assert on_npu == "INT8 on the emulated NPU of the sm8750 costs 0.1 to 0.3 percentage points of mIoU."
    assert latency.startswith("Qualcomm AI Hub measured a latency of ")
    assert "ms on a " in latency


def test_the_classes_that_lose_most_come_first():
    result = changed(
        small_result(),
        INT8_SIMULATED,
        iou_change={"road": -1.0, "car": -3.0, "sky": 0.5},
        iou_change_interval={"road": (-2.5, 0.5), "car": (-4.0, -2.0), "sky": None},
    )
    car, road = verdict(result).losses
    assert (car, car.is_certain) == (ClassLoss("car", -3.0, (-4.0, -2.0)), True)
    assert (road.name, road.is_certain) == ("road", False)


def test_next_steps_are_commands_that_fit_the_run():
    options = small_result().options | {"limit": 4}
    steps = judged(-0.6, (-2.5, 1.3), options=options).next_steps
    assert [step.command for step in steps] == [
        "python ffnet_quanteval.py --dataset-path '/a b' --output-dir out-all-images",
        "python ffnet_quanteval.py --dataset-path '/a b' --limit 4 --output-dir out-calibration-split "
        "--calibration-split train",
        "python ffnet_quanteval.py --dataset-path '/a b' --limit 4 --output-dir out-npu --npu",
    ]
    assert "--max-drop" in str(judged(-0.45, (-0.6, -0.3)).next_steps[0].command)

"""The charts as SVG."""

import re
import xml.etree.ElementTree as ET

import pytest

from ffnet.labels import CLASSES
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.charts import class_chart, npu_chart, recovery_chart, sensitivity_chart, spread
from tests.helpers.results import (
    labels_and_predictions,
    scores_of,
    small_layers,
    small_recovery,
    small_result,
    small_sensitivity,
    unlabelled_recovery,
)


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_class_chart_names_both_backends_and_the_classes_that_have_an_iou():
    result = small_result(scores_of(*labels_and_predictions()))
    shown = [label for label in CLASSES if None not in (entry.iou[label] for entry in result.backends.values())]
    for svg in (class_chart(result).light, class_chart(result).dark):
        labels = texts(svg)
        assert [label for label in labels if label in CLASSES] == shown
        assert "FP32" in labels and "INT8 simulated" in labels


def test_a_result_without_labelled_pixels_has_an_empty_class_chart():
    labels, predictions = labels_and_predictions()
    labels[:] = 255
    assert not set(texts(class_chart(small_result(scores_of(labels, predictions))).light)) & set(CLASSES)


def test_the_sensitivity_chart_names_both_kinds_of_quantizers():
    labels = texts(sensitivity_chart(small_sensitivity()).light)
    assert {"weight", "activation", "quantizers from input to output"} <= set(labels)


def test_the_npu_chart_shows_differences_in_total_and_of_the_layer_alone():
    labels = texts(npu_chart(small_layers()).light)
    assert {"from the image on", "layer alone, for the same input", "differing values, percent"} <= set(labels)


def test_the_recovery_chart_numbers_the_steps_and_names_the_target_in_both_panels():
    labels = texts(recovery_chart(small_recovery()).light)
    assert {"FP32", "target: FP32 − 1", "chosen", "kept", "not kept"} <= set(labels)
    assert {"bit operations, percent of W8A8", "weight bytes, percent of W8A8"} <= set(labels)
    assert [label for label in labels if label in ("1", "2", "3", "4", "5")] == ["1", "2", "3", "4", "5"] * 2


def test_steps_of_equal_cost_do_not_cover_one_another_in_the_recovery_chart():
    elements = ET.fromstring(recovery_chart(small_recovery()).light).iter("{http://www.w3.org/2000/svg}text")
    positions = [float(element.get("x")) for element in elements if element.text in ("1", "2", "3")]
    for first, second, third in (positions[:3], positions[3:]):
        assert second - first > 12 and third - second > 12  # points; the markers' diameter is 11.4


def test_the_recovery_chart_draws_only_what_is_known(recwarn):
    labels = texts(recovery_chart(unlabelled_recovery()).light)
    assert "bit operations, percent of W8A8" in labels and not {"1", "5", "FP32"} & set(labels)
    assert not [label for label in texts(recovery_chart(small_recovery(target=None)).light) if "target" in label]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("values", "moved"),
    (
        ([5, 1, 3], [5, 1, 3]),
        ([4, 4, 4], [3, 4, 5]),
        ([0, 4, 4], [0, 3.5, 4.5]),
        ([4, 4, 4.75, 9], [3.25, 4.25, 5.25, 9]),
        ([4.5, 4], [4.75, 3.75]),
        ([7], [7]),
        ([0, 0.5, 1.25, 1.25], [-0.75, 0.25, 1.25, 2.25]),
    ),
)
def test_values_are_spread_as_little_as_a_distance_of_one_needs(values, moved):
    """`moved` is worked by hand: neighbours that are too close keep their mean."""
    assert spread(values, 1) == pytest.approx(moved)


def test_quantizers_without_noise_are_left_out_of_the_chart(recwarn):
    exact = Sensitivity(small_sensitivity().rows[2:], None, 100.0, 1)
    assert sensitivity_chart(exact).light.count("<use") < sensitivity_chart(small_sensitivity()).light.count("<use")
    assert not recwarn.list


@pytest.mark.parametrize(
    "chart", (class_chart(small_result()), recovery_chart(small_recovery())), ids=("classes", "recovery")
)
def test_a_dark_chart_differs_from_the_light_one_in_every_color_and_nothing_else(chart):
    light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
    assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])


def test_the_same_result_gives_the_same_chart():
    assert class_chart(small_result()) == class_chart(small_result())

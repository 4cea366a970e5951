"""The charts as SVG."""

import re
import xml.etree.ElementTree as ET

from datasets.cityscapes import CLASSES
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.charts import class_chart, npu_chart, sensitivity_chart
from tests.helpers.results import labels_and_predictions, scores_of, small_layers, small_result, small_sensitivity


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


def test_quantizers_without_noise_are_left_out_of_the_chart(recwarn):
    exact = Sensitivity(small_sensitivity().rows[2:], None, 100.0, 1)
    assert sensitivity_chart(exact).light.count("<use") < sensitivity_chart(small_sensitivity()).light.count("<use")
    assert not recwarn.list


def test_a_dark_chart_differs_from_the_light_one_in_every_color_and_nothing_else():
    chart = class_chart(small_result())
    light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
    assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])


def test_the_same_result_gives_the_same_chart():
    assert class_chart(small_result()) == class_chart(small_result())

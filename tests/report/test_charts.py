"""The charts as SVG."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.charts import (
    NOT_ON_FRONT,
    ON_FRONT,
    front_chart,
    recovery_chart,
    sensitivity_chart,
    spread,
)
from ffnet.results.comparison import GMACS, LATENCY
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.results import (
    comparison_of,
    plain_model,
    small_recovery,
    small_sensitivity,
    unlabelled_recovery,
    zoo_comparison,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_sensitivity_chart_names_both_kinds_of_quantizers():
    labels = texts(sensitivity_chart(small_sensitivity()).light)
    assert {"weight", "activation", "quantizers from input to output"} <= set(labels)


def test_the_recovery_chart_numbers_the_steps_and_names_the_target_in_both_panels():
    labels = texts(recovery_chart(small_recovery()).light)
    assert {"FP32", "target: FP32 − 1", "chosen", "kept", "not kept"} <= set(labels)
    assert {"bit operations, percent of W8A8", "weight bytes, percent of W8A8"} <= set(labels)
    assert [label for label in labels if label in ("1", "2", "3", "4", "5")] == ["1", "2", "3", "4", "5"] * 2


def test_steps_of_equal_cost_do_not_cover_one_another_in_the_recovery_chart():
    elements = ET.fromstring(recovery_chart(small_recovery()).light).iter(f"{SVG}text")
    positions = [float(element.get("x")) for element in elements if element.text in ("1", "2", "3")]
    for first, second, third in (positions[:3], positions[3:]):
        assert second - first > 12 and third - second > 12  # points; the markers' diameter is 11.4


def test_the_recovery_chart_draws_only_what_is_known(recwarn):
    labels = texts(recovery_chart(unlabelled_recovery()).light)
    assert "bit operations, percent of W8A8" in labels and not {"1", "5", "FP32"} & set(labels)
    assert not [label for label in texts(recovery_chart(small_recovery(target=None)).light) if "target" in label]
    assert not recwarn.list


def test_costs_are_increased_only_as_far_as_markers_would_overlap():
    """By hand, for a distance of 0.06 * 100 percent."""
    assert spread([0, 100, 0, 3, 50]) == pytest.approx([0, 100, 6, 12, 50])
    assert spread([50, 50]) == pytest.approx([50, 50.24])  # a range of 4 is assumed
    assert spread([7]) == [7]


@pytest.fixture(scope="module")
def zoo():
    """Five models with random scores on the same images."""
    return zoo_comparison()


def test_the_front_chart_numbers_the_models_whose_cost_is_that_of_the_run(zoo):
    labels = texts(front_chart(zoo, zoo.front(GMACS)).light)
    assert {ON_FRONT, NOT_ON_FRONT, "GMACs", "mIoU, percent", "1", "2", "3", "4", "5"} <= set(labels)
    by_latency = texts(front_chart(zoo, zoo.front(LATENCY)).light)
    assert {ON_FRONT, "published latency, ms", "1", "2", "3"} <= set(by_latency)
    assert not {NOT_ON_FRONT, "4", "5"} & set(by_latency)


def test_the_pareto_front_is_drawn_in_steps():
    """Corners of the line, as shares of the axes: (0, 0), (1/4, 0), (1/4, 1/2), (1, 1/2), (1, 1)."""
    models = [plain_model(name, cost, miou) for name, cost, miou in (("a", 1, 70.0), ("b", 2, 71.0), ("c", 5, 72.0))]
    comparison = comparison_of(models)
    svg = front_chart(comparison, comparison.front(GMACS)).light
    paths = [path.get("d") for path in ET.fromstring(svg).iter(f"{SVG}path") if path.get("d").count("L") == 4]
    corners = [np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2) for path in paths if "z" not in path]
    (line,) = [points for points in corners if len(points) == 5 and np.ptp(points[:, 0]) > 100]
    shares = (line - line[0]) / (line[-1] - line[0])
    assert shares.ravel().tolist() == pytest.approx([0, 0, 0.25, 0, 0.25, 0.5, 1, 0.5, 1, 1], abs=1e-5)


def test_a_model_without_an_miou_or_an_interval_is_no_error(recwarn):
    models = [plain_model("unknown", 2.0, None), plain_model("bare", 3.0, 71.0)]
    bare = models[1].result.backends[INT8_SIMULATED]
    models[1].result.backends[INT8_SIMULATED] = dataclasses.replace(bare, miou_interval=None)
    comparison = comparison_of(models)
    labels = texts(front_chart(comparison, comparison.front(GMACS)).light)
    assert "2" in labels and NOT_ON_FRONT not in labels and not recwarn.list


def test_quantizers_without_noise_are_left_out_of_the_chart(recwarn):
    exact = Sensitivity(small_sensitivity().rows[2:], None, 100.0, 1)
    assert sensitivity_chart(exact).light.count("<use") < sensitivity_chart(small_sensitivity()).light.count("<use")
    assert not recwarn.list


def test_a_dark_chart_differs_from_the_light_one_in_every_color_and_nothing_else(zoo):
    for chart in (recovery_chart(small_recovery()), front_chart(zoo, zoo.front(GMACS))):
        light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
        assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])
    assert chart == front_chart(zoo, zoo.front(GMACS))

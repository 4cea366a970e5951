"""The charts as SVG."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ffnet.config import Config
from ffnet.options import option_values
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.charts import (
    NOT_ON_FRONT,
    ON_FRONT,
    ChangeChart,
    ChangeRow,
    backends_chart,
    classes_chart,
    front_chart,
    losses_chart,
    models_chart,
    recovery_chart,
    sensitivity_chart,
)
from ffnet.results.comparison import GMACS, LATENCY
from ffnet.results.verdict import verdict
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.results import (
    comparison_of,
    plain_model,
    small_npu,
    small_recovery,
    small_result,
    small_sensitivity,
    zoo_comparison,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_sensitivity_chart_names_both_kinds_of_quantizers():
    labels = texts(sensitivity_chart(small_sensitivity()).light)
    assert {"weight", "activation", "quantizers from input to output"} <= set(labels)


def test_places_and_ticks_of_a_scale_around_zero():
    """By hand: the values span -1 to 3, and 5 percent of that are added at both ends: -1.2 to 3.2."""
    chart = ChangeChart([ChangeRow("a", 2.0, (1.0, 3.0)), ChangeRow("b", 0.5, None)], limit=-1.0)
    assert [chart.place(value) for value in (-1.2, 1.0, 3.2)] == [0, 50, 100]
    assert chart.ticks() == [(-1, "-1"), (0, "0"), (1, "+1"), (2, "+2"), (3, "+3")]
    assert ChangeChart([ChangeRow("a", 0.0, None)]).place(0) == 50


def test_only_a_change_whose_interval_excludes_zero_has_a_tone():
    rows = [ChangeRow("", change, interval) for change, interval in (
        (-1.0, (-2.0, -0.001)), (1.0, (0.5, 1.5)), (-1.0, (-2.0, 0.0)), (-9.0, None),
    )]  # fmt: skip
    assert [row.tone for row in rows] == ["down", "up", "", ""]
    assert [row.text for row in rows] == [
        "-1.000 [-2.000, -0.001]",
        "+1.00 [0.50, 1.50]",
        "-1.00 [-2.00, 0.00]",
        "-9.00",
    ]


def test_charts_have_every_backend_class_step_and_model_and_the_limits(zoo):
    result = small_result(
        npu=small_npu(), recovery=small_recovery(), options=option_values(Config()) | {"fail_under": 2.5}
    )
    backends, classes, steps = backends_chart(result), classes_chart(result), recovery_chart(result.recovery)
    assert [(row.name, row.change, row.remark) for row in backends.rows] == [
        (INT8_SIMULATED, pytest.approx(-16.25), ""), (INT8_NPU, pytest.approx(-16.25), "2 images"),
    ]  # fmt: skip
    assert [(row.name, row.change, row.remark) for row in classes.rows] == [
        ("road", pytest.approx(-12.5), "2 images"), ("sidewalk", pytest.approx(-20), "2 images"),
    ]  # fmt: skip
    assert [row.name for row in losses_chart(verdict(result)).rows] == ["sidewalk", "road"]
    assert [row.change for row in steps.rows] == [step.change for step in result.recovery.steps]
    assert steps.rows[-1].remark == "chosen; 62 % bit operations, 56 % weights"
    assert (backends.limit, steps.limit, classes.limit) == (-2.5, -1.0, None)
    assert backends_chart(small_result()).limit is None and recovery_chart(small_recovery(target=None)).limit is None
    assert [row.change for row in models_chart(zoo).rows] == [model.simulated.change for model in zoo.models]


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
    for chart in (sensitivity_chart(small_sensitivity()), front_chart(zoo, zoo.front(GMACS))):
        light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
        assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])
    assert chart == front_chart(zoo, zoo.front(GMACS))

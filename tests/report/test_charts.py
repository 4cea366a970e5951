"""The charts as SVG."""

import re
import xml.etree.ElementTree as ET

import pytest

from ffnet.config import Config
from ffnet.options import option_values
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.charts import (
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
from ffnet.results.comparison import GMACS
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
    chart = ChangeChart([ChangeRow("a", 2.0, (1.0, 3.0)), ChangeRow("b", 0.5, None)], drop=1.0)
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


def test_charts_have_every_backend_class_step_and_model_and_the_limits():
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
    assert (backends.drop, steps.drop, classes.drop) == (2.5, 1.0, None)
    assert backends_chart(small_result()).drop is recovery_chart(small_recovery(target=None)).drop is None
    zoo = zoo_comparison()
    assert [row.change for row in models_chart(zoo).rows] == [model.simulated.change for model in zoo.models]


def test_the_front_chart_has_the_loss_against_the_best_model_by_cost():
    """Three models of 500 images, of which the second costs more than the third and is worse."""
    models = [plain_model(name, cost, miou) for name, cost, miou in (("a", 1, 70.0), ("b", 5, 71.0), ("c", 2, 72.5))]
    chart = front_chart(comparison_of([*models, plain_model("d", 3, None)]).front(GMACS))
    assert chart.base == "c"
    assert [(row.name, row.change, row.remark) for row in chart.rows] == [
        ("a", -2.5, "1.0 GMACs, on the front"), ("c", 0.0, "2.0 GMACs, on the front"), ("b", -1.5, "5.0 GMACs"),
    ]  # fmt: skip


def test_quantizers_without_noise_are_left_out_of_the_chart(recwarn):
    exact = Sensitivity(small_sensitivity().rows[2:], None, 100.0, 1)
    assert sensitivity_chart(exact).light.count("<use") < sensitivity_chart(small_sensitivity()).light.count("<use")
    assert not recwarn.list


def test_a_dark_chart_differs_from_the_light_one_in_every_color_and_nothing_else():
    chart = sensitivity_chart(small_sensitivity())
    light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
    assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])
    assert chart == sensitivity_chart(small_sensitivity())

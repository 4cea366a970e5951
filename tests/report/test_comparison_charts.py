"""The chart of mIoU against cost as SVG, and its labels in a browser."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.report.comparison_charts import LABELED_MODELS, NOT_COMPARABLE, NOT_ON_FRONT, ON_FRONT, front_chart
from ffnet.results.comparison import GMACS, LATENCY
from ffnet.variants import VARIANTS
from tests.helpers.browser import browser
from tests.helpers.results import comparison_of, plain_model, zoo_comparison

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def zoo():
    """Five models with random scores on the same images."""
    return zoo_comparison()


@pytest.fixture(scope="module")
def many():
    """All variants, with random costs that grow with the mIoU."""
    rng = np.random.default_rng(0)
    names = list(VARIANTS)
    costs = np.exp(rng.uniform(np.log(28), np.log(1045), len(names)))
    mious = 70 + 4 * np.log(costs / 28) + rng.normal(0, 2, len(names))
    return comparison_of([plain_model(*row) for row in zip(names, costs.tolist(), mious.tolist(), strict=True)])


def test_few_models_all_have_labels_and_the_legend_names_what_there_is(zoo):
    labels = texts(front_chart(zoo, zoo.front(GMACS)).light)
    assert {model.name.removeprefix("segmentation_ffnet") for model in zoo.models} <= set(labels)
    assert {ON_FRONT, NOT_ON_FRONT, FP32, "GMACs", "mIoU, percent"} <= set(labels)
    assert NOT_COMPARABLE not in labels
    by_latency = texts(front_chart(zoo, zoo.front(LATENCY)).light)
    assert {ON_FRONT, NOT_COMPARABLE, "published latency, ms", "78S_BCC_mobile_pre_down"} <= set(by_latency)


def test_of_many_models_those_on_the_front_have_labels(many):
    front = many.front(GMACS)
    assert len(many.models) > LABELED_MODELS and len(front.members) > 5
    labels = set(texts(front_chart(many, front).light))
    for model in many.models:
        assert (model.name.removeprefix("segmentation_ffnet") in labels) == (model in front)


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


def test_a_model_without_an_interval_or_an_fp32_is_drawn(recwarn):
    entry = plain_model("bare", 3.0, 71.0).backends[INT8_SIMULATED]
    bare = {INT8_SIMULATED: dataclasses.replace(entry, miou_interval=None)}
    models = [plain_model("unknown", 2.0, None), plain_model("bare", 3.0, 71.0, backends=bare)]
    comparison = comparison_of(models)
    labels = texts(front_chart(comparison, comparison.front(GMACS)).light)
    assert "bare" in labels and not {"unknown", FP32, NOT_ON_FRONT} & set(labels)
    assert not recwarn.list


def test_a_dark_chart_differs_from_the_light_one_in_every_color_and_nothing_else(zoo):
    chart = front_chart(zoo, zoo.front(GMACS))
    light, dark = (re.split("(#[0-9a-f]{6})", svg) for svg in (chart.light, chart.dark))
    assert light[::2] == dark[::2] and not set(light[1::2]) & set(dark[1::2])
    assert chart == front_chart(zoo, zoo.front(GMACS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("comparison", "cost"),
    (("zoo", GMACS), ("zoo", LATENCY), ("many", GMACS)),
    ids=("five by GMACs", "five by latency", "many by GMACs"),
)
def test_no_two_texts_overlap_in_a_browser(comparison, cost, request, tmp_path):
    compared = request.getfixturevalue(comparison)
    page = tmp_path / "chart.html"
    svg = front_chart(compared, compared.front(cost)).light
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8>{svg[svg.index('<svg') :]}")
    boxes = (
        "JSON.stringify([...document.querySelectorAll('svg text')].map(t => [t.textContent, t.getBoundingClientRect()])"
        ".map(([text, box]) => [text, box.left, box.top, box.right, box.bottom]))"
    )
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 1280, 900)
        texts_at = json.loads(tab.evaluate(boxes))
    assert len(texts_at) > 15
    for index, (_, *first) in enumerate(texts_at):
        for other, *second in texts_at[:index]:
            apart = first[2] <= second[0] + 1 or second[2] <= first[0] + 1
            assert apart or first[3] <= second[1] + 3 or second[3] <= first[1] + 3, (texts_at[index], other)

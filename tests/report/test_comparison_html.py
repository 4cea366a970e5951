"""The page that compares models: its numbers, its markup under hostile names, and in a real browser."""

import base64
import dataclasses
import json

import pytest

from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.labels import CLASSES
from ffnet.report.comparison_html import relative_url, render_comparison
from ffnet.results.comparison import GMACS, LATENCY
from ffnet.system.files import write_atomically
from ffnet.variants import VARIANTS
from tests.helpers.browser import browser
from tests.helpers.page import HOSTILE, WINDOWS, Page
from tests.helpers.results import comparison_of, plain_model, small_npu, zoo_comparison


@pytest.fixture(scope="module")
def comparison():
    """Five models, the first one with published values and with all backends."""
    compared = zoo_comparison()
    first = compared.models[0]
    backends = first.backends | {INT8_ONNX_RUNTIME: first.backends[INT8_SIMULATED]}
    published = {FP32: 79.2, INT8_SIMULATED: 78.9}
    full = dataclasses.replace(first, backends=backends, npu=small_npu(), published=published)
    return dataclasses.replace(compared, models=[full, *compared.models[1:]])


@pytest.fixture(scope="module")
def text(comparison):
    """The page of `comparison`."""
    return render_comparison(comparison)


def plain(value):
    """The value as it is read back from JSON."""
    return json.loads(json.dumps(value))


def test_the_table_of_models_has_the_numbers_of_the_comparison(comparison, text):
    rows = Page(text).tables["models"]
    assert [row[0] for row in rows[1:]] == [model.name for model in comparison.models]
    for (_, fronts, *cells, size), model in zip(rows[1:], comparison.models, strict=True):
        fp32, int8 = model.backends[FP32], model.backends[INT8_SIMULATED]
        milliseconds = model.latency.milliseconds
        assert [json.loads(cell) if cell else None for cell in cells] == [
            *(fp32.miou, int8.miou, [*int8.miou_interval], fp32.miou - int8.miou, [*int8.drop_interval]),
            *(model.published.get(FP32), model.published.get(INT8_SIMULATED), model.parameters / 1e6, model.gmacs),
            *(milliseconds.tflite, milliseconds.dlc, milliseconds.onnx),
        ]
        assert size == ("512x1024" if model.name.endswith("pre_down") else "1024x2048")
        units = [cost.unit for cost in (GMACS, LATENCY) if model in comparison.front(cost)]
        assert fronts == (", ".join(units) or "–")


def test_the_fronts_have_their_gains_and_the_headlines_their_mious(comparison, text):
    page = Page(text)
    for table, cost in (("front-1", GMACS), ("front-2", LATENCY)):
        members = comparison.front(cost).members
        assert [row[0] for row in page.tables[table][1:]] == [member.model.name for member in members]
        for (_, *cells, excludes), member in zip(page.tables[table][1:], members, strict=True):
            numbers = [json.loads(cell) if cell else None for cell in cells]
            assert numbers == plain([member.cost, member.miou, member.gain, member.gain_interval])
            assert excludes == {None: "–", True: "yes", False: "no"}[member.distinct]
        assert comparison.front(cost).describe(24) in text
    mious = [float(value) for key, value in page.data if key == "data-miou"]
    assert mious == [headline.member.miou for headline in comparison.headlines()] and len(mious) > 2


def test_other_backends_and_classes_have_their_numbers(comparison, text):
    page = Page(text)
    assert [row[1:4] for row in page.tables["backends"][1:]] == [
        [INT8_ONNX_RUNTIME, "24", str(comparison.models[0].int8_miou)], [INT8_NPU, "2", "83.75"],
    ]  # fmt: skip
    _, *rows = page.tables["classes"]
    assert [row[0] for row in rows] == list(CLASSES)
    differences = [float(value) for key, value in page.data if key == "data-difference"]
    best = max(comparison.models, key=lambda model: model.int8_miou).backends[INT8_SIMULATED].iou
    for index, (label, *ious, winner) in enumerate(rows):
        expected = {model.short_name: model.backends[INT8_SIMULATED].iou[label] for model in comparison.models}
        assert list(map(float, ious)) == list(expected.values())
        assert winner == max(expected, key=expected.get)
        assert differences[5 * index : 5 * index + 5] == [iou - best[label] for iou in expected.values()]


def test_model_names_link_to_their_reports_if_there_are_any(comparison, text):
    for model in comparison.models:
        assert f'<a href="./{model.name}/report.html">' in text
    without = [dataclasses.replace(model, link=None) for model in comparison.models]
    assert "<a " not in render_comparison(dataclasses.replace(comparison, models=without))


@pytest.mark.parametrize(
    ("path", "url"),
    (
        ("a_b/report.html", "./a_b/report.html"),
        ("javascript:alert(1)", "./javascript%3Aalert%281%29"),
        ("//host/x", ".///host/x"),
        ('"><b> \udcff', "./%22%3E%3Cb%3E%20%FF"),
    ),
)
def test_a_link_is_always_a_relative_path(path, url):
    assert relative_url(path) == url


def test_command_options_and_versions_are_those_of_the_run(comparison, text):
    page = Page(text)
    assert page.texts["command"] == comparison.command
    assert dict(page.tables["options"]) == {"--cle": "True", "--limit": "–"}
    assert dict(page.tables["settings"]) == {
        "dataset": "Cityscapes val", "image size": "1024x2048", "device": "CPU", "python": "3.11",
    }  # fmt: skip


def test_parts_without_content_are_left_out():
    page = Page(render_comparison(comparison_of([plain_model("a", 1.0, None)], options={})))
    assert page.images == [] and set(page.tables) == {"models", "classes", "settings"}
    heading, row = page.tables["models"]
    assert not [name for name in heading if "published" in name or "TFLite" in name] and len(row) == len(heading) == 9
    assert page.texts["title"] == "Comparison of 1 model: quantization report"


def hostile(comparison, name):
    """The same comparison with `name` wherever a name or a text can be."""
    models = [dataclasses.replace(model, name=name, link=name) for model in comparison.models]
    texts = dict.fromkeys(("dataset", "device", "command"), name)
    lists = {"notes": [name], "options": {"x": name}, "versions": {"x": name}}
    return dataclasses.replace(comparison, models=models, **texts, **lists)


@pytest.fixture(
    scope="module", params=[HOSTILE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE[1:])]
)
def named(comparison, request):
    """A hostile name, and the page that is full of it."""
    return request.param, render_comparison(hostile(comparison, request.param))


def test_hostile_names_stay_text(named, comparison):
    name, page, usual = named[0], Page(named[1]), Page(render_comparison(hostile(comparison, "x")))
    assert page.elements == usual.elements
    assert page.texts["script"] == usual.texts["script"]
    assert page.texts["command"] == name and page.tables["models"][1][0] == name


def test_every_wide_table_is_in_a_named_region_and_every_heading_has_a_scope(text):
    page = Page(text)
    headings = [element for element in page.elements if element[0] == "th"]
    assert headings and all("scope" in element for element in headings)
    regions = [element for element in page.elements if element[0] == "div" and "role" in element]
    assert len(regions) == 5 and all({"aria-label", "tabindex"} <= set(element) for element in regions)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page_files(text, comparison, tmp_path_factory):
    """The pages of five models and of all variants."""
    folder = tmp_path_factory.mktemp("page")
    names = list(VARIANTS)
    models = [plain_model(name, 20.0 + 15 * rank, 70 + rank / 5, link="x") for rank, name in enumerate(names)]
    many = render_comparison(comparison_of(models))
    return {
        "five": write_atomically(folder / "five.html", text),
        "many": write_atomically(folder / "many.html", many),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("number", ("five", "many"))
def test_a_browser_finds_no_fault(page_files, tab, number, window, dark):
    width, height, phone = WINDOWS[window]
    assert tab.faults(page_files[number], width, height, dark, phone) == []
    sources = tab.evaluate("[...document.querySelectorAll('picture.chart img')].map(i => i.currentSrc)")
    charts = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    assert len(charts) == {"five": 2, "many": 1}[number] and all(("#c9d0da" in chart) == dark for chart in charts)


@pytest.mark.slow
def test_models_sort_by_their_miou(page_files, tab, comparison):
    tab.open(page_files["five"], 1280, 900)
    tab.evaluate("document.querySelectorAll('#models thead button')[3].click()")
    names = tab.evaluate("[...document.querySelectorAll('#models tbody th')].map(cell => cell.dataset.value)")
    assert names == [model.name for model in sorted(comparison.models, key=lambda model: model.int8_miou)]


@pytest.mark.slow
def test_a_model_opens_its_report_beside_the_page(page_files, tab, comparison):
    name = comparison.models[1].name
    report = page_files["five"].parent / name / "report.html"
    report.parent.mkdir(exist_ok=True)
    report.write_text("<!DOCTYPE html><title>its report</title>")
    tab.open(page_files["five"], 1280, 900)
    address = tab.evaluate(f"document.querySelector('#models th[data-value={name}] a').href")
    assert address == report.resolve().as_uri()


@pytest.mark.slow
def test_hostile_names_run_nothing_in_a_browser(named, tab, tmp_path):
    path = write_atomically(tmp_path / "comparison.html", named[1])
    assert tab.faults(path, 390, 844, phone=True) == []
    assert tab.evaluate("document.title") == "Comparison of 5 models: quantization report"
    folder = f"{tmp_path.resolve().as_uri()}/"
    assert all(link.startswith(folder) for link in tab.evaluate("[...document.links].map(link => link.href)"))


@pytest.mark.slow
def test_the_page_prints(page_files, tab):
    tab.open(page_files["many"], 1280, 900)
    assert tab.pdf().startswith(b"%PDF")

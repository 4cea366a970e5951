"""The pages of a run and of a comparison: their numbers, their markup under hostile names, and in a real browser."""

import base64
import dataclasses
import json
import re
import shlex

import numpy as np
import pytest

from ffnet.config import Config
from ffnet.evaluation.scores import FP32, ONNX_FILE, SIMULATED, BackendNames
from ffnet.labels import CITYSCAPES
from ffnet.options import option_values
from ffnet.quantization.recovery.outcome import RaisedQuantizer
from ffnet.report.rendering import render, render_comparison
from ffnet.results.comparison import excludes_zero
from ffnet.results.result import Calibration, CheckpointInfo, Details, Diagnostics
from ffnet.results.verdict import verdict
from ffnet.system.files import write_atomically
from ffnet.variants import VARIANTS
from tests.helpers.browser import browser
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.names import INT8_NPU, INT8_ONNX_RUNTIME, INT8_SIMULATED
from tests.helpers.page import HOSTILE, WINDOWS, Page
from tests.helpers.results import (
    comparison_of,
    noise_result,
    plain_model,
    small_layers,
    small_npu,
    small_recovery,
    small_result,
    zoo_comparison,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A Result with every part of the page, of three networks on four images of noise."""
    tree = tmp_path_factory.mktemp("tree")
    write_tree(tree)
    return dataclasses.replace(noise_result(tree), options=option_values(Config()) | {"limit": 4})


@pytest.fixture(scope="module")
def text(result):
    """The page of `result`."""
    return render(result)


@pytest.fixture(scope="module")
def comparison():
    """A comparison of five models, the first one with published values and with the NPU."""
    compared = zoo_comparison()
    first = compared.models[0]
    full = dataclasses.replace(first.result, npu=small_npu(), published={FP32: 79.2, INT8_SIMULATED: 78.9})
    return comparison_of([dataclasses.replace(first, result=full), *compared.models[1:]])


@pytest.fixture(scope="module")
def comparison_text(comparison):
    """The page of `comparison`."""
    return render_comparison(comparison)


def test_the_numbers_of_the_page_are_those_of_the_result(result, text):
    page = Page(text)
    content = json.loads(json.dumps(result.to_json()))
    backends = content["backends"]
    assert list(backends) == [FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME]
    assert list(page.numbers("backends")) == list(backends)
    for name, cells in page.numbers("backends").items():
        entry, published = backends[name], content["published"].get(name)
        published_change = None if name == FP32 or published is None else published - 79.2
        accuracy = [entry["miou"], entry["miou_interval"], entry["change"], entry["change_interval"]]
        assert cells == [*accuracy, published, published_change, entry["pixel_accuracy"]]
    rows, classes = page.tables["classes"][1:], page.numbers("classes", first=2)
    assert [row[:2] for row in rows] == [
        [name, f"{content['classes'][name]['images']} (few)"] for name in CITYSCAPES.names
    ]
    for name, cells in classes.items():
        fp32, *others = backends.values()
        fields = "iou", "iou_change", "iou_change_interval"
        assert cells == [fp32["iou"][name], *(entry[field].get(name) for entry in others for field in fields)]
    assert classes["pole"][1] is None

    shares = {}
    for name, entry in backends.items():
        matrix = np.array(entry["confusion_matrix"], float)
        shares[name] = 100 * np.divide(matrix, matrix.sum(1)[:, None], where=matrix.sum(1)[:, None] > 0, out=0 * matrix)
        assert np.allclose(matrix_of(page, name.replace(" ", "-")), shares[name], atol=1e-9, rtol=0)
    (change,) = [table for table in page.tables if table.startswith("Change-from")]
    assert np.allclose(matrix_of(page, change), shares[INT8_SIMULATED] - shares[FP32], atol=1e-9, rtol=0)

    agreement = {pair.replace(" and ", "|"): float(value) for pair, value in page.tables["agreement"][1:]}
    assert agreement == content["agreement"]
    times, stages = page.numbers("times"), content["stage_seconds"]
    assert {stage: times[stage] for stage in stages} == {stage: [seconds, None] for stage, seconds in stages.items()}
    assert times["total"] == [sum(stages.values()), None] and content["compilation"] in text
    assert [times[f"network: {name}"][1] for name in backends] == [e["images_per_second"] for e in backends.values()]


def matrix_of(page, table):
    """The numbers of a table that has the shape of a confusion matrix."""
    return np.array([row[1:] for row in page.tables[table][1:]], float)


def test_the_numbers_of_images_and_quantizers_are_those_of_the_diagnostics(result, text):
    page, diagnostics = Page(text), result.details.diagnostics
    values = {name: [float(v) for key, v in page.data if key == name] for name in ("data-miou", "data-agreement")}
    worst = diagnostics.worst_images
    assert values["data-miou"] == [miou for image in (worst[0], *worst) for miou in image.mious.values()]
    assert values["data-agreement"] == [image.agreement for image in diagnostics.worst_images]
    assert [(row[1], row[4], row[5]) for row in page.tables["sensitivity"][1:]] == [
        (
            f"{row.layer} {row.role}",
            "" if row.sqnr_only_enabled is None else str(row.sqnr_only_enabled),
            str(row.agreement_only_enabled),
        )
        for row in diagnostics.sensitivity.rows
    ]


def test_every_layer_has_a_bar_for_every_backend(result, text):
    headings, *rows = Page(text).tables["layer-sqnr"]
    assert headings == ["layer", "INT8 simulated", "same input", "INT8 NPU", "same input"]
    assert rows == [["image", "40.0", "40.0", "", ""], ["conv0", "20.0", "30.0", "50.0", "60.0"]]
    assert re.findall(r'data-value="[\d.]*" style="--w:([\d.]+)%"', text) == [
        "50.0", "50.0", "100", "100", "25.0", "37.5", "62.5", "75.0",
    ]  # fmt: skip
    assert "0.250 % clipped" in text and "equal</td>" in text


def test_the_section_on_accuracy_recovery_shows_every_step_and_raised_quantizer(result, text):
    page, recovery = Page(text), json.loads(json.dumps(result.to_json()))["recovery"]
    headings, *steps = page.tables["recovery"]
    assert len(headings) == 10 and headings[1] == "recovery, on 4 selection images (FP32: 80.00 %)"
    assert [row[:2] for row in steps] == [[str(n), step["name"]] for n, step in enumerate(recovery["steps"], 1)]
    for cells, step in zip(steps, recovery["steps"], strict=True):
        numbers = [json.loads(cell) if cell else None for cell in cells[2:9]]
        assert numbers[:4] == [step[name] for name in ("miou", "miou_interval", "change", "change_interval")]
        assert numbers[4:] == [100 * step["bit_operations"], 100 * step["weight_bytes"], step["seconds"]]
    assert [row[9] for row in steps] == ["kept", "kept", "not kept", "not kept", "chosen"]
    assert page.tables["raised"][1:] == [["conv0", "weight", "8"], ["relu", "output", "16"]]
    assert "in every step on 4 selection images," in text


def test_settings_options_and_command_are_those_of_the_result(result, text):
    page = Page(text)
    settings = dict(page.tables["settings"])
    assert settings["checkpoint path"] == "/weights/a.pth" and settings["calibration images"] == "4"
    assert {name: settings[name] for name in result.versions} == result.versions
    assert page.tables["options"][1:] == [["--limit", "4"]]
    assert page.texts["command"] == result.command


def test_the_worst_image_comes_first_and_pictures_are_the_panels(result, text):
    worst = result.details.diagnostics.worst_images
    panels = [*worst[0].panels[2:4], *worst[0].enlarged, *(panel for image in worst for panel in image.panels)]
    shown = [image for image in Page(text).images if not image["src"].startswith("data:image/svg")]
    assert len(shown) == len(panels) == 15
    for image, panel in zip(shown, panels, strict=True):
        kind, _, content = image["src"].partition(";base64,")
        assert kind == f"data:{panel.mime}" and base64.b64decode(content) == panel.data
        assert image["alt"].startswith(BackendNames().of(panel.title) if panel.title == SIMULATED else panel.title)


def test_the_first_screen_has_the_verdict_every_change_and_its_conditions(result):
    page, found = Page(render(result)), verdict(result)
    assert found.sentences[0] in page.words and found.numbers.replace("-", "−") in page.words
    changes = [json.loads(value) for value in page.changes[:3]]
    assert changes == [
        entry.change for entry in [*result.backends.values(), result.npu.backends[INT8_NPU]] if entry.change
    ]
    calibrated = dataclasses.replace(result, notes=["a", result.calibration.description, f"{INT8_ONNX_RUNTIME}: b"])
    words = Page(render(calibrated)).words
    assert "W8A8 4 images" in words and "calibrated on scored images2" in words and f"{INT8_ONNX_RUNTIME}3" in words


def test_numbers_have_one_minus_sign_and_names_keep_their_hyphens(result):
    noted = dataclasses.replace(result, notes=["see --limit and 2-bit weights: -0.5 [-1, 2]"])
    assert "see --limit and 2-bit weights: −0.5 [−1, 2]" in Page(render(noted)).words


def test_sections_without_content_are_left_out():
    """As with --onnx."""
    backends = {ONNX_FILE: dataclasses.replace(small_result().backends[FP32], miou_interval=None)}
    page = Page(render(small_result(
        backends=backends, agreement={}, published={}, notes=[], checkpoint=None, calibration=None,
    )))  # fmt: skip
    assert page.images == [] and "sensitivity" not in page.tables and len(page.tables["backends"][1]) == 4
    assert "95 % CI" not in render(small_result(backends=backends))
    assert "checkpoint" not in dict(page.tables["settings"])


def test_the_tables_of_a_comparison_have_its_numbers(comparison, comparison_text):
    page = Page(comparison_text)
    models = comparison.models
    for cells, model in zip(page.tables["models"][1:], models, strict=True):
        assert cells[1] == model.short_name
        assert cells[2:5] == [str(value) for value in (model.miou, model.parameters / 1e6, model.gmacs)]
        assert cells[5:7] == [model.published.describe_latency(), "x".join(map(str, model.published.input_size))]
    assert [row[7] for row in page.tables["models"][1:]] == ["GMACs, ms", "GMACs, ms", "GMACs, ms", "–", "–"]
    rows = page.tables["backends"][1:]
    assert [row[:3] for row in rows[:4]] == [
        ["ffnet40S_dBBB_mobile", FP32, "24"], ["ffnet40S_dBBB_mobile", INT8_SIMULATED, "24"],
        ["ffnet40S_dBBB_mobile", INT8_NPU, "2"], ["ffnet54S_dBBB_mobile", FP32, "24"],
    ]  # fmt: skip
    entry = models[0].result.backends[INT8_SIMULATED]
    assert [json.loads(cell) for cell in rows[1][3:8]] == [
        entry.miou, [*entry.miou_interval], entry.change, [*entry.change_interval], 78.9,
    ]  # fmt: skip
    for number, front in enumerate(comparison.fronts(), 1):
        for cells, member in zip(page.tables[f"front-{number}"][1:], front.members, strict=True):
            numbers = [json.loads(cell) if cell else None for cell in cells[1:5]]
            limits = member.gain_interval and [*member.gain_interval]
            assert (cells[0], numbers) == (
                member.model.short_name, [member.cost, member.model.miou, member.gain and member.gain.value, limits],
            )  # fmt: skip
            assert cells[5] == {None: "–", True: "yes", False: "no"}[excludes_zero(member.gain_interval)]
        assert front.describe(24).replace("[-", "[−") in page.words
    assert {row[1] for row in page.tables["classes"][1:]} == {"24"}
    for label, cells in page.numbers("classes", first=2).items():
        assert cells == [model.result.backends[INT8_SIMULATED].iou[label] for model in models]
    assert dict(page.tables["settings"][1:])["image size"] == "1024x2048"
    assert page.tables["options"][1:] == [["--cle", "False"]]


def test_model_names_link_to_their_reports_if_there_are_any(comparison, comparison_text):
    for model in comparison.models:
        assert f'<a href="./{model.result.model}/report.html">' in comparison_text
    without = [dataclasses.replace(model, link=None) for model in comparison.models]
    assert "report.html" not in render_comparison(comparison_of(without))


def test_a_comparison_without_mious_has_no_charts():
    page = Page(render_comparison(comparison_of([plain_model("a", 1.0, None)])))
    assert page.images == [] and page.texts["title"] == "Comparison of 1 model: quantization report"
    assert page.tables["models"][0] == ["#", "model (segmentation_...)", "INT8 %", "M params", "GMACs"]


def test_every_table_is_in_a_named_region_and_every_heading_has_a_scope(text, comparison_text):
    for page in (Page(text), Page(comparison_text)):
        headings = [element for element in page.elements if element[0] == "th"]
        assert headings and all("scope" in element for element in headings)
        regions = [element for element in page.elements if element[0] == "div" and "role" in element]
        assert len(regions) == len(page.tables) and all({"aria-label", "tabindex"} <= {*e} for e in regions)


def hostile(result, name):
    """The same result with `name` wherever a user's name can be."""
    diagnostics = result.details.diagnostics
    worst = tuple(dataclasses.replace(image, name=name) for image in diagnostics.worst_images)
    rows = [dataclasses.replace(row, layer=name) for row in diagnostics.sensitivity.rows]
    sensitivity = dataclasses.replace(diagnostics.sensitivity, rows=rows)
    return dataclasses.replace(
        result,
        model=name,
        dataset=name,
        checkpoint=CheckpointInfo(name, "0" * 64, name),
        calibration=Calibration(1, 8, name),
        notes=[name],
        recovery=hostile_recovery(name),
        layers=small_layers(name, name),
        options=option_values(Config()) | {"dataset_path": name, "model_name": name},
        command=shlex.join([name]),
        details=Details(result.details.scores, (name,) * 4, (64, 128), CITYSCAPES, Diagnostics(worst, sensitivity)),
    )


def hostile_recovery(name):
    steps = [dataclasses.replace(step, name=name) for step in small_recovery().steps]
    raised = [RaisedQuantizer(name, "weight", 8)]
    return small_recovery(steps=steps, chosen=name, raised=raised, selection_images=[name])


def hostile_comparison(comparison, name):
    """The same comparison with `name` wherever a name or a text can be."""
    models = []
    for model in comparison.models:
        texts = dict.fromkeys(("model", "dataset", "device"), name)
        result = dataclasses.replace(model.result, **texts, command=shlex.join([name]), versions={"x": name})
        models.append(dataclasses.replace(model, result=result, link=name))
    return dataclasses.replace(
        comparison, models=models, run_notes=[name], options=option_values(Config()) | {"x": name}
    )


def pages_named(result, comparison, name):
    return render(hostile(result, name)), render_comparison(hostile_comparison(comparison, name))


@pytest.fixture(scope="module")
def usual(result, comparison):
    """The parsed pages with an ordinary name."""
    return [Page(text) for text in pages_named(result, comparison, "x")]


@pytest.fixture(
    scope="module", params=[HOSTILE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE[1:])]
)
def named(result, comparison, request):
    """A hostile name, and the pages that are full of it."""
    return request.param, pages_named(result, comparison, request.param)


def test_hostile_names_stay_text(named, usual):
    name, texts = named
    for text, expected in zip(texts, usual, strict=True):
        page = Page(text)
        assert page.elements == expected.elements
        assert page.texts["script"] == expected.texts["script"]
        assert page.texts["command"] == shlex.join([name])
        assert dict(page.tables["settings"])["dataset"] == name
    assert Page(texts[0]).texts["title"] == f"{name}: quantization report"


def test_the_same_result_gives_the_same_page(result, text):
    assert render(result) == text


@pytest.fixture(scope="module")
def page_files(text, comparison_text, tmp_path_factory):
    """The pages of a run, of a comparison of five models, and of one of all variants."""
    folder = tmp_path_factory.mktemp("page")
    names = enumerate(VARIANTS)
    models = [plain_model(name, 20.0 + 15 * rank, 70 + rank / 5 + rank % 3) for rank, name in names]
    texts = {"run": text, "five": comparison_text, "many": render_comparison(comparison_of(models))}
    return {name: write_atomically(folder / f"{name}.html", text) for name, text in texts.items()}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("name", "charts"), (("run", 3), ("five", 0), ("many", 0)))
def test_a_browser_finds_no_fault(page_files, tab, name, charts, window, dark):
    width, height, phone = WINDOWS[window]
    assert tab.faults(page_files[name], width, height, dark, phone) == []
    sources = tab.evaluate("[...document.querySelectorAll('picture.chart img')].map(i => i.currentSrc)")
    shown = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    assert len(shown) == charts and all(("#c9d0da" in chart) == dark for chart in shown)
    assert (max(tab.pixel(2, 2)) < 60) == dark


@pytest.mark.slow
def test_tables_sort_and_missing_values_stay_last(page_files, tab):
    tab.open(page_files["run"], 1280, 900)
    column = "[...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[3].dataset.value)"
    click = "document.querySelectorAll('#classes thead button')[3].click()"
    for direction in (1, -1):
        tab.evaluate(click)
        values = tab.evaluate(column)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, key=lambda number: direction * number) and len(numbers) > 10
        assert "" in values and values == [*map(str, values[: len(numbers)]), *[""] * (len(values) - len(numbers))]


@pytest.mark.slow
def test_the_slider_moves_by_mouse_touch_and_keyboard(page_files, tab):
    cut = "getComputedStyle(document.querySelector('.wide .wipe figure + figure img')).clipPath"
    for phone in (False, True):
        tab.open(page_files["run"], 390 if phone else 1280, 800, phone=phone)
        assert tab.evaluate(cut) == "inset(0px 0px 0px 50%)"
        tab.evaluate("document.querySelector('.wide .wipe').scrollIntoView()")
        box = tab.evaluate("document.querySelector('.wide .wipe img').getBoundingClientRect().toJSON()")
        x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
        tab.drag((x + width / 2, y + height / 2), (x + width / 4, y + height / 2), phone)
        assert tab.evaluate(cut) == "inset(0px 0px 0px 25%)"
        paper, *sides = (tab.pixel(x + share * width, y + height / 2) for share in (-0.02, 0.1, 0.9))
        assert paper not in sides  # both pictures are drawn
        tab.evaluate("document.querySelector('.wide .wipe input').focus()")
        tab.press("ArrowRight")
        assert tab.evaluate(cut) == "inset(0px 0px 0px 26%)"


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
def test_without_scripts_both_images_are_side_by_side(page_files, tab, window):
    tab("Emulation.setScriptExecutionDisabled", value=True)
    assert tab.faults(page_files["run"], *WINDOWS[window][:2], phone=WINDOWS[window][2]) == []
    tab("Emulation.setScriptExecutionDisabled", value=False)
    boxes = "[...document.querySelectorAll('.wipe:first-of-type img')].slice(0, 2).map(i => i.getBoundingClientRect())"
    left, right = tab.evaluate(f"{boxes}.map(({{x, y, width}}) => [x, y, width])")
    assert left[1:] == right[1:] and right[0] >= left[0] + left[2]
    assert tab.evaluate("document.querySelector('.wipe input').hidden && !document.querySelector('.copy button')")


@pytest.mark.slow
def test_a_model_opens_its_report_beside_the_page(page_files, tab, comparison):
    tab.open(page_files["five"], 1280, 900)
    links = tab.evaluate("[...document.querySelectorAll('#models a')].map(link => link.href)")
    folder = page_files["five"].parent.resolve()
    assert links == [(folder / model.link).as_uri() for model in comparison.models]


@pytest.mark.slow
def test_hostile_names_run_nothing_in_a_browser(named, tab, tmp_path):
    for text in named[1]:
        path = write_atomically(tmp_path / "report.html", text)
        assert tab.faults(path, 390, 844, phone=True) == []
        assert tab.evaluate("document.title") not in ("", "run")
        folder = f"{tmp_path.resolve().as_uri()}/"
        assert all(link.startswith(folder) for link in tab.evaluate("[...document.links].map(link => link.href)"))


@pytest.mark.slow
def test_the_page_lets_no_other_script_run(page_files, tab, tmp_path):
    """If escaping ever fails, the browser itself refuses."""
    added = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png' alt=''></body>"
    path = tmp_path / "report.html"
    path.write_text(page_files["run"].read_text().replace("</body>", added))
    tab.open(path, 1280, 900)
    assert tab.evaluate("document.title") != "run"
    assert any("Content Security Policy" in str(entry) for entry in tab.logged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("run", "many"))
def test_the_page_prints(page_files, tab, name):
    tab.open(page_files[name], 1280, 900)
    assert tab.pdf().startswith(b"%PDF")

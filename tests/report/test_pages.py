"""The report page: its numbers against the result, its markup under hostile names, and in a real browser."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_ONNX_RUNTIME, INT8_SIMULATED, ONNX_FILE
from ffnet.labels import CLASSES
from ffnet.report import html
from ffnet.results.recovery import RaisedQuantizer
from ffnet.results.result import Calibration, CheckpointInfo, Details, Diagnostics
from ffnet.system.files import write_atomically
from tests.helpers.browser import browser
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.page import HOSTILE, WINDOWS, Page
from tests.helpers.results import (
    noise_result,
    small_layers,
    small_npu,
    small_recovery,
    small_result,
    unlabelled_recovery,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A Result with every part of the page, of three networks on four images of noise."""
    tree = tmp_path_factory.mktemp("tree")
    write_tree(tree)
    return noise_result(tree)


@pytest.fixture(scope="module")
def text(result):
    """The page of `result`."""
    return html.render(result)


def test_the_numbers_of_the_page_are_those_of_the_result(result, text):
    page = Page(text)
    content = json.loads(json.dumps(result.to_json()))
    backends = content["backends"]
    assert list(backends) == [FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME]
    assert list(page.numbers("backends")) == list(backends)
    for name, cells in page.numbers("backends").items():
        entry, published = backends[name], content["published"].get(name)
        drop = None if name == FP32 else backends[FP32]["miou"] - entry["miou"]
        published_drop = None if name == FP32 or published is None else 79.2 - published
        accuracy = [entry["miou"], entry["miou_interval"], drop, entry["drop_interval"], published, published_drop]
        assert cells == [*accuracy, entry["pixel_accuracy"], entry["images_per_second"]]
    intervals = [entry[name] for name in ("miou_interval", "drop_interval") for entry in backends.values()]
    intervals.append(content["npu"]["backends"][INT8_NPU]["miou_interval"])
    assert [json.loads(value) for key, value in page.data if key == "data-interval"] == list(filter(None, intervals))
    assert len(list(filter(None, intervals))) == 6

    classes = page.numbers("classes")
    assert list(classes) == list(CLASSES)
    for name, cells in classes.items():
        ious = [entry["iou"][name] for entry in backends.values()]
        assert cells[:3] == ious
        assert cells[3:] == [None if None in (iou, ious[0]) else iou - ious[0] for iou in ious[1:]]
    assert classes["pole"][1] is None

    for number, entry in enumerate(backends.values(), 1):
        cells = [row[1:] for row in page.tables[f"confusion-{number}"][1:]]
        assert np.array_equal(np.array(cells, float), entry["confusion_matrix"])
    before, after = (np.array(backends[name]["confusion_matrix"], float) for name in (FP32, INT8_SIMULATED))
    with np.errstate(invalid="ignore"):
        change = 100 * (np.nan_to_num(after / after.sum(1)[:, None]) - np.nan_to_num(before / before.sum(1)[:, None]))
    shown = np.array([row[1:] for row in page.tables["confusion-change"][1:]], float)
    assert np.allclose(shown, change, atol=1e-9, rtol=0)

    agreement = {pair.replace(" and ", "|"): float(value) for pair, value in page.tables["agreement"]}
    assert agreement == content["agreement"]
    assert {stage: cells[0] for stage, cells in page.numbers("stages").items()} == content["stage_seconds"]


def test_the_numbers_of_images_and_quantizers_are_those_of_the_diagnostics(result, text):
    page, diagnostics = Page(text), result.details.diagnostics
    values = {name: [float(v) for key, v in page.data if key == name] for name in ("data-miou", "data-agreement")}
    assert values["data-miou"] == [miou for image in diagnostics.worst_images for miou in image.mious.values()]
    assert values["data-agreement"] == [image.agreement for image in diagnostics.worst_images]
    assert [(row[1], row[4], row[5]) for row in page.tables["sensitivity"][1:]] == [
        (
            row.layer,
            "" if row.sqnr_only_enabled is None else str(row.sqnr_only_enabled),
            str(row.agreement_only_enabled),
        )
        for row in diagnostics.sensitivity.rows
    ]


def test_the_section_on_the_npu_shows_its_metrics_and_layers():
    diagnostics = Diagnostics(npu_layers=small_layers())
    page = Page(html.render(small_result(npu=small_npu(), diagnostics=diagnostics)))
    miou, drop = (float(page.numbers("npu-backends")["INT8 NPU"][column]) for column in (0, 2))
    assert (miou, drop) == (83.75, 16.25)
    assert [row[1:4] for row in page.tables["npu-layers"][1:]] == [
        ["image", "1.0", "0.01"], ["conv0", "2.0", "0.025"], ["logits", "30.0", "0.45"],
    ]  # fmt: skip
    assert "npu-backends" not in Page(html.render(small_result())).tables


def test_the_section_on_accuracy_recovery_shows_every_step_and_raised_quantizer(result, text):
    page, recovery = Page(text), json.loads(json.dumps(result.to_json()))["recovery"]
    headings, fp32, *steps = page.tables["recovery"]
    assert len(headings) == 10 and fp32[:3] == ["–", "FP32", "80.0"]
    assert [row[:2] for row in steps] == [[str(n), step["name"]] for n, step in enumerate(recovery["steps"], 1)]
    for cells, step in zip(steps, recovery["steps"], strict=True):
        numbers = [json.loads(cell) if cell else None for cell in cells[2:9]]
        assert numbers[:4] == [step[name] for name in ("miou", "miou_interval", "drop", "drop_interval")]
        assert numbers[4:] == [100 * step["bit_operations"], 100 * step["weight_bytes"], step["seconds"]]
    assert [row[9] for row in steps] == ["kept", "kept", "not kept", "not kept", "chosen"]
    assert page.tables["raised"][1:] == [["conv0", "weight", "8"], ["relu", "output", "16"]]
    assert "are those on 4 selection images." in text
    assert text.count('<tr class="chosen">') == 1


def test_accuracy_recovery_on_unlabelled_images_has_its_table_alone():
    page = Page(html.render(small_result(recovery=unlabelled_recovery())))
    assert page.tables["recovery"][2][1:6] == ["plain", "", "", "", ""] and "raised" not in page.tables
    without = Page(html.render(small_result()))
    assert len(page.images) == len(without.images) and "recovery" not in without.tables


def test_settings_options_and_command_are_those_of_the_result(result, text):
    page = Page(text)
    settings = dict(page.tables["settings"])
    assert settings["checkpoint"] == "/weights/a.pth" and settings["calibration images"] == "4"
    assert {name: settings[name] for name in result.versions} == result.versions
    assert dict(page.tables["options"]) == {
        "--model-name": result.model, "--cle": "True", "--demo": "False", "--limit": "–",
    }  # fmt: skip
    assert page.texts["command"] == result.command


def test_pictures_are_the_panels(result, text):
    panels = [panel for image in result.details.diagnostics.worst_images for panel in image.panels]
    shown = [image for image in Page(text).images if not image["src"].startswith("data:image/svg")]
    assert len(shown) == len(panels) == 10
    for image, panel in zip(shown, panels, strict=True):
        kind, _, content = image["src"].partition(";base64,")
        assert kind == f"data:{panel.mime}" and base64.b64decode(content) == panel.data
        assert image["alt"].startswith(panel.title)


def test_sections_without_content_are_left_out():
    """As with --onnx."""
    backends = {ONNX_FILE: dataclasses.replace(small_result().backends[FP32], miou_interval=None)}
    page = Page(html.render(small_result(
        backends=backends, agreement={}, published={}, notes=[], checkpoint=None, calibration=None,
    )))  # fmt: skip
    assert page.images == [] and "sensitivity" not in page.tables and len(page.tables["backends"][1]) == 5
    assert "95 % CI" not in html.render(small_result(backends=backends))
    assert "checkpoint" not in dict(page.tables["settings"])


def test_counts_agree_with_their_nouns(text):
    assert "<p>4 images of" in text and "measured on 8 images twice" in text
    assert "<p>1 image of" in html.render(small_result(images=1))


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
        calibration=Calibration(1, name),
        notes=[name],
        recovery=hostile_recovery(name),
        options={"dataset_path": name, "model_name": name},
        command=name,
        details=Details(result.details.scores, (name,) * 4, (64, 128), Diagnostics(worst, sensitivity)),
    )


def hostile_recovery(name):
    steps = [dataclasses.replace(step, name=name) for step in small_recovery().steps]
    raised = [RaisedQuantizer(name, "weight", 8)]
    return small_recovery(steps=steps, chosen=name, raised=raised, selection_images=[name])


@pytest.fixture(scope="module")
def plain(result):
    """The parsed page with an ordinary name."""
    return Page(html.render(hostile(result, "x")))


@pytest.fixture(
    scope="module", params=[HOSTILE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE[1:])]
)
def named(result, request):
    """A hostile name, and the page that is full of it."""
    return request.param, html.render(hostile(result, request.param))


def test_hostile_names_stay_text(named, plain):
    name, page = named[0], Page(named[1])
    assert page.elements == plain.elements
    assert page.texts["script"] == plain.texts["script"]
    assert page.texts["title"] == f"{name}: quantization report"
    assert page.texts["command"] == name
    assert dict(page.tables["settings"])["checkpoint"] == name


def test_the_same_result_gives_the_same_page(result, text):
    assert html.render(result) == text


@pytest.fixture(scope="module")
def page_file(text, tmp_path_factory):
    return write_atomically(tmp_path_factory.mktemp("page") / "report.html", text)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("window", WINDOWS)
def test_a_browser_finds_no_fault(page_file, tab, window, dark):
    width, height, phone = WINDOWS[window]
    assert tab.faults(page_file, width, height, dark, phone) == []
    assert tab.evaluate("document.images.length") == 14
    sources = tab.evaluate("[...document.querySelectorAll('picture.chart img')].map(i => i.currentSrc)")
    charts = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    assert len(charts) == 4 and all(("#c9d0da" in chart) == dark for chart in charts)
    paper = Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2))
    assert (paper < 60) == dark


@pytest.mark.slow
def test_tables_sort_and_missing_values_stay_last(page_file, tab):
    tab.open(page_file, 1280, 900)
    column = "[...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[4].dataset.value)"
    click = "document.querySelectorAll('#classes thead button')[4].click()"
    for direction in (1, -1):
        tab.evaluate(click)
        values = tab.evaluate(column)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, key=lambda number: direction * number) and len(numbers) > 10
        assert "" in values and values == [*map(str, values[: len(numbers)]), *[""] * (len(values) - len(numbers))]


@pytest.mark.slow
def test_hostile_names_run_nothing_in_a_browser(named, tab, tmp_path):
    path = write_atomically(tmp_path / "report.html", named[1])
    assert tab.faults(path, 390, 844, phone=True) == []
    assert tab.evaluate("document.title") not in ("", "run")


@pytest.mark.slow
def test_the_page_lets_no_other_script_run(page_file, tab, tmp_path):
    """If escaping ever fails, the browser itself refuses."""
    added = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png' alt=''></body>"
    path = tmp_path / "report.html"
    path.write_text(page_file.read_text().replace("</body>", added))
    tab.open(path, 1280, 900)
    assert tab.evaluate("document.title") != "run"
    assert any("Content Security Policy" in str(entry) for entry in tab.logged)


@pytest.mark.slow
def test_the_page_prints(page_file, tab):
    tab.open(page_file, 1280, 900)
    assert tab.pdf().startswith(b"%PDF")

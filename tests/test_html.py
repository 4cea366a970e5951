"""The report page: its figures against the result, its markup under hostile names, and in a real browser."""

import base64
import io
import json
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import command_line
from datasets.cityscapes import CLASSES, CityscapesSplit
from ffnet import evaluate, html, pictures, report
from ffnet.output import write_whole
from ffnet.sensitivity import Row, Sensitivity
from tests.browser import browser
from tests.conftest import write_tree
from tests.test_pictures import stub

CPU = torch.device("cpu")
VOID_TAGS = {"meta", "img", "source", "br", "link"}
WINDOWS = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
HOSTILE = (
    "<script>document.title='run'</script>",
    '"><img src=x onerror="document.title=\'run\'">',
    "'; } </style></script><script>document.title='run'</script>",
    "{{ 7 * 7 }} {% raw %} &amp; <!-- ]]>",
    'two words, it\'s "quoted" \N{BICYCLE}\N{REGIONAL INDICATOR SYMBOL LETTER D}',
    "javascript:document.title='run'",
    "/very/long" * 300,
    "bytes \udcff that are no text",
    "http://127.0.0.1:9/picture.png",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(result, rows, sensitivity) of two networks on four images of noise."""
    root = tmp_path_factory.mktemp("tree")
    write_tree(root)
    images = CityscapesSplit(root, "val")
    passes = {"FP32": stub(0), "INT8": stub(0.5), "INT8 executed": stub(0.6)}
    scores = evaluate.sweep(passes, evaluate.loader(images, 2, 0, CPU), CPU)
    scores.confusions["INT8"][:, 5] = scores.confusions["INT8"][:, :, 5] = 0
    rows = pictures.render_rows(pictures.worst_images(scores, 2), images, passes, scores, CPU)
    found = [
        Row("conv0", "weight", "weight", 1, 8, 12.5, 97.0, 20.25, 99.0),
        Row("relu", "activation", "output", 2, 8, 30.0, 99.0, 10.5, 95.0),
        Row("conv0", "activation", "input", 0, 8, None, 100.0, 10.0, 95.0),
    ]
    return result_of(scores), rows, Sensitivity(found, 10.0, 95.0, 8)


def result_of(scores, name="segmentation_ffnet40S_dBBB_mobile"):
    result = {
        "model": name,
        "dataset": "Cityscapes val",
        "images": 4,
        "calibration": "calibrated on 4 of the very images that are scored",
        "device": "CPU",
        "checkpoint": "/weights/a.pth",
        "checkpoint_sha256": "0" * 64,
        "checkpoint_form": "state_dict",
        "published": {"FP32": 79.2, "INT8": 78.9},
        "notes": ["figures of noise"],
        "arguments": {"model_name": name, "cle": True, "demo": False, "limit": None, "use_cuda": False},
        "versions": report.versions(),
        "times": {"open": 0.5, "evaluate": 12.25},
        "passes": report.pass_entries(scores),
        "agreement": report.agreement(scores),
    }
    return json.loads(json.dumps(result))


class Page(HTMLParser):
    """A page's elements as (tag, sorted attribute names); its tables as {id: rows of cells}; its pictures."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.ids, self.tables, self.images, self.data = [], [], [], {}, [], []
        self.texts = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, *sorted(attributes)))
        if tag not in VOID_TAGS:
            self.open.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "table":
            self.tables[attributes["id"]] = []
        elif tag == "tr":
            self._table().append([])
        elif tag in ("th", "td"):
            self._table()[-1].append("")
        elif tag == "img":
            self.images.append(attributes)
        self.data += [(key, value) for key, value in attributes.items() if key.startswith("data-")]

    def _table(self):
        return next(self.tables[a["id"]] for tag, a in reversed(self.open) if tag == "table")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> where {self.open[-1:]} is open"
        _, attributes = self.open[-1]
        if tag in ("th", "td") and "data-value" in attributes:
            self._table()[-1][-1] = attributes["data-value"]
        self.open.pop()

    def handle_data(self, data):
        for tag, attributes in self.open:
            if "id" in attributes or tag in ("title", "script", "style"):
                key = attributes.get("id", tag)
                self.texts[key] = self.texts.get(key, "") + data
        if any(tag in ("th", "td") for tag, _ in self.open):
            self._table()[-1][-1] += data

    def close(self):
        super().close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids))

    def numbers(self, table):
        """{first cell: the others as numbers, None where empty} of a table's rows below the headings."""
        return {first: [float(text) if text else None for text in rest] for first, *rest in self.tables[table][1:]}


def test_figures_are_the_results(parts):
    result, rows, found = parts
    page = Page(html.render(*parts))
    passes = result["passes"]
    assert "INT8 executed" in passes
    for name, cells in page.numbers("passes").items():
        entry, published = passes[name], result["published"].get(name)
        drop = None if name == "FP32" else passes["FP32"]["miou"] - entry["miou"]
        beside = None if name == "FP32" or published is None else 79.2 - published
        expected = [entry["miou"], drop, published, beside, entry["pixel_accuracy"], entry["images_per_second"]]
        assert cells == expected
    assert list(page.numbers("passes")) == list(passes)

    classes = page.numbers("classes")
    assert list(classes) == list(CLASSES)
    for name, cells in classes.items():
        ious = [entry["iou"][name] for entry in passes.values()]
        assert cells[:3] == ious
        assert cells[3:] == [None if None in (iou, ious[0]) else iou - ious[0] for iou in ious[1:]]
    assert classes["pole"][1] is None

    for number, entry in enumerate(passes.values(), 1):
        cells = [row[1:] for row in page.tables[f"confusion-{number}"][1:]]
        assert np.array_equal(np.array(cells, float), entry["confusion_matrix"])
    before, after = (np.array(passes[name]["confusion_matrix"], float) for name in ("FP32", "INT8"))
    with np.errstate(invalid="ignore"):
        change = 100 * (np.nan_to_num(after / after.sum(1)[:, None]) - np.nan_to_num(before / before.sum(1)[:, None]))
    shown = np.array([row[1:] for row in page.tables["confusion-change"][1:]], float)
    assert np.allclose(shown, change, atol=1e-9, rtol=0)

    agreement = {pair.replace(" and ", "|"): float(value) for pair, value in page.tables["agreement"]}
    assert agreement == result["agreement"]
    assert {stage: cells[0] for stage, cells in page.numbers("times").items()} == result["times"]
    assert [float(v) for key, v in page.data if key == "data-miou"] == [m for row in rows for m in row.mious.values()]
    assert [float(v) for key, v in page.data if key == "data-agreement"] == [row.agreement for row in rows]
    ranked = page.tables["sensitivity"][1:]
    assert [(row[1], row[4], row[5]) for row in ranked] == [
        (row.layer, "" if row.sqnr_on is None else str(row.sqnr_on), str(row.agreement_on)) for row in found.rows
    ]
    settings = dict(page.tables["settings"])
    assert settings["checkpoint"] == "/weights/a.pth"
    assert {name: settings[name] for name in result["versions"]} == result["versions"]


def test_pictures_are_the_rows(parts):
    _, rows, _ = parts
    panels = [panel for row in rows for panel in row.panels]
    shown = [image for image in Page(html.render(*parts)).images if not image["src"].startswith("data:image/svg")]
    assert len(shown) == len(panels) == 10
    for image, panel in zip(shown, panels, strict=True):
        kind, _, content = image["src"].partition(";base64,")
        assert kind == f"data:{panel.mime}" and base64.b64decode(content) == panel.data
        assert image["alt"].startswith(panel.title)


def test_parts_that_a_run_lacks_are_left_out(parts):
    result, _, _ = parts
    alone = result | {"passes": {"FP32": result["passes"]["FP32"]}, "agreement": {}, "published": {}, "notes": []}
    del (
        alone["checkpoint"],
        alone["checkpoint_sha256"],
        alone["checkpoint_form"],
        alone["calibration"],
    )  # as with --onnx
    page = Page(html.render(alone))
    assert page.images == [] and "sensitivity" not in page.tables and len(page.tables["passes"][1]) == 5


@pytest.mark.parametrize("argv", (
    ["--demo", "--no-cle", "--seed", "3"],
    ["--dataset-path", "/a b/it's <x>", "--use-cuda", "false", "--calibration-split", "train", "--limit", "2"],
    ["--dataset-path", "\N{BICYCLE}", "--model-name", "segmentation_ffnet18_dAAC", "--use-cuda", "--no-compile"],
    ["--onnx", __file__, "--demo", "--batch-size", "2", "--quiet"],
))  # fmt: skip
def test_the_command_repeats_the_run(argv):
    arguments = vars(command_line.parse_args(argv))
    program, script, *again = shlex.split(html.command_line(arguments))
    assert (program, script) == ("python", "ffnet_quanteval.py")
    assert vars(command_line.parse_args(again)) == arguments


def hostile(parts, name):
    """The same report with `name` wherever a user's name can stand."""
    result, rows, found = parts
    result = result | {
        "model": name,
        "dataset": name,
        "checkpoint": name,
        "calibration": name,
        "notes": [name],
        "arguments": {"dataset_path": name, "model_name": name},
    }
    rows = [pictures.Row(**{**vars(row), "name": name}) for row in rows]
    return result, rows, Sensitivity([Row(**{**vars(row), "layer": name}) for row in found.rows], 10.0, 95.0, 8)


@pytest.fixture(scope="module")
def plain(parts):
    return Page(html.render(*hostile(parts, "x")))


@pytest.fixture(scope="module", params=HOSTILE)
def named(parts, request):
    """(name, page that is full of it)"""
    return request.param, html.render(*hostile(parts, request.param))


def test_hostile_names_stay_text(named, plain):
    name, page = named[0], Page(named[1])
    assert page.elements == plain.elements
    assert page.texts["script"] == plain.texts["script"]
    assert page.texts["title"] == f"{name}: what quantization does"
    assert shlex.split(page.texts["command"])[3] == name
    assert dict(page.tables["settings"])["checkpoint"] == name


def test_the_same_result_gives_the_same_page(parts):
    assert html.render(*parts) == html.render(*parts)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("window", WINDOWS)
def test_a_browser_finds_no_fault(parts, tab, tmp_path, window, dark):
    path = html.write_html(tmp_path / "report.html", *parts)
    width, height, phone = WINDOWS[window]
    assert tab.faults(path, width, height, dark, phone) == []
    assert tab.evaluate("document.images.length") == 12
    sources = tab.evaluate("[...document.querySelectorAll('picture.chart img')].map(i => i.currentSrc)")
    charts = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    assert len(charts) == 2 and all(("#c9d0da" in chart) == dark for chart in charts)
    paper = Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2))
    assert (paper < 60) == dark


def test_tables_sort_and_what_is_missing_stays_below(parts, tab, tmp_path):
    tab.open(html.write_html(tmp_path / "report.html", *parts), 1280, 900)
    column = "[...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[4].dataset.value)"
    click = "document.querySelectorAll('#classes thead button')[4].click()"
    for direction in (1, -1):
        tab.evaluate(click)
        values = tab.evaluate(column)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, key=lambda number: direction * number) and len(numbers) > 10
        assert "" in values and values == [*map(str, values[: len(numbers)]), *[""] * (len(values) - len(numbers))]


def test_hostile_names_run_nothing_in_a_browser(named, tab, tmp_path):
    path = write_whole(tmp_path / "report.html", named[1])
    assert tab.faults(path, 390, 844, phone=True) == []
    assert tab.evaluate("document.title") not in ("", "run")


def test_the_page_lets_no_script_but_its_own_run(parts, tab, tmp_path):
    """Should escaping ever fail, the browser itself refuses."""
    added = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png' alt=''></body>"
    path = tmp_path / "report.html"
    path.write_text(html.render(*parts).replace("</body>", added))
    tab.open(path, 1280, 900)
    assert tab.evaluate("document.title") != "run"
    assert any("Content Security Policy" in str(entry) for entry in tab.said)


def test_the_page_prints(parts, tab, tmp_path):
    tab.open(html.write_html(tmp_path / "report.html", *parts), 1280, 900)
    assert tab.pdf().startswith(b"%PDF")

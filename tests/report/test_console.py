"""The console's tables against a result worked by hand, and the table of models against the published one."""

import json
from pathlib import Path

import pytest

from ffnet.report.console import format_console, format_models
from ffnet.report.result import Diagnostics
from tests.helpers.results import small_result, small_sensitivity

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = json.loads((DATA / "variants.json").read_text())
GOLDEN = json.loads((DATA / "golden.json").read_text())


def test_the_heading_names_model_images_and_notes():
    title, note = format_console(small_result()).split("\n\n")[0].splitlines()
    assert title == "segmentation_ffnet40S_dBBB_mobile on 2 images of Cityscapes val, CPU"
    assert note == "Note: a note"
    assert " on 1 image of " in format_console(small_result(images=1))


def test_tables_show_drops_published_values_and_changes():
    backends, agreement, classes, stages = format_console(small_result()).split("\n\n")[1:]
    assert backends.splitlines() == [
        "backend         mIoU %  mIoU drop  published %  drop  images/s",
        "FP32            100.00          -         79.2     -      4.00",
        "INT8 simulated   83.75      16.25         78.9   0.3      2.00",
    ]
    assert agreement.splitlines() == [
        "prediction agreement     pixels %",
        "FP32 and INT8 simulated     93.75",
    ]
    assert classes.splitlines()[:2] == [
        "IoU % per class    FP32  INT8 simulated  change",
        "road             100.00           87.50  -12.50",
    ]
    assert classes.splitlines()[3].split() == ["building", "-", "-", "-"]
    assert stages.splitlines()[1].split() == ["load", "1.2"]


def test_a_run_without_published_values_or_a_second_backend_has_no_columns_for_them():
    backends = {"ONNX file": small_result().backends["FP32"]}
    text = format_console(small_result(published={}, agreement={}, backends=backends))
    assert "published" not in text and "agreement" not in text and "change" not in text


def test_the_most_sensitive_quantizers_are_listed_in_order():
    text = format_console(small_result(diagnostics=Diagnostics(sensitivity=small_sensitivity())))
    (table,) = [part for part in text.split("\n\n") if part.startswith("most sensitive quantizers")]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["conv0", "weight", "weight", "8", "12.5", "+10.25"],
        ["relu", "output", "activation", "8", "30.0", "+0.50"],
        ["conv0", "input", "activation", "8", "-", "+0.00"],
    ]


def test_color_is_used_only_on_request():
    assert "\x1b" not in format_console(small_result())
    text = format_console(small_result(), color=True)
    assert "\x1b[31mroad" in text and "\x1b[31mbuilding" not in text and "\x1b[1mbackend" in text


@pytest.mark.slow
def test_models_are_the_published_ones():
    listed = {line.split()[0]: line.split()[1:] for line in format_models().splitlines()[1:]}
    assert set(listed) == {row["name"] for row in PUBLISHED}
    for row in PUBLISHED:
        millions, unit, size, _, fp32, _ = listed[row["name"]]
        assert (millions, unit, size) == (f"{row['parameters'] / 1e6:.2f}", "M", "1024x2048")
        assert abs(float(fp32) - row["published_fp32_miou"]) <= 0.11
    assert listed["segmentation_ffnet40S_dBBB_mobile"] == ["13.91", "M", "1024x2048", "128x256", "79.2", "78.9"]
    for name, golden in GOLDEN.items():
        if name in listed:
            assert listed[name][3] == "x".join(str(8 * length) for length in golden["shape"][2:])

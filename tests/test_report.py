"""The console's tables, by hand."""

import numpy as np

from ffnet import report
from ffnet.evaluate import Scores


def scores():
    """Two images, two classes: INT8 loses a pixel of the first class to the second."""
    fp32, int8 = np.zeros((2, 19, 19), np.int64), np.zeros((2, 19, 19), np.int64)
    fp32[:, 0, 0], fp32[:, 1, 1] = 4, 2
    int8[:, 0, 0], int8[:, 1, 1] = 4, 2
    int8[0, 0, 0], int8[0, 0, 1] = 3, 1
    return Scores({"FP32": fp32, "INT8": int8}, {("FP32", "INT8"): np.array([7, 8])}, 8, {"FP32": 0.5, "INT8": 1.0})


def result():
    facts = {
        "model": "net",
        "images": 2,
        "dataset": "data",
        "device": "CPU",
        "notes": ["a note"],
        "times": {"load": 1.25},
    }
    entries = {"passes": report.pass_entries(scores()), "agreement": report.agreement(scores())}
    return facts | entries | {"published": {"FP32": 81.3, "INT8": 80.7}}


def test_entries_are_percentages():
    entry = result()["passes"]["INT8"]
    assert entry["iou"]["road"] == 100 * (7 / 8) and entry["iou"]["sidewalk"] == 100 * (4 / 5)
    assert entry["iou"]["sky"] is None
    assert entry["miou"] == 100 * (7 / 8 + 4 / 5) / 2
    assert entry["images_per_second"] == 2 and entry["pixel_accuracy"] == 100 * (11 / 12)
    assert result()["agreement"] == {"FP32|INT8": 100 * (15 / 16)}


def test_tables_are_aligned_and_tell_drop_and_published_figures():
    passes, agreement, classes, times = report.console(result()).split("\n\n")[1:]
    assert passes.splitlines() == [
        "pass  mIoU %   drop  published %  drop  images/s",
        "FP32  100.00      -         81.3     -      4.00",
        "INT8   83.75  16.25         80.7   0.6      2.00",
    ]
    assert agreement.splitlines()[1].split() == ["FP32|INT8", "93.75"]
    assert classes.splitlines()[1].split() == ["road", "100.00", "87.50", "-12.50"]
    assert classes.splitlines()[3].split() == ["building", "-", "-", "-"]
    assert times.splitlines()[1].split() == ["load", "1.2"]


def test_colour_is_only_where_it_is_asked_for():
    assert "\x1b" not in report.console(result())
    painted = report.console(result(), color=True)
    assert "\x1b[31mroad" in painted and "\x1b[31mbuilding" not in painted and "\x1b[1mpass" in painted


def test_passes_that_should_be_alike_are_told_apart():
    assert report.far_apart(scores(), "FP32", "INT8").startswith("100.00 and 83.75 mIoU, 93.75 %")
    same = Scores(scores().confusions, {("FP32", "FP32"): np.array([8, 8])}, 8, {})
    assert report.far_apart(same, "FP32", "FP32") is None

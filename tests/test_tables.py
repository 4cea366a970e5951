"""The CSV files against figures worked out from the predictions, and the list of models against the published one."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from datasets.cityscapes import CLASSES
from ffnet import metrics, report, tables
from ffnet.evaluate import Scores
from ffnet.sensitivity import Row, Sensitivity
from tests.test_model import GOLDEN

VARIANTS = json.loads((Path(__file__).parent / "data" / "variants.json").read_text())
NAMES = [f"ulm_{i:06d}_000019" for i in range(5)]


def labels_and_predictions(seed=0, count=5, size=(16, 32)):
    """Labels with void and few classes (none at all in the last), and {pass: predictions}, of `count` images."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 11, 13, 255], (count, *size)).astype(np.uint8)
    labels[-1] = 255
    passes = {}
    for name, noise in (("FP32", 0.1), ("INT8", 0.3)):
        guess = rng.integers(0, 19, labels.shape).astype(np.uint8)
        passes[name] = np.where((rng.random(labels.shape) < noise) | (labels == 255), guess, labels)
    return labels, passes


def scores_of(labels, passes):
    confusions = {
        name: np.array([metrics.confusion_matrix(*pair) for pair in zip(labels, predictions, strict=True)])
        for name, predictions in passes.items()
    }
    alike = (passes["FP32"] == passes["INT8"]).sum((1, 2))
    return Scores(confusions, {("FP32", "INT8"): alike}, labels[0].size, {"FP32": 1.0, "INT8": 2.0})


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def percent(share):
    return "" if share is None else f"{100 * share:.4f}"


def test_per_image_is_what_the_pixels_say(tmp_path):
    labels, passes = labels_and_predictions()
    paths = [f"/data/<city>/{name}_leftImg8bit.png" for name in NAMES]
    rows = read(tables.write_per_image(tmp_path / "per_image.csv", paths, scores_of(labels, passes)))
    assert [row["image"] for row in rows] == NAMES
    for row, label, *predictions in zip(rows, labels, *passes.values(), strict=True):
        for name, predicted in zip(passes, predictions, strict=True):
            scored = label != 255
            ious = {}
            for index in np.unique(label[scored]):
                hit, either = (label == index) & (predicted == index), (label == index) | (predicted == index) & scored
                ious[CLASSES[index]] = hit.sum() / either.sum()
            assert {c: row[f"{name} IoU {c}"] for c in CLASSES} == {c: percent(ious.get(c)) for c in CLASSES}
            assert row[f"{name} mIoU"] == percent(np.mean(list(ious.values())) if ious else None)
            accuracy = (label == predicted)[scored].mean() if scored.any() else None
            assert row[f"{name} pixel accuracy"] == percent(accuracy)
        assert row["FP32|INT8 agreement"] == percent((predictions[0] == predictions[1]).mean())


def test_per_class_is_the_results(tmp_path):
    labels, passes = labels_and_predictions()
    entries = report.pass_entries(scores_of(labels, passes))
    rows = read(tables.write_per_class(tmp_path / "per_class.csv", {"passes": entries}))
    assert [row["class"] for row in rows] == list(CLASSES)
    for index, row in enumerate(rows):
        ious = {name: entry["iou"][row["class"]] for name, entry in entries.items()}
        assert {name: row[f"{name} IoU"] for name in ious} == {n: percent(v and v / 100) for n, v in ious.items()}
        assert row["labelled pixels"] == str((labels == index).sum())
        change = "" if None in ious.values() else f"{ious['INT8'] - ious['FP32']:.4f}"
        assert row["INT8 - FP32"] == change


def test_sensitivity_keeps_rank_and_leaves_endless_figures_empty(tmp_path):
    first = Row("conv0", "weight", "weight", 1, 8, 12.5, 97.0, 20.25, 99.0)
    exact = Row("relu", "activation", "output", 0, 8, None, 100.0, 10.0, 95.0)
    found = Sensitivity([first, exact], 10.0, 95.0, 8)
    rows = read(tables.write_sensitivity(tmp_path / "sensitivity.csv", found))
    assert [row["layer"] for row in rows] == ["conv0", "relu"]
    assert [row["gain_off"] for row in rows] == ["10.2500", "0.0000"]
    assert [row["sqnr_on"] for row in rows] == ["12.5000", ""] and rows[0]["bits"] == "8"


@pytest.mark.parametrize("name", ('<script>alert("x"),', "a b 'c' \"d\"", "\N{BICYCLE}", "\udcff", "x" * 200))
def test_any_name_survives(tmp_path, name):
    labels, passes = labels_and_predictions(count=1)
    path = tables.write_per_image(tmp_path / "per_image.csv", [f"/x/{name}_leftImg8bit.png"], scores_of(labels, passes))
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert next(csv.DictReader(file))["image"] == name


def test_models_are_the_published_ones():
    listed = {line.split()[0]: line.split()[1:] for line in tables.list_models().splitlines()[1:]}
    assert set(listed) == {row["name"] for row in VARIANTS}
    for row in VARIANTS:
        millions, unit, size, _, fp32, _ = listed[row["name"]]
        assert (millions, unit, size) == (f"{row['parameters'] / 1e6:.2f}", "M", "1024x2048")
        assert abs(float(fp32) - row["published_fp32_miou"]) <= 0.11
    assert listed["segmentation_ffnet40S_dBBB_mobile"][-2:] == ["79.2", "78.9"]
    for name, golden in GOLDEN.items():
        if name in listed:
            assert listed[name][3] == "x".join(str(8 * length) for length in golden["shape"][2:])

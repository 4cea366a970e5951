"""The CSV files against metrics computed from the pixels."""

import csv
import dataclasses

import numpy as np
import pytest

from ffnet.evaluation.scores import FP32
from ffnet.labels import CITYSCAPES
from ffnet.report.csv_files import (
    class_rows,
    comparison_rows,
    image_rows,
    layer_rows,
    recovery_rows,
    sensitivity_rows,
    write_csv,
)
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.results import (
    compared_models,
    comparison_of,
    labels_and_predictions,
    plain_model,
    scores_of,
    small_layers,
    small_npu,
    small_recovery,
    small_result,
    small_sensitivity,
)


def read(path, rows):
    """Return the rows of a CSV file that is written with `rows`."""
    with write_csv(path / "rows.csv", rows).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def percent(share):
    return "" if share is None else f"{100 * share:.4f}"


def test_per_image_agrees_with_the_pixels(tmp_path):
    labels, predictions = labels_and_predictions()
    names = FP32, INT8_SIMULATED
    rows = read(tmp_path, image_rows(small_result(scores_of(labels, predictions))))
    assert [row["image"] for row in rows] == [f"ulm_{i:06d}_000019" for i in range(5)]
    for row, label, *predicted_by_both in zip(rows, labels, *predictions.values(), strict=True):
        for name, predicted in zip(names, predicted_by_both, strict=True):
            scored = label != 255
            ious = {}
            for index in np.unique(label[scored]):
                hit, either = (label == index) & (predicted == index), (label == index) | (predicted == index) & scored
                ious[CITYSCAPES.names[index]] = hit.sum() / either.sum()
            assert {c: row[f"{name} IoU {c}"] for c in CITYSCAPES.names} == {
                c: percent(ious.get(c)) for c in CITYSCAPES.names
            }
            assert row[f"{name} mIoU"] == percent(np.mean(list(ious.values())) if ious else None)
            accuracy = (label == predicted)[scored].mean() if scored.any() else None
            assert row[f"{name} pixel accuracy"] == percent(accuracy)
        assert row["FP32|INT8 simulated agreement"] == percent(np.equal(*predicted_by_both).mean())


def test_per_class_agrees_with_the_result(tmp_path):
    labels, predictions = labels_and_predictions(count=6)
    labels[0, :, :8] = 5  # in one image, so it has no interval
    result = small_result(scores_of(labels, predictions))
    rows = read(tmp_path, class_rows(result))
    assert [row["class"] for row in rows] == list(CITYSCAPES.names)
    for index, row in enumerate(rows):
        ious = {name: entry.iou[row["class"]] for name, entry in result.backends.items()}
        assert {name: row[f"{name} IoU"] for name in ious} == {n: percent(v and v / 100) for n, v in ious.items()}
        counted = labels == index
        assert (row["images"], row["labelled pixels"]) == (str(counted.any((1, 2)).sum()), str(counted.sum()))
        change = f"{ious[INT8_SIMULATED] - ious[FP32]:.4f}" if counted.any() else ""
        assert row["INT8 simulated change"] == change and "FP32 change" not in row
        for kind, name in (("iou_interval", "IoU"), ("iou_change_interval", "change")):
            limits = getattr(result.backends[INT8_SIMULATED], kind).get(row["class"])
            assert bool(limits) == (index in (0, 1, 2, 11, 13))
            shown = [row[f"INT8 simulated {name} {side}"] for side in ("lower", "upper")]
            assert shown == ([f"{limit:.4f}" for limit in limits] if limits else ["", ""])


def test_sensitivity_keeps_the_order_and_leaves_infinite_ratios_empty(tmp_path):
    rows = read(tmp_path, sensitivity_rows(small_sensitivity()))
    assert list(rows[0]) == [
        "layer", "kind", "role", "position", "bits", "sqnr_only_enabled", "agreement_only_enabled",
        "sqnr_only_disabled", "agreement_only_disabled", "gain_only_disabled",
    ]  # fmt: skip
    assert [row["layer"] for row in rows] == ["conv0", "relu", "conv0"]
    assert [row["gain_only_disabled"] for row in rows] == ["10.2500", "0.5000", "0.0000"]
    assert [row["sqnr_only_enabled"] for row in rows] == ["12.5000", "30.0000", ""] and rows[0]["bits"] == "8"


def test_recovery_has_a_row_per_step_with_the_limits_of_its_intervals(tmp_path):
    rows = read(tmp_path, recovery_rows(small_recovery()))
    assert list(rows[0]) == [
        "name", "miou", "miou_lower", "miou_upper", "change", "change_lower", "change_upper", "bit_operations",
        "weight_bytes", "seconds", "outcome",
    ]  # fmt: skip
    assert list(rows[1].values()) == [
        "sequential MSE", "78.5000", "71.0000", "84.5000", "-1.5000", "-2.5000", "-0.5000", "0.500000", "0.500000",
        "20.0000", "kept",
    ]  # fmt: skip
    assert list(rows[4].values())[1:] == [
        "79.1250", "", "", "-0.8750", "", "", "0.625000", "0.562500", "6.0000", "chosen",
    ]  # fmt: skip
    assert [row["outcome"] for row in rows] == ["kept", "kept", "not kept", "not kept", "chosen"]


def test_comparison_has_a_row_per_model_with_its_metrics_and_costs(tmp_path):
    names = ("segmentation_ffnet54S_dBBB_mobile", "segmentation_ffnet78S_BCC_mobile")
    first, second = compared_models(names, (0.9, 0.8), published={FP32: 80.8})
    first = dataclasses.replace(first, result=dataclasses.replace(first.result, npu=small_npu()))
    comparison = comparison_of([first, second])
    rows = read(tmp_path, comparison_rows(comparison))
    assert [row["model"] for row in rows] == list(names)
    for row, model in zip(rows, comparison.models, strict=True):
        fp32, int8 = model.result.backends.values()
        assert row["FP32 mIoU"] == f"{fp32.miou:.4f}" and "FP32 change" not in row
        limits = [row[f"INT8 simulated {k} {limit}"] for k in ("mIoU", "change") for limit in ("lower", "upper")]
        assert limits == [f"{limit:.4f}" for limit in (*int8.miou_interval, *int8.change_interval)]
        assert row["INT8 simulated change"] == f"{int8.miou - fp32.miou:.4f}"
        assert row["report"] == f"{model.result.model}/report.html" and row["images"] == "24"
        assert (row["FP32 published"], row["INT8 simulated published"]) == ("80.8000", "")
        assert (row["parameters"], row["GMACs"]) == (str(model.parameters), f"{model.gmacs:.4f}")
    latencies = [[row[name] for name in ("latency image size", "TFLite ms", "DLC ms", "ONNX ms")] for row in rows]
    assert latencies == [["1024x2048", "4.3870", "7.6050", "5.1730"], ["512x1024", "2.7700", "3.5400", "3.0440"]]
    assert rows[0]["latency device"] == "Samsung Galaxy S25"
    npu = [[row[f"{name}"] for name in ("NPU images", "INT8 NPU mIoU", "INT8 NPU change")] for row in rows]
    assert npu == [["2", "83.7500", "-16.2500"], ["", "", ""]]
    fronts = [[row[f"on the front by {name}"] for name in ("GMACs", "published latency")] for row in rows]
    assert fronts == [["yes", "yes"], ["no", ""]]


def test_comparison_leaves_what_is_unknown_empty(tmp_path):
    (row,) = read(tmp_path, comparison_rows(comparison_of([plain_model("a", 1.0, None)])))
    known = {name for name, value in row.items() if value}
    assert known == {"model", "images", "parameters", "GMACs"}


@pytest.mark.parametrize("name", ('<script>alert("x"),', "a b 'c' \"d\"", "\N{BICYCLE}", "\udcff", "x" * 200))
def test_any_file_name_is_kept(tmp_path, name):
    result = small_result(scores_of(*labels_and_predictions(count=1)))
    details = dataclasses.replace(result.details, image_names=(name,))
    (row,) = read(tmp_path, image_rows(dataclasses.replace(result, details=details)))
    assert row["image"] == name


def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe_and_numbers_keep_their_sign(tmp_path):
    formulas = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", "＝1"]
    rows = read(tmp_path, [{"name": name, "change": -1.5, "number": -2} for name in [*formulas, "ulm=1"]])
    assert [row["name"] for row in rows] == [*(f"'{name}" for name in formulas), "ulm=1"]
    assert {(row["change"], row["number"]) for row in rows} == {("-1.5000", "-2")}


def test_the_files_open_with_umlauts_in_spreadsheets(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [{"image": "köln"}])
    assert path.read_bytes() == b"\xef\xbb\xbfimage\nk\xc3\xb6ln\n"


def test_layers_have_the_sqnr_of_every_backend_in_total_and_for_the_same_input(tmp_path):
    image, layer = read(tmp_path, layer_rows(small_layers()))
    assert list(layer)[3:] == [
        "INT8 simulated SQNR", "INT8 simulated SQNR, same input", "INT8 NPU SQNR", "INT8 NPU SQNR, same input",
    ]  # fmt: skip
    assert list(image.values()) == ["image", "image", "8", "40.0000", "40.0000", "", ""]
    assert list(layer.values()) == ["conv0", "module_add_1", "8", "20.0000", "30.0000", "50.0000", "60.0000"]

"""The tables as the console prints them: worked by hand, and the table of models against the published one."""

import dataclasses
import json
from pathlib import Path

import pytest

from ffnet.evaluation.scores import FP32, BackendNames
from ffnet.labels import CITYSCAPES
from ffnet.report import models, tables
from ffnet.report.rendering import LEGEND, format_comparison, format_console
from ffnet.results import result as results
from ffnet.results.result import Diagnostics
from ffnet.variants import VARIANTS
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.results import (
    comparison_of,
    plain_model,
    several_chips,
    small_npu,
    small_recovery,
    small_result,
    small_scores,
    small_sensitivity,
    unlabelled_recovery,
)

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = json.loads((DATA / "variants.json").read_text())
GOLDEN = json.loads((DATA / "golden.json").read_text())
ENTRY = dataclasses.replace(
    small_result().backends[INT8_SIMULATED],
    miou_interval=(70.83, 100.0),
    change_interval=(-29.17, 0.0),
    iou_change_interval={"road": (-25.0, 0.5), "sidewalk": None},
)


def test_the_heading_names_model_images_and_notes():
    title, note = format_console(small_result()).split("\n\n")[0].splitlines()
    assert title == "segmentation_ffnet40S_dBBB_mobile on 2 images of Cityscapes val, CPU"
    assert note == "Note: a note"
    assert " on 1 image of " in format_console(small_result(images=1))


def test_tables_show_changes_published_values_and_intervals():
    result = small_result(backends=small_result().backends | {INT8_SIMULATED: ENTRY})
    backends, agreement, classes, stages = format_console(result).split("\n\n")[1:5]
    assert backends.splitlines() == [
        "backend         mIoU %          95 % CI  change         95 % CI  published %  change  pixel accuracy %",
        "FP32            100.00                -       -               -         79.2       -            100.00",
        "INT8 simulated   83.75  [70.83, 100.00]  -16.25  [-29.17, 0.00]         78.9    -0.3             91.67",
    ]
    assert agreement.splitlines() == [
        "prediction agreement     pixels %",
        "FP32 and INT8 simulated     93.75",
    ]
    assert classes.splitlines()[:3] == [
        "IoU % per class   images    FP32  INT8 simulated  change         95 % CI",
        "road             2 (few)  100.00           87.50  -12.50  [-25.00, 0.50]",
        "sidewalk         2 (few)  100.00           80.00  -20.00               -",
    ]
    assert classes.splitlines()[4].split() == ["wall", "0", "(few)", "-", "-", "-", "-"]
    assert [" ".join(line.split()) for line in stages.splitlines()] == [
        "time seconds images/s", "load 1.2 -", "evaluate 12.2 -", "network: FP32 0.5 4.00",
        "network: INT8 simulated 1.0 2.00", "total 13.5 -",
        "Images/s: the network alone, wall time, CPU. The simulation's speed says nothing about a device.",
    ]  # fmt: skip
    assert "load" not in tables.times_table(result, 2.0).format()


def test_columns_of_confidence_intervals_appear_only_if_there_are_any():
    assert "CI" not in format_console(small_result())
    assert format_console(small_result(backends={INT8_SIMULATED: ENTRY})).count("95 % CI") == 2


def test_a_network_that_is_not_w8a8_is_named_after_its_bits():
    names = BackendNames("W4A8 mixed")
    backends = results.backend_results(small_scores(), names, CITYSCAPES.names)
    text = format_console(small_result(precision=names.precision, backends=backends, published={}))
    assert "\nW4A8 mixed simulated   83.75  -16.25" in text and "FP32  W4A8 mixed simulated  change" in text
    models = [plain_model("a", 1.0, 70.0, precision=precision) for precision in ("W4A8", "W4A8", "INT8")]
    headings = [format_comparison(comparison_of(part)).split("\n\n")[1].split("  ")[2] for part in (models[:2], models)]
    assert headings == ["W4A8 %", "quantized %"]


def test_the_images_of_the_npu_have_their_own_tables():
    text = format_console(small_result(npu=small_npu(published={FP32: 76.8, INT8_NPU: 76.5})))
    (metrics,) = [part for part in text.split("\n\n") if part.startswith("on the 2 images of the NPU  ")]
    rows = [line.split() for line in metrics.splitlines()[1:]]
    assert [row[0] for row in rows] == ["FP32", "INT8"]
    assert rows[1][2] == "83.75" and rows[1][-3:] == ["76.5", "-0.3", "91.67"]
    assert "prediction agreement on the 2 images of the NPU  pixels %\nFP32 and INT8 NPU" in text


def test_a_run_without_published_values_or_a_second_backend_has_no_columns_for_them():
    backends = {"ONNX file": small_result().backends["FP32"]}
    text = format_console(small_result(published={}, agreement={}, backends=backends))
    assert "published" not in text and "agreement" not in text and text.count("change") == 1


def test_the_most_sensitive_quantizers_are_listed_in_order():
    text = format_console(small_result(diagnostics=Diagnostics(sensitivity=small_sensitivity())))
    (table,) = [part for part in text.split("\n\n") if "most sensitive quantizers" in part]
    assert [" ".join(line.split()) for line in table.splitlines()[1:]] == [
        "1 conv0 weight weight 8 12.5 97.00 +10.25 99.00",
        "2 relu output activation 8 30.0 99.00 +0.50 95.00",
        "3 conv0 input activation 8 - 100.00 +0.00 95.00",
    ]


def test_the_steps_of_accuracy_recovery_are_listed_below_fp32():
    parts = format_console(small_result(recovery=small_recovery())).split("\n\n")
    steps, raised = parts[3:5]
    assert [" ".join(line.split()) for line in steps.splitlines()] == [
        "# recovery, on 4 selection images (FP32: 80.00 %) mIoU % 95 % CI change 95 % CI bit ops, % of W8A8 weight "
        "bytes, % of W8A8 seconds outcome",
        "1 plain 78.00 [70.00, 84.00] -2.00 [-3.00, -1.00] 50.00 50.00 10.0 kept",
        "2 sequential MSE 78.50 [71.00, 84.50] -1.50 [-2.50, -0.50] 50.00 50.00 20.0 kept",
        "3 sequential MSE and AdaRound 78.25 [70.50, 84.25] -1.75 [-2.75, -0.75] 50.00 50.00 90.0 not kept",
        "4 mixed precision, 2 of 10 raised 79.25 [72.00, 85.00] -0.75 [-1.50, 0.00] 81.25 62.50 7.2 not kept",
        "5 mixed precision, 1 of 10 raised 79.12 - -0.88 - 62.50 56.25 6.0 chosen",
    ]
    assert [line.split() for line in raised.splitlines()] == [
        ["raised", "quantizers", "(2)", "tensor", "bits"],
        ["conv0", "weight", "8"],
        ["relu", "output", "16"],
    ]


def test_accuracy_recovery_on_unlabelled_images_has_dashes_and_no_intervals():
    text = format_console(small_result(recovery=unlabelled_recovery()))
    (steps,) = [part for part in text.split("\n\n") if "recovery, on 4 selection images (FP32: - %)" in part]
    assert "CI" not in steps and steps.splitlines()[1].split()[1:] == [
        "plain",
        "-",
        "-",
        "50.00",
        "50.00",
        "10.0",
        "kept",
    ]
    assert "raised quantizers" not in text and "recovery" not in format_console(small_result())


def test_the_comparison_has_its_models_fronts_and_answers():
    models = [
        plain_model("segmentation_ffnet_b", 20.25, 72.0, ms=4.0),
        plain_model("segmentation_ffnet_a", 10.0, 70.0, published={FP32: 71.5}, npu=small_npu()),
    ]
    heading, table, backends, gmacs, latency, legend, answers = format_comparison(comparison_of(models)).split("\n\n")
    title, *notes = heading.splitlines()
    assert title == "Comparison of 2 models on 500 images of Cityscapes val, 1024x2048, CPU"
    assert notes[0] == "Note: a note" and all(note.startswith("Note: ") for note in notes)
    assert table.splitlines() == [
        " #  model (segmentation_...)  INT8 %  M params  GMACs  latency ms         at   on front",
        " 1  ffnet_b                    72.00      1.00   20.2     -/4.0/-  1024x2048  GMACs, ms",
        " 2  ffnet_a                    70.00      1.00   10.0           -          -      GMACs",
    ]
    assert backends.splitlines() == [
        "model           backend  images  mIoU %         95 % CI  change         95 % CI  published %  "
        "pixel accuracy %",
        "ffnet_b            FP32     500   73.00  [71.00, 73.00]       -               -            -  "
        "           91.67",
        "ffnet_b  INT8 simulated     500   72.00  [71.00, 73.00]   -1.00  [-1.50, -0.50]            -  "
        "           91.67",
        "ffnet_a            FP32     500   71.00  [69.00, 71.00]       -               -         71.5  "
        "           91.67",
        "ffnet_a  INT8 simulated     500   70.00  [69.00, 71.00]   -1.00  [-1.50, -0.50]            -  "
        "           91.67",
        "ffnet_a        INT8 NPU       2   83.75               -  -16.25               -            -  "
        "           91.67",
    ]
    assert gmacs.splitlines() == [
        "Pareto front by GMACs  GMACs  mIoU %   gain       95 % CI  excludes 0",
        "ffnet_a                 10.0   70.00      -             -           -",
        "ffnet_b                 20.2   72.00  +2.00  [2.00, 2.00]         yes",
    ]
    assert latency.splitlines() == [
        "Pareto front by published latency   ms  mIoU %  gain  excludes 0",
        "ffnet_b                            4.0   72.00     -           -",
    ]
    assert legend == LEGEND
    assert [answer.split(", of")[0] for answer in answers.splitlines()] == ["By GMACs", "By published latency"]


def test_columns_and_tables_of_a_comparison_without_values_are_left_out():
    heading, table, _ = format_comparison(comparison_of([plain_model("a", 1.0, None)])).split("\n\n")
    assert heading.startswith("Comparison of 1 model on")
    assert table.splitlines()[1].split() == ["1", "a", "-", "1.00", "1.0"]
    for word in ("latency", "front"):
        assert word not in table


def test_models_show_what_ai_hub_measured_on_a_galaxy_s25(monkeypatch):
    names = (
        "segmentation_ffnet40S_dBBB_mobile",
        "segmentation_ffnet122NS_CCC_mobile",
        "segmentation_ffnet18_dAAA",
    )
    monkeypatch.setattr(models, "VARIANTS", {name: VARIANTS[name] for name in names})
    table, note = models.format_models().split("\n\n")
    heading, *rows = table.splitlines()
    assert heading.endswith("FP32 mIoU  INT8 mIoU  S25 input  S25 float mIoU  S25 W8A8 mIoU  S25 W8A8 ms")
    assert [row.split()[-4:] for row in rows] == [
        ["1024x2048", "76.8", "76.6", "4.0/7.2/4.9"],
        ["512x1024", "76.2", "76.2", "2.1/2.8/2.4"],
        ["-", "-", "-", "-"],
    ]
    assert "Qualcomm AI Hub Models 0.65.0" in note


@pytest.mark.slow
def test_models_are_the_published_ones():
    table, _ = models.format_models().split("\n\n")
    listed = {line.split()[0]: line.split()[1:-4] for line in table.splitlines()[1:]}
    assert set(listed) == {row["name"] for row in PUBLISHED}
    for row in PUBLISHED:
        millions, unit, size, _, fp32, _ = listed[row["name"]]
        assert (millions, unit, size) == (f"{row['parameters'] / 1e6:.2f}", "M", "1024x2048")
        assert abs(float(fp32) - row["published_fp32_miou"]) <= 0.11
    assert listed["segmentation_ffnet40S_dBBB_mobile"] == ["13.91", "M", "1024x2048", "128x256", "79.2", "78.9"]
    for name, golden in GOLDEN.items():
        if name in listed:
            assert listed[name][3] == "x".join(str(8 * length) for length in golden["shape"][2:])


def test_the_table_of_chips_shows_groups_refusals_and_what_ai_hub_measured():
    result = small_result(**several_chips())
    rows = [line.split() for line in tables.chips_table(result).format().splitlines()[1:]]
    changed, refused, same, equal = rows
    assert changed[:5] == ["sm8450", "v69", "sm8450", "83.75", "-16.25"] and same == ["sm8650", "v75", *changed[2:]]
    assert refused[:5] == ["qcs6490", "v68", "-", "-", "-"] and " ".join(refused[-3:]) == "refuses conv0 (Conv2d)"
    assert equal[2:6] == ["sm8750", "100.00", "+0.00", "-0.2"] and "4.0/-/5.0" in equal
    assert "on the 2 images" not in format_console(result)  # the table of chips has the same metrics
    assert "chip" not in format_console(small_result(npu=small_npu(), npu_chips=several_chips()["npu_chips"][:1]))

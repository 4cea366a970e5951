"""The comparison on the console, worked by hand."""

import dataclasses

from ffnet.evaluation.backends import FP32
from ffnet.report.comparison_console import LEGEND, format_comparison
from tests.helpers.results import comparison_of, plain_model, small_npu


def test_the_comparison_has_its_models_fronts_and_answers():
    models = [
        plain_model("segmentation_ffnet_b", 20.25, 72.0, ms=4.0),
        plain_model("segmentation_ffnet_a", 10.0, 70.0, published={FP32: 71.5}),
    ]
    heading, table, gmacs, latency, legend, answers = format_comparison(comparison_of(models)).split("\n\n")
    title, *notes = heading.splitlines()
    assert title == "Comparison of 2 models on 500 images of Cityscapes val, 1024x2048, CPU"
    assert notes[0] == "Note: a note" and all(note.startswith("Note: ") for note in notes)
    assert table.splitlines() == [
        "model (segmentation_...)  FP32 %  INT8 %  drop       95 % CI  published %  M params  GMACs  "
        "latency ms   on front",
        "ffnet_b                    73.00   72.00  1.00  [0.50, 1.50]            -      1.00   20.2  "
        "   -/4.0/-  GMACs, ms",
        "ffnet_a                    71.00   70.00  1.00  [0.50, 1.50]       71.5/-      1.00   10.0  "
        "         -      GMACs",
    ]
    assert gmacs.splitlines() == [
        "Pareto front by GMACs  GMACs  INT8 %   gain       95 % CI  excludes 0",
        "ffnet_a                 10.0   70.00      -             -           -",
        "ffnet_b                 20.2   72.00  +2.00  [2.00, 2.00]         yes",
    ]
    assert latency.splitlines() == [
        "Pareto front by published latency   ms  INT8 %  gain  excludes 0",
        "ffnet_b                            4.0   72.00     -           -",
    ]
    assert legend == LEGEND
    assert [answer.split(", of")[0] for answer in answers.splitlines()] == ["By GMACs", "By published latency"]


def test_columns_and_tables_without_values_are_left_out():
    text = format_comparison(comparison_of([plain_model("a", 1.0, None)]))
    heading, table = text.split("\n\n")
    assert heading.startswith("Comparison of 1 model on")
    assert table.splitlines()[1].split() == ["a", "-", "-", "-", "1.00", "1.0"]
    for word in ("published", "latency", "front", "backend"):
        assert word not in table


def test_other_backends_have_a_table_with_their_number_of_images():
    model = plain_model("a", 1.0, 70.0, npu=small_npu())
    table = format_comparison(comparison_of([model, dataclasses.replace(model, name="b", npu=None)])).split("\n\n")[2]
    assert table.splitlines() == [
        "other INT8 backends   backend  images  mIoU %  mIoU drop        95 % CI",
        "a                    INT8 NPU       2   83.75      16.25  [0.00, 29.17]",
    ]

"""The table of `benchmarks.accuracy_recovery`, and its rows from results made by hand."""

import dataclasses

import pytest

from benchmarks.accuracy_recovery import COLUMNS, format_row, format_rows
from benchmarks.accuracy_recovery_measurements import RUNS, make_row
from ffnet.evaluation.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.options import check_bit_widths
from tests.helpers.results import small_npu, small_recovery, small_result


@pytest.fixture
def result():
    backends = small_result().backends
    third = {INT8_ONNX_RUNTIME: backends[INT8_SIMULATED]}
    return small_result(backends=backends | third, npu=small_npu(), recovery=small_recovery())


def test_a_row_has_the_metrics_of_its_result(result):
    row = make_row("net", "W4A8", "--max-drop 0.3", result)
    step = result.recovery.chosen_step
    assert (row.fp32_miou, row.simulated_miou) == tuple(result.backends[name].miou for name in (FP32, INT8_SIMULATED))
    assert row.npu_miou == list(result.npu.backends.values())[-1].miou
    assert (row.bit_operations, row.weight_bytes, row.chosen) == (step.bit_operations, step.weight_bytes, step.name)
    assert len(format_row(row)) == len(COLUMNS)


def test_what_was_not_measured_is_a_dash(result):
    plain = dataclasses.replace(result, npu=None, recovery=None, stage_seconds={})
    cells = dict(zip(COLUMNS, format_row(make_row("net", "W8A8", "", plain)), strict=True))
    assert cells["options"] == "(none)"
    assert {cells[name] for name in ("NPU", "simulated there", "nodes on CPU", "weight bytes", "recovery s")} == {"-"}
    assert format_rows([make_row("net", "W8A8", "", plain)]).splitlines()[0].split()[:2] == ["network", "bits"]


def test_all_runs_can_be_exported():
    for _, _, quantization in RUNS:
        check_bit_widths(quantization.param_bw, quantization.output_bw)

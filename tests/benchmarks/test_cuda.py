"""The parts of `benchmarks.cuda` on the CPU, with a small network, and their tables and limits."""

import dataclasses
import json
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda, program
from benchmarks import cuda_measurements as measurements
from benchmarks.cuda import Part, PartResult
from benchmarks.cuda_measurements import (
    AIMET,
    ONNX_FP32,
    Bench,
    Execution,
    Machine,
    Peaks,
    ProgramTime,
    Settings,
    Speed,
    StageTime,
)
from benchmarks.measured_program import SMALL_VARIANTS
from benchmarks.time_budget import Budget, OutOfTime, time_limit
from ffnet.evaluation.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.variants import VARIANTS

SETTINGS = Settings(
    torch.device("cpu"),
    next(iter(SMALL_VARIANTS)),
    size=(64, 128),
    scenes=2,
    batch_sizes=(1, 2, 4),
    rounds=1,
    round_seconds=0,
    stage_batch_size=3,
    program_images=5,
    programs=((1, 2),),
)


@pytest.fixture(scope="module")
def small_variant():
    name = SETTINGS.model_name
    VARIANTS[name] = SMALL_VARIANTS[name]
    yield name
    del VARIANTS[name]


@pytest.fixture(scope="module")
def bench(small_variant, tmp_path_factory):
    with torch.no_grad():
        yield Bench(SETTINGS, tmp_path_factory.mktemp("bench"))


class Full(torch.nn.Module):
    """A network for whose batches of more than two images the memory does not suffice."""

    def forward(self, images):
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return images


def part(measure, **changes):
    return Part("part", ("a", "b"), measure, lambda row: [row, row], **changes)


def test_every_backend_is_measured_at_every_batch_size(bench):
    rows = list(measurements.backend_speeds(bench))
    assert [(row.backend, row.batch_size) for row in rows] == [
        (backend, size) for backend in (FP32, INT8_SIMULATED, AIMET) for size in (1, 2, 4)
    ]
    assert all(row.image_seconds > 0 and row.failure is None for row in rows)


def test_a_batch_that_does_not_fit_is_reported_and_larger_ones_are_left_out(bench, monkeypatch):
    monkeypatch.setattr(bench, "network", lambda backend: Full())
    monkeypatch.setattr(bench, "settings", dataclasses.replace(SETTINGS, batch_sizes=(2, 4, 8)))
    rows = list(measurements.backend_speeds(bench))[:3]
    assert rows[0].failure is None and rows[1].failure == "out of memory"
    assert cuda.format_speed(rows[1]) == [FP32, "4", "out of memory", "-"]
    assert rows[2].failure == "left out, because a smaller batch failed"


def test_what_cudnn_says_without_memory_counts_as_out_of_memory():
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert measurements.failure_reason(error) == "out of memory"
    assert measurements.failure_reason(ValueError("a | b\nc")) == "ValueError: a / b"


def test_the_reason_of_a_failure_is_its_first_cause():
    error = RuntimeError("Failed to export. This is step 2 of 3.")
    error.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    assert measurements.failure_reason(error) == "out of memory"
    error.__cause__ = subprocess.CalledProcessError(2, ["python", "a" * 200])
    assert measurements.failure_reason(error) == "exit status 2, see stderr"


def test_a_simulation_that_cannot_be_built_is_tried_once_and_fp32_goes_on(small_variant, tmp_path, monkeypatch):
    tries = []

    def fail(*arguments, **options):
        tries.append(1)
        raise ValueError("no compiler")

    monkeypatch.setattr(measurements, "quantize", fail)
    rows = list(measurements.backend_speeds(Bench(SETTINGS, tmp_path)))
    assert [row.failure for row in rows if row.batch_size == 1] == [None, *["ValueError: no compiler"] * 2]
    assert len(tries) == 1


def test_tf32_and_layout_are_combined_eager_and_compiled(bench, monkeypatch):
    compiled = []

    def compile(network, dynamic):
        def run(images):
            compiled.append((torch.backends.cudnn.allow_tf32, images.is_contiguous(memory_format=torch.channels_last)))
            return network(images)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    assert all(row.compile_seconds is None for row in measurements.execution_speeds(bench, 2, compiled=False))
    assert not compiled
    rows = list(measurements.execution_speeds(bench, 2, compiled=True))
    assert all(row.compile_seconds > 0 and row.failure is None for row in rows)
    combinations = {(row.execution.tf32, row.execution.channels_last) for row in rows}
    assert len(rows) == 8 and combinations == set(compiled) and len(combinations) == 4
    measurements.allow_tf32(False)


def test_every_stage_of_scoring_is_measured(bench):
    rows = list(measurements.stage_times(bench))
    assert all(row.seconds > 0 and row.failure is None for row in rows)
    assert [row.stage for row in rows][-3:] == ["upsample and argmax", "confusion matrices", "prediction agreement"]


@pytest.mark.slow
def test_the_exported_files_run_in_onnx_runtime(bench):
    rows = list(measurements.onnx_speeds(bench))
    assert [row.backend for row in rows] == [INT8_ONNX_RUNTIME, ONNX_FP32]
    assert all(row.image_seconds > 0 and row.failure is None for row in rows)


@pytest.mark.slow
def test_the_program_scores_links_to_the_scenes(bench):
    (row,) = measurements.program_times(bench)
    assert row.failure is None and row.images == 5
    assert 0 < row.stage_seconds["evaluate"] < row.seconds
    assert len(list(bench.images.root.rglob("*_leftImg8bit.png"))) == 5


def test_a_run_of_the_program_that_fails_is_a_row_with_the_reason(bench, monkeypatch):
    def fail(options, cuda):
        raise ValueError("exit status 2")

    monkeypatch.setattr(measurements, "run_program", fail)
    row = measurements.time_program(bench, bench.folder / "weights.pth", ProgramTime(4, None, 5))
    assert cuda.format_program(row) == ["all", "4", "5", "ValueError: exit status 2", "-", "-"]


def test_rows_that_were_measured_before_a_failure_are_printed(capsys):
    def measure():
        yield "1"
        raise RuntimeError("a kernel\nis missing")

    result = cuda.run_part(part(measure), Budget(100))
    assert list(result.rows) == ["1"] and result.problem == "Failed: RuntimeError: a kernel"
    assert capsys.readouterr().out.splitlines() == [
        "", "#### part", "", "| a | b |", "| --- | --- |", "| 1 | 1 |", "", "Failed: RuntimeError: a kernel",
    ]  # fmt: skip


def test_a_part_for_which_too_little_time_is_left_is_left_out(capsys):
    measured = []
    reserved = cuda.run_part(part(lambda: measured, least_seconds=30, reserved_seconds=80), Budget(100))
    assert reserved.problem == "Left out: too little of the 100 s was left. Give more --minutes."
    assert not reserved.rows and reserved.problem in capsys.readouterr().out
    assert cuda.run_part(part(lambda: measured, least_seconds=30), Budget(100)).problem is None


def test_a_part_is_stopped_when_its_time_is_over_also_within_code_that_handles_exceptions():
    def measure():
        yield "1"
        try:
            time.sleep(10)
        except Exception:
            yield "not reached"

    result = cuda.run_part(part(measure, least_seconds=0), Budget(0.2))
    assert list(result.rows) == ["1"] and result.problem.startswith("Stopped: its time was over after 0 s.")


def test_the_budget_counts_from_its_beginning():
    clock = iter([10.0, 12.0, 17.0]).__next__
    budget = Budget(5, clock)
    assert (budget.used, budget.left) == (2, -2)


def test_after_the_block_no_limit_is_left():
    with pytest.raises(OutOfTime), time_limit(0.01):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_peaks_of_an_h100_are_those_of_its_data_sheet():
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000)
    peaks = measurements.peaks_of(h100)
    assert peaks.fp32 == pytest.approx(66.9e12, rel=1e-3)  # NVIDIA: 67 TFLOP/s
    assert peaks.tf32 == pytest.approx(494.7e12 * 1.98 / 1.83, rel=1e-3)  # NVIDIA: 494.7 at 1.83 GHz
    assert measurements.peaks_of(SimpleNamespace(major=9, minor=0, multi_processor_count=132)) == Peaks()
    assert measurements.peaks_of(SimpleNamespace(**{**vars(h100), "major": 99})) == Peaks()


def test_the_line_of_the_machine_leaves_out_what_is_unknown():
    machine = Machine("a GPU", "3.12.0", "2.11.0", 16, "12.8", 91900, 132, 1.98e9, 80 * 10**9, Peaks(67e12, None))
    assert cuda.describe_machine(machine) == (
        "a GPU; 132 multiprocessors, 80 GB; CUDA 12.8, cuDNN 91900; torch 2.11.0, Python 3.12.0, 16 CPU cores; "
        "at most FP32 67.0 TFLOP/s at its highest clock rate, 1.98 GHz"
    )
    assert "TFLOP/s" not in cuda.describe_machine(dataclasses.replace(machine, peaks=Peaks()))


def test_the_share_is_of_the_bound_of_the_arithmetic():
    row = Speed(FP32, 8, Execution(), image_seconds=0.004)
    peaks = Peaks(fp32=64e12, tf32=480e12)
    assert cuda.format_share(row, 96 * 10**9, peaks) == "75.0"  # 192 GFLOP in 4 ms are 48 TFLOP/s
    in_tf32 = dataclasses.replace(row, execution=Execution(tf32=True))
    assert cuda.format_share(in_tf32, 96 * 10**9, peaks) == "10.0"
    assert cuda.format_share(row, 96 * 10**9, Peaks()) == "-"


def test_cells_are_as_many_as_columns():
    speed = Speed(FP32, 8, Execution(tf32=True, channels_last=True, compiled=True), 0.004, 12.3)
    assert cuda.format_speed(speed) == [FP32, "8", "4.00", "250.0"]
    assert cuda.format_execution(speed) == [
        "FP32, batch size 8", "on", "channels_last", "compiled", "12.3", "4.00", "250.0",
    ]  # fmt: skip
    assert len(cuda.format_execution(speed)) + 1 == len(cuda.EXECUTION_COLUMNS)
    assert cuda.format_stage(StageTime("predict", 2, 0.004), 8) == ["predict", "2", "4.000", "1.000"]
    program = ProgramTime(16, 16, 500, 40.0, {"calibrate": 5.04, "evaluate": 12.0})
    cells = cuda.format_program(program)
    assert cells == ["16", "16", "500", "40.0", "12.5", "calibrate 5.0, evaluate 12.0"]
    assert len(cells) == len(cuda.PROGRAM_COLUMNS)


def test_the_best_batch_size_is_that_of_the_fastest_fp32():
    rows = [Speed(FP32, 1, image_seconds=3), Speed(FP32, 2, image_seconds=2), Speed(FP32, 4, failure="out of memory")]
    assert cuda.best_batch_size([*rows, Speed(AIMET, 8, image_seconds=1)], 8) == 2
    assert cuda.best_batch_size(rows[2:], 8) == 8


def test_all_parts_are_written_to_the_file_with_their_problems(bench, monkeypatch, tmp_path, capsys):
    row = Speed(FP32, 2, image_seconds=0.5)
    made = [part(lambda: [row.backend]), dataclasses.replace(part(lambda: [1 / 0]), title="other")]
    monkeypatch.setattr(cuda, "make_parts", lambda *arguments: made)
    results = cuda.run_parts(bench, Budget(100), tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["parts"]["part"]["rows"] == [FP32] and written["model"] == SETTINGS.model_name
    assert written["parts"]["other"]["problem"].startswith("Failed: ZeroDivisionError")
    assert results["part"] == PartResult([FP32], results["part"].seconds)
    assert capsys.readouterr().out.splitlines()[-1].endswith("Not complete: other.")


def test_the_parts_use_the_best_batch_size_and_slow_ones_leave_time_to_the_program(bench):
    results = {cuda.BACKENDS_TITLE: PartResult([Speed(FP32, 2, image_seconds=0.5)], 1.0)}
    parts = {each.title: each for each in cuda.make_parts(bench, Peaks(), results)}
    first = next(iter(parts["TF32 and layout"].measure()))
    assert first.batch_size == 2
    assert len(parts["TF32 and layout"].format(first)) == len(parts["TF32 and layout"].columns)
    assert [title for title, each in parts.items() if each.reserved_seconds] == ["ONNX Runtime on the CPU", "Compiled"]


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_of_the_program_is_killed(monkeypatch):
    processes = []

    def interrupt(process):
        processes.append(process)
        raise OutOfTime

    monkeypatch.setattr(program, "watch_npu_processes", interrupt)
    with pytest.raises(OutOfTime):
        program.run_program(["--demo"])
    assert processes[0].returncode == -signal.SIGKILL


@pytest.mark.cuda
def test_what_needs_no_compiler_runs_on_a_gpu(small_variant, tmp_path):
    device = torch.device("cuda")
    assert measurements.describe_machine(device).multiprocessors
    bench = Bench(dataclasses.replace(SETTINGS, device=device), tmp_path)
    with torch.no_grad():
        rows = [*measurements.backend_speeds(bench), *measurements.execution_speeds(bench, 2, compiled=False)]
        rows += measurements.stage_times(bench)
    assert not [row for row in rows if row.failure]

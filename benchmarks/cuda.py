"""Measure on a GPU how fast the backends, the stages of scoring and the whole program are.

    python -m benchmarks.cuda [--json FILE] [--minutes M] [--model-name NAME] [--images N]

Every part is printed as soon as it is measured, as a Markdown table. If one fails, its error is printed in one line and
the others go on. If the time runs out, the later parts are left out, and a line says which. The weights are random,
because speed does not depend on them; a few scenes are rendered, and N links to them make up a data set. Linux only.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_measurements as measurements
from benchmarks.cuda_measurements import Bench, Machine, Peaks, ProgramTime, Settings, Speed, StageTime
from benchmarks.tables import markdown_heading, markdown_row
from benchmarks.time_budget import Budget, OutOfTime, time_limit
from ffnet.evaluation.backends import FP32
from ffnet.system.text import format_number
from ffnet.variants import VARIANTS

# The slow parts that are not the last leave this time, in seconds, to the program.
PROGRAM_SECONDS = 150.0
COMPILED_SECONDS = 120.0  # that ONNX Runtime leaves to compilation
BACKENDS_TITLE = "Backends"
SPEED_COLUMNS = ("backend", "batch size", "per image, ms", "images/s")
SHARE_COLUMN = "share of the bound, %"
EXECUTION_COLUMNS = ("backend", "TF32", "layout", "mode", "compilation, s", "per image, ms", "images/s", SHARE_COLUMN)
STAGE_COLUMNS = ("stage", "calls per batch", "per call, ms", "per image, ms")
PROGRAM_COLUMNS = ("calibration images", "decoding threads", "images", "whole run, s", "images/s", "stages, s")


@dataclass(frozen=True)
class Part:
    """One table of measurements."""

    title: str
    columns: Sequence[str]
    measure: Callable[[], Iterable[Any]]  # yields rows
    format: Callable[[Any], Sequence[str]]  # returns the cells of a row
    least_seconds: float = 5  # with less time left, it is not begun
    reserved_seconds: float = 0  # that it leaves to the later parts


@dataclass(frozen=True)
class PartResult:
    """The rows of a part, and why there are no more of them if it did not end."""

    rows: Sequence[Any]
    seconds: float
    problem: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Print all tables and return the exit status."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.cuda: torch finds no CUDA device. Run it on a machine with a GPU.", file=sys.stderr)
        return 2
    settings = Settings(torch.device("cuda"), args.model_name, program_images=args.images)
    with tempfile.TemporaryDirectory() as folder:
        run_parts(Bench(settings, Path(folder)), Budget(60 * args.minutes), args.json)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file, after every part")
    parser.add_argument("--minutes", type=float, default=7, help="after which it ends; default %(default)s")
    parser.add_argument(
        "--model-name", default=Settings.model_name, choices=VARIANTS, metavar="NAME", help="default %(default)s"
    )
    parser.add_argument(
        "--images", type=int, default=Settings.program_images, help="for the program; default %(default)s"
    )
    return parser.parse_args(argv)


@torch.no_grad()
def run_parts(bench: Bench, budget: Budget, json_file: Path | None = None) -> dict[str, PartResult]:
    """Measure and print all parts, and write them to `json_file` after each; return the results by title."""
    machine = measurements.describe_machine(bench.settings.device)
    write_lines([describe_machine(machine), describe_network(bench)])
    results: dict[str, PartResult] = {}
    for part in make_parts(bench, machine.peaks, results):
        results[part.title] = run_part(part, budget)
        measurements.release_memory(bench.settings.device)
        if json_file:
            outcome = {"machine": machine, "model": bench.settings.model_name, "parts": results}
            json_file.write_text(json.dumps(outcome, default=dataclasses.asdict, indent=1))
    write_lines(["", describe_end(results, budget)])
    return results


def make_parts(bench: Bench, peaks: Peaks, results: Mapping[str, PartResult]) -> list[Part]:
    """Return all parts in their order; `results`: of those that have ended.

    Compilation and export come after the shorter parts, because they may fail or take minutes.
    """

    def batch_size() -> int:
        return best_batch_size(results[BACKENDS_TITLE].rows, bench.settings.stage_batch_size)

    def executions(compiled: bool) -> Callable[[], Iterable[Speed]]:
        return lambda: measurements.execution_speeds(bench, batch_size(), compiled)

    def share(row: Speed) -> str:
        return format_share(row, bench.multiply_accumulates, peaks)

    def with_share(row: Speed) -> list[str]:
        return [*format_speed(row), share(row)]

    def execution_row(row: Speed) -> list[str]:
        return [*format_execution(row), share(row)]

    def stage_row(row: StageTime) -> list[str]:
        return format_stage(row, bench.settings.stage_batch_size)

    return [
        Part(BACKENDS_TITLE, (*SPEED_COLUMNS, SHARE_COLUMN), lambda: measurements.backend_speeds(bench), with_share),
        Part("TF32 and layout", EXECUTION_COLUMNS, executions(compiled=False), execution_row),
        Part("Stages of scoring", STAGE_COLUMNS, lambda: measurements.stage_times(bench), stage_row),
        Part("ONNX Runtime on the CPU", SPEED_COLUMNS, lambda: measurements.onnx_speeds(bench), format_speed, 30,
             COMPILED_SECONDS + PROGRAM_SECONDS),
        Part("Compiled", EXECUTION_COLUMNS, executions(compiled=True), execution_row, 30, PROGRAM_SECONDS),
        Part("The whole program", PROGRAM_COLUMNS, lambda: measurements.program_times(bench), format_program, 30),
    ]  # fmt: skip


def run_part(part: Part, budget: Budget) -> PartResult:
    """Measure a part and print its rows as they come, unless too little time is left."""
    begin, rows, problem = budget.used, [], None
    available = budget.left - part.reserved_seconds
    write_lines(["", f"#### {part.title}", ""])
    if available < part.least_seconds:
        problem = f"Left out: too little of the {budget.seconds:.0f} s was left. Give more --minutes."
    else:
        write_lines(markdown_heading(part.columns))
        try:
            with time_limit(available):
                for row in part.measure():
                    rows.append(row)
                    write_lines([markdown_row(part.format(row))])
        except OutOfTime:
            problem = f"Stopped: its time was over after {budget.used - begin:.0f} s. Give more --minutes."
        except Exception as error:  # the other parts go on
            problem = f"Failed: {measurements.failure_reason(error)}"
        write_lines([""] * bool(problem))
    write_lines([problem] if problem else [])
    return PartResult(rows, budget.used - begin, problem)


def write_lines(lines: Iterable[str]) -> None:
    """Print lines at once, also into a file."""
    for line in lines:
        print(line, flush=True)


def best_batch_size(rows: Iterable[Speed], default: int) -> int:
    """Return the batch size at which FP32 is fastest, or the default if it was not measured."""
    measured = [row for row in rows if row.backend == FP32 and row.image_seconds]
    return min(measured, key=lambda row: row.image_seconds or 0).batch_size if measured else default


def describe_machine(machine: Machine) -> str:
    """Return a line about the device and the versions."""
    parts = [machine.name]
    if machine.multiprocessors and machine.memory_bytes:
        parts += [f"{machine.multiprocessors} multiprocessors, {machine.memory_bytes / 1e9:.0f} GB"]
        parts += [f"CUDA {machine.cuda}, cuDNN {machine.cudnn}"]
    parts += [f"torch {machine.torch}, Python {machine.python}, {machine.processors} CPU cores"]
    bounds = {"FP32": machine.peaks.fp32, "TF32": machine.peaks.tf32}
    known = [f"{name} {value / 1e12:.1f}" for name, value in bounds.items() if value]
    if known and machine.clock_hz:
        parts += [f"at most {' and '.join(known)} TFLOP/s at its highest clock rate, {machine.clock_hz / 1e9:.2f} GHz"]
    return "; ".join(parts)


def describe_network(bench: Bench) -> str:
    """Return a line about the network and its operations."""
    operations = bench.multiply_accumulates / 1e9
    height, width = bench.settings.size
    return f"{bench.settings.model_name}, {height}x{width}: {operations:.1f} GMAC per image"


def describe_end(results: Mapping[str, PartResult], budget: Budget) -> str:
    """Return a line on the time that it took, and on what is missing."""
    missing = [title for title, result in results.items() if result.problem]
    sentence = f"This took {budget.used:.0f} s."
    return f"{sentence} Not complete: {', '.join(missing)}." if missing else sentence


def format_speed(row: Speed) -> list[str]:
    """Return the cells of SPEED_COLUMNS."""
    return [row.backend, str(row.batch_size), *_times(row)]


def format_execution(row: Speed) -> list[str]:
    """Return the cells of EXECUTION_COLUMNS apart from the last."""
    execution = row.execution
    options = (
        "on" if execution.tf32 else "off",
        "channels_last" if execution.channels_last else "contiguous",
        "compiled" if execution.compiled else "eager",
    )
    return [
        f"{row.backend}, batch size {row.batch_size}",
        *options,
        format_number(row.compile_seconds, 1),
        *_times(row),
    ]


def _times(row: Speed) -> list[str]:
    """Return milliseconds per image and images per second, or the reason of a failure."""
    if row.image_seconds is None:
        return [row.failure or "-", "-"]
    return [f"{1e3 * row.image_seconds:.2f}", f"{1 / row.image_seconds:.1f}"]


def format_share(row: Speed, multiply_accumulates: int, peaks: Peaks) -> str:
    """Return the speed in percent of the GPU's bound; a hyphen if one of both is unknown."""
    peak = peaks.tf32 if row.execution.tf32 else peaks.fp32
    if row.image_seconds is None or peak is None:
        return "-"
    return f"{100 * 2 * multiply_accumulates / row.image_seconds / peak:.1f}"


def format_stage(row: StageTime, batch_size: int) -> list[str]:
    """Return the cells of STAGE_COLUMNS."""
    if row.seconds is None:
        return [row.stage, str(row.calls), row.failure or "-", "-"]
    milliseconds = 1e3 * row.seconds
    return [row.stage, str(row.calls), f"{milliseconds:.3f}", f"{row.calls * milliseconds / batch_size:.3f}"]


def format_program(row: ProgramTime) -> list[str]:
    """Return the cells of PROGRAM_COLUMNS."""
    calibration = "all" if row.calibration_images is None else str(row.calibration_images)
    cells = [calibration, str(row.decoding_threads), str(row.images)]
    if row.seconds is None:
        return [*cells, row.failure or "-", "-", "-"]
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row.stage_seconds.items())
    return [*cells, f"{row.seconds:.1f}", f"{row.images / row.seconds:.1f}", stages]


if __name__ == "__main__":
    sys.exit(main())

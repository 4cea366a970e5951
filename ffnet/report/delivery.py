"""The end of a run: print its report, write its files, and choose the exit status."""

import json
import os
import sys
from pathlib import Path

from ffnet.backends import FP32, INT8_NPU
from ffnet.cli import PROGRAM
from ffnet.config import OutputConfig
from ffnet.errors import UserError
from ffnet.files import write_atomically
from ffnet.report.console import format_console, format_models
from ffnet.report.csv_files import (
    write_npu_layers,
    write_per_class,
    write_per_image,
    write_recovery,
    write_sensitivity,
)
from ffnet.report.html import render
from ffnet.report.result import Result, miou_drops
from ffnet.signals import interrupt_status
from ffnet.streams import print_lines

RESULT_FILES = (
    "result.json",
    "report.html",
    "per_class.csv",
    "per_image.csv",
    "recovery.csv",
    "sensitivity.csv",
    "npu_layers.csv",
)
RESULT_MEGABYTES = 20  # upper bound of their total size


def deliver(result: Result, output: OutputConfig) -> int:
    """Print the report, write the files of `output.output_dir`, print errors on stderr, and return the exit status.

    It is 1 if an mIoU drop exceeds `output.fail_under`, 2 after an error, 128 and the number of the signal if one ended
    the run (130 after Ctrl-C), and otherwise 0.
    """
    errors = _print(format_console(result, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if output.output_dir:
        errors += _write(result, output.output_dir)
    failure, unsaved = result.details.failure, result.details.scores.unsaved
    if unsaved:
        errors.append(f"--save-predictions: {unsaved}. The predictions of this image and of later ones are not saved.")
    if failure and not isinstance(failure, KeyboardInterrupt):
        errors.append(str(failure))
    drops = [] if errors or failure else excessive_drops(result, output.fail_under)
    for message in (*(f"error: {error}" for error in dict.fromkeys(errors)), *drops):
        print(f"{PROGRAM}: {message}", file=sys.stderr)
    if errors:
        return 2
    return interrupt_status(failure) if isinstance(failure, KeyboardInterrupt) else int(bool(drops))


def print_models() -> int:
    """Print the table of models and return the exit status."""
    print_lines(format_models())
    return 0


def _print(*lines: str) -> list[str]:
    """Print lines to stdout and return the error if that is impossible, because the files are written all the same."""
    try:
        print_lines(*lines)
    except UserError as error:
        return [str(error)]
    return []


def _write(result: Result, folder: Path) -> list[str]:
    """Write the files and print their names or, if that is impossible, the content of result.json; return errors."""
    try:
        written = write_files(result, folder)
    except OSError as error:
        problem = f"--output-dir {folder}: the files can't be written ({error})."
        unprinted = _print(json.dumps(result.to_json()))
        return [
            problem if unprinted else f"{problem} The content of result.json is the last line on stdout.",
            *unprinted,
        ]
    return _print("", f"Written to {folder}: {', '.join(path.name for path in written)}")


def write_files(result: Result, folder: Path) -> list[Path]:
    """Write the files of a result, each whole or not at all, remove stale ones of earlier runs, return the paths."""
    diagnostics = result.details.diagnostics
    sensitivity, npu_layers = diagnostics.sensitivity, diagnostics.npu_layers
    written = [
        write_atomically(folder / "result.json", json.dumps(result.to_json(), indent=1) + "\n"),
        write_per_class(folder / "per_class.csv", result),
        write_per_image(folder / "per_image.csv", result),
        write_atomically(folder / "report.html", render(result)),
    ]
    if result.recovery:
        written.append(write_recovery(folder / "recovery.csv", result.recovery))
    if sensitivity:
        written.append(write_sensitivity(folder / "sensitivity.csv", sensitivity))
    if npu_layers:
        written.append(write_npu_layers(folder / "npu_layers.csv", npu_layers))
    for name in set(RESULT_FILES) - {path.name for path in written}:
        (folder / name).unlink(missing_ok=True)
    return written


def excessive_drops(result: Result, fail_under: float | None) -> list[str]:
    """Return a message for every backend whose mIoU drop exceeds `fail_under` or is unknown.

    The NPU's drop is that on the images that it ran.
    """
    drops = miou_drops(result.backends)
    if result.npu:
        drops[INT8_NPU] = miou_drops(result.npu.backends)[INT8_NPU]
    messages = []
    for name, drop in drops.items():
        if fail_under is not None and name != FP32 and (drop is None or drop > fail_under):
            text = "unknown, because no pixel is labelled" if drop is None else f"{drop:.2f} percentage points"
            messages.append(f"--fail-under {fail_under:g}: the mIoU drop of {name} is {text}.")
    return messages

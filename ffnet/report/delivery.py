"""The end of a run: print its report, write its files, and choose the exit status."""

import json
import os
import sys
from pathlib import Path

from ffnet.backends import FP32
from ffnet.cli import PROGRAM
from ffnet.config import OutputConfig
from ffnet.files import write_atomically
from ffnet.report.console import format_console, format_models
from ffnet.report.csv_files import write_per_class, write_per_image, write_sensitivity
from ffnet.report.html import render
from ffnet.report.result import Result

RESULT_FILES = ("result.json", "report.html", "per_class.csv", "per_image.csv", "sensitivity.csv")
RESULT_MEGABYTES = 20  # upper bound of their size together


def deliver(result: Result, output: OutputConfig) -> int:
    """Print the report, write the files of `output.output_dir` and report errors on stderr.

    If the files can't be written, the content of result.json is the last line on stdout.

    Returns:
        The exit status: 0; 1 if --fail-under is exceeded; 2 after an error; 130 after Ctrl-C.
    """
    print_lines(format_console(result, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    errors = []
    if output.output_dir:
        try:
            written = write_files(result, output.output_dir)
            print_lines("", f"Written to {output.output_dir}: {', '.join(path.name for path in written)}")
        except OSError as error:
            print_lines(json.dumps(result.to_json()))
            errors.append(
                f"--output-dir {output.output_dir}: the files can't be written ({error}). The content of result.json "
                "is the last line on stdout."
            )
    failure, unsaved = result.details.failure, result.details.scores.unsaved
    if unsaved:
        errors.append(f"--save-predictions: {unsaved}. The predictions of this image and of later ones are not saved.")
    if failure and not isinstance(failure, KeyboardInterrupt):
        errors.append(str(failure))
    for message in errors:
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    if errors:
        return 2
    return 130 if failure else check_drops(result, output.fail_under)


def print_models() -> int:
    """Print the table of models and return the exit status."""
    print_lines(format_models())
    return 0


def print_lines(*lines: str) -> None:
    """Print lines to stdout; a reader that has closed its end of the pipe is no error."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_files(result: Result, folder: Path) -> list[Path]:
    """Write the files of a result, each whole or not at all, remove stale ones of an earlier run, and return the paths.

    Raises:
        OSError: if a file can't be written.
    """
    sensitivity = result.details.diagnostics.sensitivity
    written = [
        write_atomically(folder / "result.json", json.dumps(result.to_json(), indent=1) + "\n"),
        write_per_class(folder / "per_class.csv", result),
        write_per_image(folder / "per_image.csv", result),
        write_atomically(folder / "report.html", render(result)),
    ]
    if sensitivity:
        written.append(write_sensitivity(folder / "sensitivity.csv", sensitivity))
    for name in set(RESULT_FILES) - {path.name for path in written}:
        (folder / name).unlink(missing_ok=True)
    return written


def check_drops(result: Result, fail_under: float | None) -> int:
    """Return 1 and say so on stderr if a backend's mIoU drop exceeds `fail_under` or is unknown, otherwise 0."""
    status = 0
    for name in result.backends:
        drop = result.drop(name)
        if fail_under is None or name == FP32 or (drop is not None and drop <= fail_under):
            continue
        status = 1
        drop_text = "unknown, because no pixel is labelled" if drop is None else f"{drop:.2f} percentage points"
        print(
            f"{PROGRAM}: The mIoU drop of {name} is {drop_text}; --fail-under allows {fail_under:g}.", file=sys.stderr
        )
    return status

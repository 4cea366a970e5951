"""The end of a run: print its report, write its files, and choose the exit status."""

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ffnet.cli import PROGRAM
from ffnet.config import Config
from ffnet.evaluation.backends import FP32, INT8_NPU
from ffnet.file_names import COMPARISON_TABLE, REPORT, RESULT_FILE, RESULT_FILES
from ffnet.options import option_values
from ffnet.report.comparison_console import format_comparison
from ffnet.report.comparison_html import render_comparison
from ffnet.report.console import format_console, format_models
from ffnet.report.csv_files import (
    write_comparison,
    write_npu_layers,
    write_per_class,
    write_per_image,
    write_recovery,
    write_sensitivity,
)
from ffnet.report.html import render
from ffnet.results.comparison import ComparedModel, ModelComparison, compare_model
from ffnet.results.result import DEMO_NOTE, Result, miou_drops
from ffnet.run.storage import mark_finished
from ffnet.system.errors import UserError
from ffnet.system.files import write_atomically
from ffnet.system.process import interrupt_status, print_lines
from ffnet.system.text import count, format_number

logger = logging.getLogger(__name__)


def deliver(results: Iterable[Result], config: Config) -> int:
    """Report every result as soon as it is there, then compare the models if there are several.

    Each result is printed and written to `--output-dir`, errors go to stderr. Of several models, only the comparison is
    printed; it is also made of those that are there if the next one fails or if the run is interrupted.

    Returns:
        The exit status: 1 if an mIoU drop exceeds `--fail-under`, 2 after an error, 128 and the number of the signal if
        one ended the run (130 after Ctrl-C), and otherwise 0.
    """
    if len(config.model.names) == 1:
        return worst_status(deliver_result(result, config) for result in results)
    statuses: list[int] = []
    models: list[ComparedModel] = []
    last: Result | None = None
    try:
        for last in results:
            statuses.append(deliver_result(last, config))
            models.append(compare_model(last, last.details.image_size, config.npu.chip, report_link(last, config)))
    except KeyboardInterrupt as interrupt:
        statuses.append(interrupt_status(interrupt))
    finally:
        if last and models:
            statuses.append(deliver_comparison(comparison_of(models, last, config), config))
    return worst_status(statuses)


def worst_status(statuses: Iterable[int]) -> int:
    """Return the exit status of all: an error comes before an interruption, and that before a drop of the mIoU."""
    return max(statuses, key=lambda status: (status == 2, status), default=0)


def deliver_result(result: Result, config: Config) -> int:
    """Print the report of one model, unless there are others, and write its files; return the exit status.

    Errors, and drops that exceed `--fail-under`, are printed on stderr.
    """
    several = len(config.model.names) > 1
    folder = (config.for_model(result.model) if several else config).output.output_dir
    errors = [] if several else _print(format_console(result, colored()))
    if folder and not result.details.written:
        errors += _write_result(result, folder, quiet=several)
    if several:
        logger.info(describe_result(result))
    failure, unsaved = result.details.failure, result.details.scores.unsaved
    if unsaved:
        errors.append(
            f"{unsaved}. Nothing was saved there from this image on; all other results are complete. Free some space, "
            "and start again with --resume."
        )
    interrupt = failure if isinstance(failure, KeyboardInterrupt) else None
    if failure and not interrupt:
        errors.append(str(failure))
    if folder and not errors and not failure:
        errors += _mark_finished(folder)
    drops = [] if errors or failure else excessive_drops(result, config.output.fail_under)
    model = f"{result.model}: " if several else ""
    for message in (*(f"error: {model}{error}" for error in dict.fromkeys(errors)), *(model + drop for drop in drops)):
        print(f"{PROGRAM}: {message}", file=sys.stderr)
    if errors:
        return 2
    return interrupt_status(interrupt) if interrupt else int(bool(drops))


def _mark_finished(folder: Path) -> list[str]:
    """Note that the results of a model are complete, and return the error if that is impossible."""
    try:
        mark_finished(folder)
    except OSError as error:
        return [f"--output-dir {folder}: the results are complete, but a note on that can't be written ({error})."]
    return []


def deliver_comparison(comparison: ModelComparison, config: Config) -> int:
    """Print the comparison of several models and write its files; print errors on stderr, return the exit status."""
    errors = _print(format_comparison(comparison))
    folder = config.output.output_dir
    if folder:
        try:
            write_comparison(folder / COMPARISON_TABLE, comparison)
            write_atomically(folder / REPORT, render_comparison(comparison))
        except OSError as error:
            errors.append(f"--output-dir {folder}: the comparison can't be written ({error}).")
        else:
            errors += _print("", f"Written to {folder}: {REPORT}, {COMPARISON_TABLE} and a folder for each model")
    for message in dict.fromkeys(errors):
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return 2 if errors else 0


def comparison_of(models: list[ComparedModel], last: Result, config: Config) -> ModelComparison:
    """Return the comparison of models; `last`: the result of one of them."""
    notes = [DEMO_NOTE] if config.data.demo else []
    missing = config.model.names[len(models) :]
    if missing:
        number = f"{len(missing)} of {count(len(config.model.names), 'model')}"
        notes.append(f"The run ended early: there are no results of {number}.")
    return ModelComparison(
        models=models,
        dataset=last.dataset,
        images=last.images,
        image_size=last.details.image_size,
        device=last.device,
        command=last.command,
        notes=notes,
        options=option_values(config),
        versions=last.versions,
    )


def report_link(result: Result, config: Config) -> str | None:
    """Return the path of a model's own report relative to that of the comparison; None if neither is written."""
    return f"{result.model}/{REPORT}" if config.output.output_dir else None


def describe_result(result: Result) -> str:
    """Return one line with the mIoU of every backend of a model."""
    mious = [f"{name} {format_number(entry.miou)}" for name, entry in result.backends.items()]
    return f"{result.model}: mIoU % {', '.join(mious)}"


def colored() -> bool:
    """Return whether stdout shows colors."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


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


def _write_result(result: Result, folder: Path, quiet: bool) -> list[str]:
    """Write the files of a model or, if that is impossible, print the content of result.json; return errors.

    The names of the files are printed, unless `quiet`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = write_files(result, folder)
    except OSError as error:
        problem = f"--output-dir {folder}: the files can't be written ({error})."
        unprinted = _print(json.dumps(result.to_json()))
        return [
            problem if unprinted else f"{problem} The content of result.json is the last line on stdout.",
            *unprinted,
        ]
    return [] if quiet else _print("", f"Written to {folder}: {', '.join(path.name for path in written)}")


def write_files(result: Result, folder: Path) -> list[Path]:
    """Write the files of a result, each whole or not at all, remove stale ones of earlier runs, return the paths."""
    diagnostics = result.details.diagnostics
    sensitivity, npu_layers = diagnostics.sensitivity, diagnostics.npu_layers
    written = [
        write_atomically(folder / RESULT_FILE, json.dumps(result.to_json(), indent=1) + "\n"),
        write_per_class(folder / "per_class.csv", result),
        write_per_image(folder / "per_image.csv", result),
        write_atomically(folder / REPORT, render(result)),
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

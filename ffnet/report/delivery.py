"""The end of a run: print its report, write its files, and choose the exit status."""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ffnet.config import COMPARISON_TABLE, REPORT, RESULT_FILE, RESULT_FILES, Config
from ffnet.evaluation.scores import FP32, NPU
from ffnet.options import PROGRAM, option_values
from ffnet.report import csv_files
from ffnet.report.rendering import format_comparison, format_console, render, render_comparison
from ffnet.results.comparison import ComparedModel, ModelComparison, compare_model
from ffnet.results.result import DEMO_NOTE, Result
from ffnet.system.errors import UserError
from ffnet.system.files import write_atomically
from ffnet.system.process import interrupt_status, print_lines
from ffnet.system.text import format_number, list_names, printable

logger = logging.getLogger(__name__)


def deliver(results: Iterable[Result], config: Config) -> int:
    """Report every result as soon as it is complete, then compare the models if there are several.

    Each result is printed and written to `--output-dir`; errors go to stderr. Of several models, only the comparison is
    printed. If a model fails or the run is interrupted, the finished models are compared.

    Returns:
        The exit status: 1 if an mIoU drop exceeds `--fail-under`, 2 after an error, 128 and the number of the signal if
        one ended the run (130 after Ctrl-C), and otherwise 0.
    """
    if len(config.model.names) == 1:
        return _worst(deliver_result(result, config) for result in results)
    statuses: list[int] = []
    models: list[ComparedModel] = []
    try:
        for result in results:
            statuses.append(deliver_result(result, config))
            link = f"{result.model}/{REPORT}" if config.output.output_dir else None
            models.append(compare_model(result, next(iter(config.npu.chips), None), link))
    except KeyboardInterrupt as interrupt:
        statuses.append(interrupt_status(interrupt))
    finally:
        if models:
            statuses.append(deliver_comparison(models, config))
    return _worst(statuses)


def _worst(statuses: Iterable[int]) -> int:
    """Return the exit status of all: an error comes before an interruption, and that before a drop of the mIoU."""
    return max(statuses, key=lambda status: (status == 2, status), default=0)


def deliver_result(result: Result, config: Config) -> int:
    """Print the report of one model, unless there are others, and write its files; return the exit status.

    Errors, and drops that exceed `--fail-under`, are printed on stderr.
    """
    several = len(config.model.names) > 1
    folder = config.for_model(result.model).output.output_dir
    errors = [] if several else _print(format_console(result))
    if folder and not result.details.written:
        errors += _write_result(result, folder, quiet=several)
    elif folder and not several:
        errors += _print("", f"Report: {folder / REPORT}")
    if several:
        mious = (f"{name} {format_number(entry.miou)}" for name, entry in result.backends.items())
        logger.info(f"{result.model}: mIoU % {', '.join(mious)}")
    failure, unsaved = result.details.failure, result.details.scores.unsaved
    if unsaved:
        errors.append(
            f"{unsaved}. Nothing was saved there from this image on; all other results are complete. Free some space, "
            "and start again with --resume."
        )
    if failure and not isinstance(failure, KeyboardInterrupt):
        errors.append(str(failure))
    refused = [each.chip for each in result.npu_chips if each.error]
    if refused and config.output.fail_under is not None and not failure:
        chips = f"{len(refused)} of {len(result.npu_chips)} chips can't run the file: {list_names(refused, 50)}"
        errors.append(f"--fail-under and --npu: {chips}. Name other chips, or remove --fail-under.")
    drops = [] if errors or failure else excessive_drops(result, config.output.fail_under)
    _print_errors(errors, drops, f"{result.model}: " if several else "")
    if isinstance(failure, KeyboardInterrupt) and not errors:
        return interrupt_status(failure)
    return 2 if errors else int(bool(drops))


def deliver_comparison(models: list[ComparedModel], config: Config) -> int:
    """Print the comparison of several models and write its files; print errors on stderr, return the exit status."""
    notes, requested = [DEMO_NOTE] if config.data.demo else [], len(config.model.names)
    if missing := requested - len(models):
        notes.append(f"The run ended early: there are no results for {missing} of {requested} models.")
    comparison = ModelComparison(models, notes, option_values(config))
    errors = _print(format_comparison(comparison))
    folder = config.output.output_dir
    if folder:
        try:
            csv_files.write_csv(folder / COMPARISON_TABLE, csv_files.comparison_rows(comparison))
            write_atomically(folder / REPORT, render_comparison(comparison))
        except OSError as error:
            errors.append(f"--output-dir {folder}: the comparison can't be written ({error}).")
        else:
            written = f"Written to {folder}: {COMPARISON_TABLE} and a folder for each model"
            errors += _print("", written, f"Report: {folder / REPORT}")
    _print_errors(errors)
    return 2 if errors else 0


def _print(*lines: str) -> list[str]:
    """Print lines to stdout; return the error if that is impossible, so that files can be written nevertheless."""
    try:
        print_lines(*lines)
    except UserError as error:
        return [str(error)]
    return []


def _print_errors(errors: Sequence[str], drops: Sequence[str] = (), model: str = "") -> None:
    """Print each error once, and each excessive drop, on stderr."""
    for message in (*(f"error: {model}{error}" for error in dict.fromkeys(errors)), *(model + drop for drop in drops)):
        print(printable(f"{PROGRAM}: {message}"), file=sys.stderr)


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
        hint = "" if unprinted else " The content of result.json is the last line on stdout."
        return [problem + hint, *unprinted]
    return [] if quiet else _print("", f"Written to {folder}: {', '.join(written)}", f"Report: {folder / REPORT}")


def write_files(result: Result, folder: Path) -> list[str]:
    """Write the files of a result, each whole or not at all, remove earlier ones, and return the names without REPORT.

    result.json is written last: if it exists, all files do.
    """
    (folder / RESULT_FILE).unlink(missing_ok=True)
    diagnostics = result.details.diagnostics
    tables = {"per_class.csv": csv_files.class_rows(result), "per_image.csv": csv_files.image_rows(result)}
    if result.recovery:
        tables["recovery.csv"] = csv_files.recovery_rows(result.recovery)
    if diagnostics.sensitivity:
        tables["sensitivity.csv"] = csv_files.sensitivity_rows(diagnostics.sensitivity)
    if result.layers and result.layers.rows:
        tables["layers.csv"] = csv_files.layer_rows(result.layers)
    for name, rows in tables.items():
        csv_files.write_csv(folder / name, rows)
    write_atomically(folder / REPORT, render(result))
    for name in set(RESULT_FILES) - {RESULT_FILE, REPORT, *tables}:
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / RESULT_FILE, json.dumps(result.to_json(), indent=1) + "\n")
    return [RESULT_FILE, *tables]


def excessive_drops(result: Result, fail_under: float | None) -> list[str]:
    """Return a message for every backend whose mIoU drop exceeds `fail_under` or is unknown.

    The drop is that against FP32 and, if there is one, that against the baseline. The NPU's drop is that on the images
    that it ran.
    """
    if fail_under is None:
        return []
    on_npu = {label: npu.backends[result.names.of(NPU)] for label, npu in result.npus.items()}
    quantized = (result.backends | on_npu).items() if FP32 in result.backends else ()
    changes = [(name, entry.change) for name, entry in quantized if name != FP32]
    if result.baseline:
        since = f" since --baseline {result.baseline.folder}"
        changes += [(each.backend + since, each.change) for each in result.baseline.changes]
    messages = []
    for name, change in changes:
        if change is None or -change > fail_under:
            text = "unknown, because no pixel is labelled" if change is None else f"{-change:.2f} percentage points"
            messages.append(f"--fail-under {fail_under:g}: the mIoU drop of {name} is {text}.")
    return messages

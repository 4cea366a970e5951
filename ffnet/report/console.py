"""The report on the console, and the table of models."""

from collections.abc import Sequence

import torch

from datasets.cityscapes import CLASSES
from ffnet.files import count
from ffnet.model import build_model
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.report.result import Result, miou_drop
from ffnet.variants import INPUT_SIZE, VARIANTS, Variant

IOU_DROP = 1.0  # percentage points; classes whose IoU drops as much are shown in red
SENSITIVE_QUANTIZERS = 10  # rows of the sensitivity table
BOLD, RED, RESET = "\x1b[1m", "\x1b[31m", "\x1b[0m"


def format_console(result: Result, color: bool = False) -> str:
    """Return the whole report as text; `color` adds bold headings and shows classes with a large IoU drop in red."""
    sensitivity = result.details.diagnostics.sensitivity
    tables = [_backends_table(result)]
    if result.agreement:
        tables.append(_agreement_table(result))
    tables.append(_classes_table(result))
    if sensitivity:
        tables.append(_sensitivity_table(sensitivity))
    tables.append(_stages_table(result))
    if color:
        tables = [_colored(table, _classes_with_large_drop(result)) for table in tables]
    return "\n\n".join((_heading(result), *tables))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join((row[0].ljust(widths[0]), *line[1:])) for row, line in zip(rows, lines, strict=True))


def format_models() -> str:
    """Return the table of the published variants: parameters, sizes in pixels, published mIoU in percent."""
    rows = [["model", "parameters", "input", "output", "FP32 mIoU", "INT8 mIoU"]]
    for variant in VARIANTS.values():
        if not variant.is_demo:
            published = (_number(miou, 1) for miou in (variant.published.fp32, variant.published.int8))
            parameters = f"{_parameters(variant.name) / 1e6:.2f} M"
            rows.append([variant.name, parameters, _size(1), _size(_output_stride(variant)), *published])
    return format_table(rows)


def _size(stride: int) -> str:
    return "x".join(str(length // stride) for length in INPUT_SIZE)


def _output_stride(variant: Variant) -> int:
    """Return how many times smaller than the input the logits are, which have the size of the finest feature map."""
    first_stage = 1 if variant.stem == "C" else variant.strides[0]  # stem C takes its finest map before the first stage
    return 4 * first_stage * (2 if variant.pre_down else 1)


def _parameters(name: str) -> int:
    with torch.device("meta"):  # without memory for the weights
        return sum(parameter.numel() for parameter in build_model(name).parameters())


def _heading(result: Result) -> str:
    title = f"{result.model} on {count(result.images, 'image')} of {result.dataset}, {result.device}"
    return "\n".join((title, *(f"Note: {note}" for note in result.notes)))


def _backends_table(result: Result) -> str:
    published = result.published
    rows = [["backend", "mIoU %", "mIoU drop", *(("published %", "drop") if published else ()), "images/s"]]
    for name, entry in result.backends.items():
        reference = (_number(published.get(name), 1), _number(miou_drop(published, name), 1)) if published else ()
        rows.append(
            [name, _number(entry.miou), _number(result.drop(name)), *reference, _number(entry.images_per_second)]
        )
    return format_table(rows)


def _agreement_table(result: Result) -> str:
    rows = [(pair.replace("|", " and "), _number(value)) for pair, value in result.agreement.items()]
    return format_table([("prediction agreement", "pixels %"), *rows])


def _classes_table(result: Result) -> str:
    """Return the IoU of every class and, after each backend but the first, its change in percentage points."""
    first, *others = result.backends
    rows = [["IoU % per class", first, *(heading for name in others for heading in (name, "change"))]]
    for label, base in result.backends[first].iou.items():
        row = [label, _number(base)]
        for name in others:
            row += [_number(result.backends[name].iou[label]), _number(result.iou_change(name, label), sign="+")]
        rows.append(row)
    return format_table(rows)


def _sensitivity_table(sensitivity: Sensitivity) -> str:
    rows = [("most sensitive quantizers", "kind", "bits", "SQNR dB, only enabled", "gain dB, only disabled")]
    for row in sensitivity.rows[:SENSITIVE_QUANTIZERS]:
        decibels = (_number(row.sqnr_only_enabled, 1), _number(sensitivity.gain(row), 2, "+"))
        rows.append((f"{row.layer} {row.role}", row.kind, str(row.bits), *decibels))
    return format_table(rows)


def _stages_table(result: Result) -> str:
    rows = [(stage, _number(seconds, 1)) for stage, seconds in result.stage_seconds.items()]
    return format_table([("stage", "seconds"), *rows])


def _classes_with_large_drop(result: Result) -> list[str]:
    changes = [(label, result.iou_change(name, label)) for name in result.backends for label in CLASSES]
    return [label for label, change in changes if change is not None and change <= -IOU_DROP]


def _colored(table: str, labels: Sequence[str]) -> str:
    """Return a table with a bold heading, and in red the rows of the classes `labels`."""
    heading, *rows = table.split("\n")
    prefixes = tuple(f"{label} " for label in labels)
    return "\n".join((f"{BOLD}{heading}{RESET}", *(f"{RED}{r}{RESET}" if r.startswith(prefixes) else r for r in rows)))


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}z.{digits}f}"

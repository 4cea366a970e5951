"""The report on the console, and the table of models."""

from collections.abc import Sequence

import torch

from datasets.cityscapes import CLASSES
from ffnet.model import build_model
from ffnet.report.result import Result, miou_drop
from ffnet.variants import INPUT_SIZE, VARIANTS, Variant
from ffnet.wording import count

Rows = Sequence[Sequence[str]]  # of cells; the first one is the heading

IOU_DROP = 1.0  # percentage points; classes whose IoU drops at least as much are shown in red
SENSITIVE_QUANTIZERS = 10  # rows of the sensitivity table
BOLD, RED, RESET = "\x1b[1m", "\x1b[31m", "\x1b[0m"


def format_console(result: Result, color: bool = False) -> str:
    """Return the whole report as text; `color` adds bold headings and shows classes with a large IoU drop in red."""
    title = f"{result.model} on {count(result.images, 'image')} of {result.dataset}, {result.device}"
    heading = "\n".join((title, *(f"Note: {note}" for note in result.notes)))
    builders = (_backends_table, _agreement_table, _classes_table, _sensitivity_table, _stages_table)
    tables = [format_table(rows) for build in builders if (rows := build(result))]
    if color:
        tables = [_colored(table, result) for table in tables]
    return "\n\n".join((heading, *tables))


def format_table(rows: Rows) -> str:
    """Return rows as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join((row[0].ljust(widths[0]), *line[1:])) for row, line in zip(rows, lines, strict=True))


def format_models() -> str:
    """Return the table of the published variants: parameters, sizes in pixels, published mIoU in percent."""
    rows = [["model", "parameters", "input", "output", "FP32 mIoU", "INT8 mIoU"]]
    for variant in VARIANTS.values():
        if not variant.is_demo:
            with torch.device("meta"):  # without memory for the weights
                parameters = sum(parameter.numel() for parameter in build_model(variant.name).parameters())
            strides = (1, _output_stride(variant))
            sizes = ("x".join(str(length // stride) for length in INPUT_SIZE) for stride in strides)
            published = (_number(miou, 1) for miou in (variant.published.fp32, variant.published.int8))
            rows.append([variant.name, f"{parameters / 1e6:.2f} M", *sizes, *published])
    return format_table(rows)


def _output_stride(variant: Variant) -> int:
    """Return how many times smaller than the input the logits are, which have the size of the finest feature map."""
    first_stage = 1 if variant.stem == "C" else variant.strides[0]  # stem C takes its finest map before the first stage
    return 4 * first_stage * (2 if variant.pre_down else 1)


def _backends_table(result: Result) -> Rows:
    published = result.published
    rows = [["backend", "mIoU %", "mIoU drop", *(("published %", "drop") if published else ()), "images/s"]]
    for name, entry in result.backends.items():
        row = [name, _number(entry.miou), _number(result.drop(name))]
        if published:
            row += [_number(published.get(name), 1), _number(miou_drop(published, name), 1)]
        rows.append([*row, _number(entry.images_per_second)])
    return rows


def _agreement_table(result: Result) -> Rows:
    rows = [(pair.replace("|", " and "), _number(value)) for pair, value in result.agreement.items()]
    return [("prediction agreement", "pixels %"), *rows] if rows else []


def _classes_table(result: Result) -> Rows:
    """Return the IoU of every class and, after each backend but the first, its change in percentage points."""
    first, *others = result.backends
    rows = [["IoU % per class", first, *(heading for name in others for heading in (name, "change"))]]
    for label, base in result.backends[first].iou.items():
        row = [label, _number(base)]
        for name in others:
            row += [_number(result.backends[name].iou[label]), _number(result.iou_change(name, label), sign="+")]
        rows.append(row)
    return rows


def _sensitivity_table(result: Result) -> Rows:
    sensitivity = result.details.diagnostics.sensitivity
    if not sensitivity:
        return []
    rows = [("most sensitive quantizers", "kind", "bits", "SQNR dB, only enabled", "gain dB, only disabled")]
    for row in sensitivity.rows[:SENSITIVE_QUANTIZERS]:
        decibels = (_number(row.sqnr_only_enabled, 1), _number(sensitivity.gain(row), 2, "+"))
        rows.append((f"{row.layer} {row.role}", row.kind, str(row.bits), *decibels))
    return rows


def _stages_table(result: Result) -> Rows:
    return [("stage", "seconds"), *((stage, _number(time, 1)) for stage, time in result.stage_seconds.items())]


def _colored(table: str, result: Result) -> str:
    """Return a table with a bold heading, and in red the rows of classes with a large IoU drop."""
    changes = [(label, result.iou_change(name, label)) for name in result.backends for label in CLASSES]
    large_drops = tuple(f"{label} " for label, change in changes if change is not None and change <= -IOU_DROP)
    heading, *rows = table.split("\n")
    rows = [f"{RED}{row}{RESET}" if row.startswith(large_drops) else row for row in rows]
    return "\n".join((f"{BOLD}{heading}{RESET}", *rows))


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}z.{digits}f}"

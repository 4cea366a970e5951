"""What people read on the console, and what programs read in result.json."""

import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import torch

from datasets.cityscapes import CLASSES
from ffnet import metrics

MIOU_TOLERANCE, LEAST_AGREEMENT = 0.2, 99.0  # points, percent: what simulation and execution may differ by
LOSS = 1.0  # points of a class's IoU that are shown in red
PACKAGES = ("torch", "torchvision", "aimet-torch", "onnxruntime", "numpy", "scikit-image")


def versions():
    """Version of Python and of each package that bears on the figures."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def device_name(device):
    """The device in words: the GPU's name, or the processor's and how many threads torch uses."""
    if device.type == "cuda":
        return f"CUDA, {torch.cuda.get_device_name(device)}"
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def published(variant):
    """Published mIoU in percent, keyed by the pass that it stands beside."""
    figures = {"FP32": variant.published.fp32, "INT8": variant.published.int8}
    return {name: miou for name, miou in figures.items() if miou is not None}


def pass_entries(scores):
    """result.json's `passes`: by the pass's name; percentages are floats, None where a class is absent."""
    return {
        name: _pass_entry(scores.total(name), len(scores.confusions[name]) / scores.seconds[name])
        for name in scores.seconds
    }


def _pass_entry(matrix, speed):
    return {
        "miou": _percent(metrics.mean_iou(matrix)),
        "iou": {name: _percent(value) for name, value in zip(CLASSES, metrics.iou(matrix), strict=True)},
        "pixel_accuracy": _percent(metrics.pixel_accuracy(matrix)),
        "images_per_second": speed,
        "confusion_matrix": matrix.tolist(),
    }


def agreement(scores):
    """Percent of pixels that two passes predict alike, keyed "FP32|INT8"."""
    return {"|".join(pair): _percent(counts.mean() / scores.pixels) for pair, counts in scores.agreements.items()}


def _percent(share):
    return None if np.isnan(share) else 100 * float(share)


def write_all(folder, result, scores, paths, reasons):
    """Writes result.json, report.html and the CSV files into `folder`, each whole or not at all; returns their paths.

    `paths`: of the images, as `scores` holds them. `reasons`: rows of pictures and the sensitivity, or None. An earlier
    run's files that this one does not write are removed. OSError where something can't be written.
    """
    from ffnet import html, output, tables

    folder = Path(folder)
    written = [
        output.write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n"),
        tables.write_per_class(folder / "per_class.csv", result),
        tables.write_per_image(folder / "per_image.csv", paths, scores),
        html.write_html(folder / "report.html", result, reasons.rows, reasons.sensitivity),
    ]
    if reasons.sensitivity:
        written.append(tables.write_sensitivity(folder / "sensitivity.csv", reasons.sensitivity))
    output.remove_stale(folder, written)
    return written


def console(result, sensitivity=None, color=False):
    """The whole result as text; in `color`, for a terminal, headings are bold and classes that lose much are red."""
    tables = [passes_table(result), agreement_table(result), classes_table(result)]
    tables += [sensitivity_table(sensitivity) if sensitivity else "", times_table(result)]
    tables = [table for table in tables if table]
    if color:
        tables = [painted(table, losers(result)) for table in tables]
    return "\n\n".join((heading(result), *tables))


def losers(result):
    """Names of the classes that lose LOSS points or more in any pass."""
    first, *others = [entry["iou"] for entry in result["passes"].values()]
    return [
        name
        for name in first
        for other in others
        if None not in (first[name], other[name]) and first[name] - other[name] >= LOSS
    ]


def painted(table, alarming):
    """The table with a bold heading, and in red the rows that begin with one of `alarming`."""
    heading, *rows = table.split("\n")
    red = [f"\x1b[31m{row}\x1b[0m" if row.startswith(tuple(f"{name} " for name in alarming)) else row for row in rows]
    return "\n".join((f"\x1b[1m{heading}\x1b[0m", *red))


def heading(result):
    """What was measured, on what, and how it was calibrated."""
    lines = [
        f"{result['model']} on {result['images']} images of {result['dataset']}, {result['device']}",
        *(f"Note: {note}" for note in result["notes"]),
    ]
    return "\n".join(lines)


def far_apart(scores, one, other):
    """How far two passes that should be alike differ, in words; None within 0.2 points of mIoU and 1 % of pixels."""
    mious = [100 * metrics.mean_iou(scores.total(name)) for name in (one, other)]
    alike = 100 * scores.agreements[one, other].mean() / scores.pixels
    if np.isclose(*mious, rtol=0, atol=MIOU_TOLERANCE, equal_nan=True) and alike >= LEAST_AGREEMENT:
        return None
    return f"{mious[0]:.2f} and {mious[1]:.2f} mIoU, {alike:.2f} % of pixels alike"


def passes_table(result):
    """mIoU a pass, its drop, the published figure and drop beside it, images a second."""
    published = result["published"]
    rows = [("pass", "mIoU %", "drop", *(("published %", "drop") if published else ()), "images/s")]
    for name, entry in result["passes"].items():
        beside = (_number(published.get(name), 1), _number(drop(published, name), 1)) if published else ()
        mious = {key: other["miou"] for key, other in result["passes"].items()}
        rows.append(
            (name, _number(entry["miou"]), _number(drop(mious, name)), *beside, _number(entry["images_per_second"]))
        )
    return columns(rows)


def drop(mious, name):
    """Points that the pass `name` of {pass: mIoU} lies below FP32; None where there is nothing to compare."""
    if name == "FP32" or mious.get(name) is None or mious.get("FP32") is None:
        return None
    return mious["FP32"] - mious[name]


def classes_table(result):
    """IoU a class of every pass, and the change from the first pass to the others."""
    passes = result["passes"]
    first, *others = passes
    rows = [("IoU %", *passes, *(f"{name} - {first}" for name in others))]
    for class_name, base in passes[first]["iou"].items():
        values = [entry["iou"][class_name] for entry in passes.values()]
        changes = [None if value is None or base is None else value - base for value in values[1:]]
        rows.append((class_name, *map(_number, values), *(_number(change, sign="+") for change in changes)))
    return columns(rows)


def agreement_table(result):
    """Percent of pixels that every two passes predict alike."""
    if not result["agreement"]:
        return ""
    return columns(
        [("predict alike", "pixels %"), *((pair, _number(value)) for pair, value in result["agreement"].items())]
    )


def sensitivity_table(sensitivity, most=10):
    """The quantizers that alone make the most noise."""
    rows = [("costliest quantizers", "kind", "bits", "SQNR alone on, dB", "gain alone off, dB")]
    for row in sensitivity.rows[:most]:
        figures = (_number(row.sqnr_on, 1), _number(sensitivity.gain(row), 2, "+"))
        rows.append((f"{row.layer} {row.place}", row.kind, str(row.bits), *figures))
    return columns(rows)


def times_table(result):
    """Seconds a stage."""
    return columns([("stage", "seconds"), *((name, _number(seconds, 1)) for name, seconds in result["times"].items())])


def columns(rows):
    """Rows of texts as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join((row[0].ljust(widths[0]), *line[1:])) for row, line in zip(rows, lines, strict=True))


def _number(value, digits=2, sign=""):
    return "-" if value is None else f"{value:{sign}z.{digits}f}"

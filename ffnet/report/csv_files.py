"""CSV files: percentages have four decimals, and a cell is empty if its value is undefined."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffnet.evaluation import metrics
from ffnet.evaluation.metrics import Interval, percent
from ffnet.evaluation.scores import FP32, NPU, SIMULATED
from ffnet.quantization.layers import Layers
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.results.comparison import COSTS, ModelComparison
from ffnet.results.published import INT8, RUNTIMES
from ffnet.results.result import BackendResult, Result
from ffnet.system.files import write_atomically

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # with full-width forms
Row = dict[str, Any]  # heading -> value; floats get four decimals
UNKNOWN = (None, None)  # value and limits


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write a CSV file with the headings of the first row and return its path.

    A byte order mark tells spreadsheets that it is UTF-8. Text that they would run as a formula gets an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text)  # with its default line ends: with "\n" alone, a carriage return in a cell is not quoted
    writer.writerow(rows[0])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return write_atomically(path, "\ufeff" + text.getvalue().replace("\r\n", "\n"))


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULAS):
        return f"'{value}"
    return f"{value:.4f}" if isinstance(value, float) else value


def class_rows(result: Result) -> list[Row]:
    """Return the rows of per_class.csv: images, labelled pixels, IoU in every backend and its change from FP32."""
    rows = []
    for label, classes in result.classes.items():
        row: Row = {"class": label, "images": classes.images, "labelled pixels": classes.labelled_pixels}
        for name, entry in result.backends.items():
            row |= _with_limits(f"{name} IoU", " ", entry.iou[label], entry.iou_interval[label])
            if entry is not result.base:
                limits = entry.iou_change_interval.get(label)
                row |= _with_limits(f"{name} change", " ", entry.iou_change.get(label), limits)
        rows.append(row)
    return rows


def image_rows(result: Result) -> list[Row]:
    """Return the rows of per_image.csv: mIoU over the classes in the label, pixel accuracy, IoU, agreement."""
    scores = result.details.scores
    rows: list[Row] = [{"image": name} for name in result.details.image_names]
    for backend, matrices in scores.confusion_matrices.items():
        name = result.names.of(backend)
        mious, ious = metrics.image_mious(matrices), metrics.image_ious(matrices)
        for index, row in enumerate(rows):
            row[f"{name} mIoU"] = percent(mious[index])
            row[f"{name} pixel accuracy"] = percent(metrics.pixel_accuracy(matrices[index]))
            row |= {f"{name} IoU {label}": percent(ious[index, column]) for column, label in enumerate(result.classes)}
    for pair, counts in scores.agreeing_pixels.items():
        for index, row in enumerate(rows):
            row[f"{'|'.join(map(result.names.of, pair))} agreement"] = percent(counts[index] / scores.pixels[index])
    return rows


def sensitivity_rows(sensitivity: Sensitivity) -> list[Row]:
    """Return the rows of sensitivity.csv: the fields of SensitivityRow and the gain in dB."""
    return [asdict(row) | {"gain_only_disabled": sensitivity.gain(row)} for row in sensitivity.rows]


def recovery_rows(recovery: Recovery) -> list[Row]:
    """Return the rows of recovery.csv: the fields of RecoveryStep with both limits of each interval."""
    return [
        {
            "name": step.name,
            **_with_limits("miou", "_", step.miou, step.miou_interval),
            **_with_limits("change", "_", step.change, step.change_interval),
            "bit_operations": f"{step.bit_operations:.6f}",
            "weight_bytes": f"{step.weight_bytes:.6f}",
            "seconds": step.seconds,
            "outcome": recovery.outcome(step),
        }
        for step in recovery.steps
    ]


def layer_rows(layers: Layers) -> list[Row]:
    """Return the rows of layers.csv: the SQNR of every backend at each quantized activation, in dB."""
    rows = []
    for each in layers.rows:
        row: Row = {"layer": each.layer, "tensor": each.tensor, "bits": each.bits}
        for name, sqnr in each.sqnr.items():
            row |= {f"{name} SQNR": sqnr.total, f"{name} SQNR, same input": sqnr.own}
        rows.append(row)
    return rows


def comparison_rows(comparison: ModelComparison) -> list[Row]:
    """Return the rows of comparison.csv: the metrics of every backend and the costs of each model.

    Changes are those against FP32 on the same images. "yes" and "no" say whether a model is on a Pareto front; the
    cell is empty if it cannot be on it.
    """
    backends = dict.fromkeys(name for model in comparison.models for name in model.result.backends)
    on_npu = dict.fromkeys(label for model in comparison.models for label in model.result.npus)
    words = {None: None, True: "yes", False: "no"}
    fronts = [comparison.front(cost) for cost in COSTS]
    rows = []
    for model in comparison.models:
        result = model.result
        row: Row = {"model": result.model, "report": model.link, "images": result.images}
        for name in backends:
            row |= _backend(name, result.backends)
        for label in on_npu:
            npu = result.npus.get(label)
            found = {label: npu.backends[result.names.of(NPU)]} if npu else {}
            row |= {"NPU images": npu and len(npu.images), **_backend(label, found)}
        row |= {f"{name} published": result.published.get(name) for name in (FP32, INT8.of(SIMULATED))}
        row |= {"parameters": model.parameters, "GMACs": model.gmacs}
        published = model.published
        row["latency device"] = published and published.device
        row["latency image size"] = published and "{}x{}".format(*published.input_size)
        row |= {f"{name} ms": published and published.latency.get(key) for key, name in RUNTIMES.items()}
        rows.append(row | {f"on the front by {front.cost.name}": words[front.has(model)] for front in fronts})
    return rows


def _backend(name: str, backends: Mapping[str, BackendResult]) -> Row:
    """Return a backend's mIoU and change with the limits of their intervals; empty cells without the backend."""
    entry = backends.get(name)
    miou, change = (
        ((entry.miou, entry.miou_interval), (entry.change, entry.change_interval)) if entry else (UNKNOWN,) * 2
    )
    row = _with_limits(f"{name} mIoU", " ", *miou)
    return row if name == FP32 else row | _with_limits(f"{name} change", " ", *change)


def _with_limits(heading: str, separator: str, value: float | None, limits: Interval | None) -> Row:
    lower, upper = limits or (None, None)
    return {heading: value, f"{heading}{separator}lower": lower, f"{heading}{separator}upper": upper}

"""CSV files of a result: percentages have four decimals, and a cell is empty if its value is undefined."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from datasets.cityscapes import image_name
from ffnet.evaluation import metrics
from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_SIMULATED
from ffnet.labels import CLASSES
from ffnet.onnx.divergence import Difference, LayerDivergence
from ffnet.quantization.recovery.outcome import Recovery, RecoveryStep
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.results.ai_hub import ByRuntime, PublishedLatency
from ffnet.results.comparison import COSTS, ComparedModel, ModelComparison
from ffnet.results.result import BackendResult, Result, miou_drops, percent
from ffnet.system.files import write_atomically


def write_per_class(path: Path, result: Result) -> Path:
    """Write per_class.csv: labelled pixels of a class, IoU in every backend and its change from the first one."""
    first, *others = result.backends
    iou_columns = [f"{name} IoU" for name in result.backends]
    rows: list[Iterable[Any]] = [("class", "labelled pixels", *iou_columns, *(f"{name} - {first}" for name in others))]
    for label, counts in zip(CLASSES, result.backends[first].confusion_matrix, strict=True):
        ious = [entry.iou[label] for entry in result.backends.values()]
        changes = [result.iou_change(name, label) for name in others]
        rows.append((label, sum(counts), *map(_decimal, (*ious, *changes))))
    return _write(path, rows)


def write_per_image(path: Path, result: Result) -> Path:
    """Write per_image.csv: mIoU over the classes in an image's label, pixel accuracy, IoU, prediction agreement."""
    scores = result.details.scores
    table = {"image": [image_name(path) for path in result.details.image_paths]}
    for name, matrices in scores.confusion_matrices.items():
        table[f"{name} mIoU"] = _percentages(metrics.image_mious(matrices))
        table[f"{name} pixel accuracy"] = _percentages(map(metrics.pixel_accuracy, matrices))
        for label, ious in zip(CLASSES, metrics.image_ious(matrices).T, strict=True):
            table[f"{name} IoU {label}"] = _percentages(ious)
    for pair, counts in scores.agreeing_pixels.items():
        table[f"{'|'.join(pair)} agreement"] = _percentages(counts / scores.pixels_per_image)
    return _write(path, [table.keys(), *zip(*table.values(), strict=True)])


def write_sensitivity(path: Path, sensitivity: Sensitivity) -> Path:
    """Write sensitivity.csv: the fields of SensitivityRow and the gain in dB, the most sensitive quantizer first."""
    rows = [asdict(row) | {"gain_only_disabled": sensitivity.gain(row)} for row in sensitivity.rows]
    cells = [[_decimal(value) if isinstance(value, float | None) else value for value in row.values()] for row in rows]
    return _write(path, [rows[0].keys(), *cells])


def write_recovery(path: Path, recovery: Recovery) -> Path:
    """Write recovery.csv: the fields of RecoveryStep, with both limits of each interval, in the order of the steps."""
    rows = [_step_cells(step) | {"outcome": recovery.outcome(step)} for step in recovery.steps]
    return _write(path, [rows[0].keys(), *(row.values() for row in rows)])


def _step_cells(step: RecoveryStep) -> dict[str, str]:
    (miou_lower, miou_upper), (drop_lower, drop_upper) = (
        map(_decimal, limits or (None, None)) for limits in (step.miou_interval, step.drop_interval)
    )
    return {
        "name": step.name,
        "miou": _decimal(step.miou),
        "miou_lower": miou_lower,
        "miou_upper": miou_upper,
        "drop": _decimal(step.drop),
        "drop_lower": drop_lower,
        "drop_upper": drop_upper,
        "bit_operations": f"{step.bit_operations:.6f}",
        "weight_bytes": f"{step.weight_bytes:.6f}",
        "seconds": _decimal(step.seconds),
    }


def write_comparison(path: Path, comparison: ModelComparison) -> Path:
    """Write comparison.csv: a row per model, in the order of the run, with the metrics of every backend and the costs.

    The mIoU drop is that against FP32 on the same images. "yes" and "no" say whether a model is on a Pareto front; the
    cell is empty if it cannot be on it.
    """
    rows = [_model_cells(model, comparison) for model in comparison.models]
    return _write(path, [rows[0].keys(), *(row.values() for row in rows)])


def _model_cells(model: ComparedModel, comparison: ModelComparison) -> dict[str, Any]:
    cells: dict[str, Any] = {"model": model.name, "report": model.link or "", "images": model.images}
    for name in comparison.backends:
        cells |= _backend_cells(name, model.backends)
    if any(other.npu for other in comparison.models):
        cells["NPU images"] = len(model.npu.images) if model.npu else ""
        cells |= _backend_cells(INT8_NPU, model.npu.backends if model.npu else {})
    for name in (FP32, INT8_SIMULATED):
        cells[f"{name} published"] = _decimal(model.published.get(name))
    cells |= {"parameters": model.parameters, "GMACs": _decimal(model.gmacs), **_latency_cells(model.latency)}
    for cost in COSTS:
        on_front = "yes" if model in comparison.front(cost) else "no"
        cells[f"on the front by {cost.name}"] = on_front if comparison.eligible(model, cost) else ""
    return cells


def _backend_cells(name: str, backends: Mapping[str, BackendResult]) -> dict[str, str]:
    """Return the mIoU, the mIoU drop and the limits of both intervals; empty if there is no such backend."""
    entry = backends.get(name)
    values = {"mIoU": (entry.miou, entry.miou_interval) if entry else (None, None)}
    if name != FP32:
        values["drop"] = (miou_drops(backends)[name], entry.drop_interval) if entry else (None, None)
    cells = {}
    for metric, (value, limits) in values.items():
        lower, upper = limits or (None, None)
        cells[f"{name} {metric}"] = _decimal(value)
        cells |= {f"{name} {metric} lower": _decimal(lower), f"{name} {metric} upper": _decimal(upper)}
    return cells


def _latency_cells(latency: PublishedLatency | None) -> dict[str, str]:
    """Return the device, the size of AI Hub's images and the latency of each runtime in milliseconds."""
    runtimes = latency.milliseconds if latency else ByRuntime(None, None, None)
    return {
        "latency device": latency.device if latency else "",
        "latency image size": "{}x{}".format(*latency.input_size) if latency else "",
        "TFLite ms": _decimal(runtimes.tflite),
        "DLC ms": _decimal(runtimes.dlc),
        "ONNX ms": _decimal(runtimes.onnx),
    }


def write_npu_layers(path: Path, layers: Sequence[LayerDivergence]) -> Path:
    """Write npu_layers.csv: how far the NPU is from the simulation at each quantized activation, in graph order."""
    differences = ("differing %", "mean difference in steps", "largest difference in steps")
    heading = ("layer", *differences, *(f"{name}, same input" for name in differences))
    rows = [(layer.layer, *_difference_cells(layer.total), *_difference_cells(layer.own)) for layer in layers]
    return _write(path, [heading, *rows])


def _difference_cells(difference: Difference) -> tuple[str, str, int]:
    return _decimal(100 * difference.differing), f"{difference.mean_steps:.6f}", difference.largest_steps


def _percentages(shares: Iterable[np.floating | float]) -> list[str]:
    return [_decimal(percent(float(share))) for share in shares]


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _write(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return write_atomically(path, text.getvalue())

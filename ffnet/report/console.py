"""The report on the console, and the table of models."""

from collections.abc import Mapping

from ffnet.evaluation.backends import FP32
from ffnet.labels import CLASSES
from ffnet.model import build_without_weights, count_parameters
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.results.ai_hub import MIOU_IMAGES, SOURCE, galaxy_s25
from ffnet.results.result import BackendResult, NpuResult, Result, miou_drop, miou_drops
from ffnet.system.text import Rows, count, format_number, format_table, interval_column, join_columns
from ffnet.variants import INPUT_SIZE, VARIANTS, Variant

IOU_DROP = 1.0  # percentage points; classes whose IoU drops at least as much are shown in red
SENSITIVE_QUANTIZERS = 10  # rows of the sensitivity table
RAISED_QUANTIZERS = 12  # rows of the table of raised quantizers
S25_COLUMNS = ("S25 float mIoU", "S25 W8A8 mIoU", "S25 W8A8 ms")
S25_NOTE = f"""\
S25: on a Galaxy S25, from {SOURCE}; mIoU on {MIOU_IMAGES} images (W8A8 by ONNX), latency by TFLite/DLC/ONNX.
There the input of the two pre_down models is 512x1024: their S25 mIoU is not comparable with that at 1024x2048."""
BOLD, RED, RESET = "\x1b[1m", "\x1b[31m", "\x1b[0m"


def format_console(result: Result, color: bool = False) -> str:
    """Return the whole report as text; `color` adds bold headings and shows classes with a large IoU drop in red."""
    title = f"{result.model} on {count(result.images, 'image')} of {result.dataset}, {result.device}"
    heading = "\n".join((title, *(f"Note: {note}" for note in result.notes)))
    contents = (
        _backends_table(result.backends, result.published),
        _agreement_table(result.agreement),
        *(_recovery_tables(result.recovery) if result.recovery else ()),
        *(_npu_tables(result.npu) if result.npu else ()),
        _classes_table(result),
        _sensitivity_table(result),
        _stages_table(result),
    )
    tables = [format_table(rows) for rows in contents if rows]
    if color:
        tables = [_colored(table, result) for table in tables]
    return "\n\n".join((heading, *tables))


def format_models() -> str:
    """Return the table of the published variants: parameters, sizes in pixels, mIoU in percent, latency."""
    rows = [["model", "parameters", "input", "output", "FP32 mIoU", "INT8 mIoU", *S25_COLUMNS]]
    for variant in VARIANTS.values():
        if not variant.is_demo:
            parameters = count_parameters(build_without_weights(variant.name))
            strides = (1, _output_stride(variant))
            sizes = ("x".join(str(length // stride) for length in INPUT_SIZE) for stride in strides)
            published = (format_number(miou, 1) for miou in (variant.published.fp32, variant.published.int8))
            s25 = _galaxy_s25_cells(variant.name)
            rows.append([variant.name, f"{parameters / 1e6:.2f} M", *sizes, *published, *s25])
    return f"{format_table(rows)}\n\n{S25_NOTE}"


def _galaxy_s25_cells(name: str) -> list[str]:
    """Return the cells of S25_COLUMNS for a variant."""
    result = galaxy_s25(name)
    if result is None:
        return ["-"] * len(S25_COLUMNS)
    latency = (result.latency.tflite, result.latency.dlc, result.latency.onnx)
    mious = (format_number(miou, 1) for miou in (result.float_miou, result.w8a8_miou.onnx))
    return [*mious, "/".join(format_number(value, 1) for value in latency)]


def _output_stride(variant: Variant) -> int:
    """Return how many times smaller than the input the logits are, which have the size of the finest feature map."""
    first_stage = 1 if variant.stem == "C" else variant.strides[0]  # stem C takes its finest map before the first stage
    return 4 * first_stage * (2 if variant.pre_down else 1)


def _backends_table(backends: Mapping[str, BackendResult], published: Mapping[str, float]) -> Rows:
    """Return the metrics of every backend; intervals and published values have columns only if there are any."""
    entries, drops = backends.values(), miou_drops(backends)
    columns = [
        ["backend", *backends],
        ["mIoU %", *(format_number(entry.miou) for entry in entries)],
        interval_column([entry.miou_interval for entry in entries]),
        ["mIoU drop", *map(format_number, drops.values())],
        interval_column([entry.drop_interval for entry in entries]),
    ]
    if published:
        columns.append(["published %", *(format_number(published.get(name), 1) for name in backends)])
        columns.append(["drop", *(format_number(miou_drop(published, name), 1) for name in backends)])
    columns.append(["images/s", *(format_number(entry.images_per_second) for entry in entries)])
    return join_columns(columns)


def _agreement_table(agreement: Mapping[str, float]) -> Rows:
    rows = [(pair.replace("|", " and "), format_number(value)) for pair, value in agreement.items()]
    return [("prediction agreement", "pixels %"), *rows] if rows else []


def _recovery_tables(recovery: Recovery) -> tuple[Rows, Rows]:
    """Return the steps of accuracy recovery below FP32, and the first quantizers with more bits, if there are any."""
    steps = recovery.steps
    columns = [
        [f"recovery, on {count(len(recovery.selection_images), 'selection image')}", FP32, *(s.name for s in steps)],
        ["mIoU %", *(format_number(miou) for miou in (recovery.fp32_miou, *(step.miou for step in steps)))],
        interval_column([None, *(step.miou_interval for step in steps)]),
        ["mIoU drop", "-", *(format_number(step.drop) for step in steps)],
        interval_column([None, *(step.drop_interval for step in steps)]),
        ["bit ops, % of W8A8", "-", *(format_number(100 * step.bit_operations) for step in steps)],
        ["weight bytes, % of W8A8", "-", *(format_number(100 * step.weight_bytes) for step in steps)],
        ["seconds", "-", *(format_number(step.seconds, 1) for step in steps)],
        ["outcome", "-", *map(recovery.outcome, steps)],
    ]
    raised = [(quantizer.layer, quantizer.tensor, str(quantizer.bits)) for quantizer in recovery.raised]
    shown = raised[:RAISED_QUANTIZERS]
    heading = f"raised quantizers ({len(shown)} of {len(raised)})"
    return join_columns(columns), [(heading, "tensor", "bits"), *shown] if shown else []


def _npu_tables(npu: NpuResult) -> tuple[Rows, Rows]:
    """Return the metrics and the agreement of every backend on the images that the NPU ran."""
    (_, *columns), *rows = _backends_table(npu.backends, npu.published)
    (_, percent), *pairs = _agreement_table(npu.agreement)
    where = f"on the {count(len(npu.images), 'image')} of the NPU"
    return [(where, *columns), *rows], [(f"prediction agreement {where}", percent), *pairs]


def _classes_table(result: Result) -> Rows:
    """Return the IoU of every class and, after each backend but the first, its change in percentage points."""
    first, *others = result.backends
    rows = [["IoU % per class", first, *(heading for name in others for heading in (name, "change"))]]
    for label, base in result.backends[first].iou.items():
        row = [label, format_number(base)]
        for name in others:
            row += [
                format_number(result.backends[name].iou[label]),
                format_number(result.iou_change(name, label), sign="+"),
            ]
        rows.append(row)
    return rows


def _sensitivity_table(result: Result) -> Rows:
    sensitivity = result.details.diagnostics.sensitivity
    if not sensitivity:
        return []
    rows = [("most sensitive quantizers", "kind", "bits", "SQNR dB, only enabled", "gain dB, only disabled")]
    for row in sensitivity.rows[:SENSITIVE_QUANTIZERS]:
        decibels = (format_number(row.sqnr_only_enabled, 1), format_number(sensitivity.gain(row), 2, "+"))
        rows.append((f"{row.layer} {row.role}", row.kind, str(row.bits), *decibels))
    return rows


def _stages_table(result: Result) -> Rows:
    return [("stage", "seconds"), *((stage, format_number(time, 1)) for stage, time in result.stage_seconds.items())]


def _colored(table: str, result: Result) -> str:
    """Return a table with a bold heading, and in red the rows of classes with a large IoU drop."""
    changes = [(label, result.iou_change(name, label)) for name in result.backends for label in CLASSES]
    large_drops = tuple(f"{label} " for label, change in changes if change is not None and change <= -IOU_DROP)
    heading, *rows = table.split("\n")
    rows = [f"{RED}{row}{RESET}" if row.startswith(large_drops) else row for row in rows]
    return "\n".join((f"{BOLD}{heading}{RESET}", *rows))

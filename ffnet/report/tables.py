"""The tables of a run and of a comparison: defined once, printed on the console and shown on the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffnet.chips import CHIPS
from ffnet.evaluation.metrics import Interval, changed_cells
from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE, ONNX_RUNTIME, SIMULATED
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.results.comparison import COMMON_PREFIX, COSTS, Front, ModelComparison, excludes_zero
from ffnet.results.result import BackendResult, ChipResult, ClassCount, NpuResult, Result, miou_change
from ffnet.system.text import count, decimals, format_interval, format_number, format_table

Value = str | int | float | Interval | None
NUMBER, CHANGE, TEXT, MODEL, CLASS = "number", "change", "text", "model", "class"  # kinds of columns
FEW = "(few)"  # mark of a class whose IoU is based on few images


@dataclass(frozen=True)
class Column:
    """A column: its heading, and the value that each row's object has in it."""

    heading: str
    value: Callable[[Any], Value]
    digits: int | Callable[[Any], int] = 2  # decimals of a float, or of those of a row
    kind: str = NUMBER
    optional: bool = False  # left out if no row has a value
    shade: Callable[[Any], float | None] | None = None  # color on the page, as for a change in percentage points

    @property
    def is_text(self) -> bool:
        """Whether the values are text."""
        return self.kind in (TEXT, MODEL, CLASS)

    def text(self, row: Any) -> str:
        """Return the value of a row as text; a hyphen if it has none."""
        value, digits = self.value(row), self.digits(row) if callable(self.digits) else self.digits
        if isinstance(value, tuple):
            return format_interval(value, digits)
        if isinstance(value, str):
            return value or "-"
        return format_number(value, 0 if isinstance(value, int) else digits, "+" if self.kind == CHANGE else "")


def change_columns(
    change: Callable[[Any], float | None],
    interval: Callable[[Any], Interval | None],
    digits: int | Callable[[Any], int] = 2,
) -> tuple[Column, Column]:
    """Return the columns of a change and of its interval; only a change whose interval excludes zero has a color."""
    return (
        Column(
            "change", change, digits, CHANGE, shade=lambda row: change(row) if excludes_zero(interval(row)) else None
        ),
        Column("95 % CI", interval, digits, optional=True),
    )


@dataclass(frozen=True)
class Table:
    """A table: how each column is computed from the objects of its rows."""

    name: str  # id of the element of the page
    columns: Sequence[Column]
    rows: Sequence[Any]
    numbered: bool = False  # rows are numbered from 1, as in the chart beside the table
    dense: bool = False  # many narrow columns

    def shown_columns(self) -> list[Column]:
        """Return the columns without optional ones that have no value."""
        return [
            column
            for column in self.columns
            if not column.optional or any(column.value(row) not in (None, "") for row in self.rows)
        ]

    def format(self, most: int | None = None) -> str:
        """Return the headings and at most the first `most` rows as aligned lines; "" if there are no rows."""
        columns, rows = self.shown_columns(), self.rows[:most]
        if not rows:
            return ""
        lines = [[column.heading for column in columns], *([column.text(row) for column in columns] for row in rows)]
        if self.numbered:
            lines = [[f"{index or '#':>2}  {first}", *rest] for index, (first, *rest) in enumerate(lines)]
        return format_table(lines)


@dataclass(frozen=True)
class BackendRow:
    """One backend, and the result that it is part of; in a comparison, with its model and number of images."""

    backend: str
    result: Result | NpuResult
    model: str = ""
    images: int | None = None
    label: str = ""  # name to show; "": that of the backend

    @property
    def entry(self) -> BackendResult:
        """The metrics of the backend."""
        return self.result.backends[self.backend]


def result_table(result: Result | NpuResult, name: str = "backends", heading: str = "backend") -> Table:
    """Return the metrics of every backend of a run or of its part on the NPU."""
    return _backends_table([BackendRow(backend, result) for backend in result.backends], name, heading)


def miou_decimals(row: BackendRow) -> int:
    """Return the decimals of the mIoUs and changes of all backends of a row's result."""
    base, *others = row.result.backends.values()
    return decimals(base.miou, *((entry.miou, entry.change, entry.change_interval) for entry in others))


def _backends_table(rows: Sequence[BackendRow], name: str = "backends", heading: str = "backend") -> Table:
    columns = (
        Column("model", lambda row: row.model, kind=MODEL, optional=True),
        Column(heading, lambda row: row.label or row.backend, kind=TEXT),
        Column("images", lambda row: row.images, optional=True),
        Column("mIoU %", lambda row: row.entry.miou, miou_decimals),
        Column("95 % CI", lambda row: row.entry.miou_interval, optional=True),
        *change_columns(lambda row: row.entry.change, lambda row: row.entry.change_interval, miou_decimals),
        Column("published %", lambda row: row.result.published.get(row.backend), 1, optional=True),
        Column("change", lambda row: miou_change(row.result.published, row.backend), 1, CHANGE, optional=True),
        Column("pixel accuracy %", lambda row: row.entry.pixel_accuracy),
    )
    return Table(name, columns, rows)


def baseline_table(results: Sequence[Result]) -> Table:
    """Return the change of every backend since the baseline; `results`: one, or those of several models."""
    rows = [(each, change) for each in results if each.baseline for change in each.baseline.changes]
    folders = [each.baseline.folder if len(results) == 1 else "the baseline" for each in results if each.baseline]
    columns = (
        Column("model", lambda row: row[0].model.removeprefix(COMMON_PREFIX) * (len(results) > 1), 0, TEXT, True),
        Column(f"against {folders[0]}" if folders else "", lambda row: row[1].backend, kind=TEXT),
        Column("baseline", lambda row: row[1].baseline_backend, kind=TEXT),
        Column("images", lambda row: row[1].images),
        Column("baseline mIoU %", lambda row: row[1].baseline_miou),
        Column("mIoU %", lambda row: row[1].miou),
        *change_columns(lambda row: row[1].change, lambda row: row[1].change_interval),
    )
    return Table("baseline", columns, rows)


def times_table(result: Result, least: float = 0.0) -> Table:
    """Return the time of every stage of at least `least` seconds, of every network, and in total."""
    rows: list[tuple[str, float, float | None]] = []
    rows += [(stage, seconds, None) for stage, seconds in result.stage_seconds.items() if seconds >= least]
    entries = [(name, result.images, entry) for name, entry in result.backends.items()]
    npu = result.names.of(NPU)
    entries += [(label, len(each.images), each.backends[npu]) for label, each in result.npus.items()]
    rows += [(f"network: {name}", images / e.images_per_second, e.images_per_second) for name, images, e in entries]
    columns = (
        Column("time", lambda row: row[0], kind=TEXT),
        Column("seconds", lambda row: row[1], 1),
        Column("images/s", lambda row: row[2]),
    )
    return Table("times", columns, [*rows, ("total", sum(result.stage_seconds.values()), None)])


def pairs_table(name: str, headings: tuple[str, str], pairs: Mapping[str, Any], digits: int = 2) -> Table:
    """Return a table of two columns; values that are no floats are shown as text."""
    kind = NUMBER if all(isinstance(value, float) for value in pairs.values()) else TEXT
    columns = (
        Column(headings[0], lambda pair: pair[0], kind=TEXT),
        Column(headings[1], lambda pair: pair[1] if kind == NUMBER or pair[1] is None else str(pair[1]), digits, kind),
    )
    return Table(name, columns, list(pairs.items()))


def agreement_table(name: str, agreement: Mapping[str, float], where: str = "") -> Table:
    """Return the prediction agreement of each pair of backends; `where`: on which images."""
    heading = f"prediction agreement {where}".strip()
    pairs = {pair.replace("|", " and "): percent for pair, percent in agreement.items()}
    return pairs_table(name, (heading, "pixels %"), pairs)


def npu_tables(result: Result) -> list[Table]:
    """Return the table of several chips, and the metrics and the agreement of each group on the images of the NPU."""
    tables = [chips_table(result)] if len(result.npu_chips) > 1 else []
    for npu in result.npus.values():
        comma, dash = (f", {npu.chip}", f"-{npu.chip}") if result.other_npus else ("", "")
        where = f"on the {count(len(npu.images), 'image')} of the NPU{comma}"
        tables.append(result_table(npu, f"npu-backends{dash}", where))
        tables.append(agreement_table(f"npu-agreement{dash}", npu.agreement, where))
    return tables


def chips_table(result: Result) -> Table:
    """Return what each chip makes of the file, and beside it what Qualcomm AI Hub measured on a device with it."""
    npus = {chip: npu for npu in result.npus.values() for chip in (npu.chip, *npu.same_chips)}
    name = result.names.of(NPU)
    others = (ONNX_FILE, result.names.of(SIMULATED), result.names.of(ONNX_RUNTIME))
    simulated = f"{next((other for other in others if other in result.backends), others[1])}|{name}"

    def metric(field: str) -> Callable[[ChipResult], Any]:
        return lambda row: getattr(npus[row.chip].backends[name], field) if row.chip in npus else None

    columns = (
        Column("chip", lambda row: row.chip, kind=TEXT),
        Column("NPU", lambda row: CHIPS[row.chip].architecture, kind=TEXT),
        Column("computes as", lambda row: npus[row.chip].chip if row.chip in npus else None, kind=TEXT),
        Column("mIoU %", metric("miou")),
        Column("95 % CI", metric("miou_interval"), optional=True),
        *change_columns(metric("change"), metric("change_interval")),
        Column("change on a device (AI Hub)", lambda row: row.measured_change, 1, CHANGE, optional=True),
        Column("agreement %", lambda row: npus[row.chip].agreement.get(simulated) if row.chip in npus else None),
        Column("latency ms (AI Hub)", lambda row: row.latency, kind=TEXT, optional=True),
        Column("nodes not on the NPU", lambda row: row.describe_nodes(), kind=TEXT),
    )
    return Table("chips", columns, result.npu_chips)


def recovery_table(recovery: Recovery) -> Table:
    """Return the steps of accuracy recovery."""
    images = count(len(recovery.selection_images), "selection image")
    heading = f"recovery, on {images} ({FP32}: {format_number(recovery.fp32_miou)} %)"
    columns = (
        Column(heading, lambda step: step.name, kind=TEXT),
        Column("mIoU %", lambda step: step.miou),
        Column("95 % CI", lambda step: step.miou_interval, optional=True),
        *change_columns(lambda step: step.change, lambda step: step.change_interval),
        Column("bit ops, % of W8A8", lambda step: 100 * step.bit_operations),
        Column("weight bytes, % of W8A8", lambda step: 100 * step.weight_bytes),
        Column("seconds", lambda step: step.seconds, 1),
        Column("outcome", recovery.outcome, kind=TEXT),
    )
    return Table("recovery", columns, recovery.steps, numbered=True)


def raised_table(recovery: Recovery) -> Table:
    """Return the quantizers that accuracy recovery gave more bits."""
    columns = (
        Column(f"raised quantizers ({len(recovery.raised)})", lambda quantizer: quantizer.layer, kind=TEXT),
        Column("tensor", lambda quantizer: quantizer.tensor, kind=TEXT),
        Column("bits", lambda quantizer: quantizer.bits),
    )
    return Table("raised", columns, recovery.raised)


def classes_table(result: Result) -> Table:
    """Return the IoU of every class and, after each backend but the first, its change in percentage points.

    The number of images with the class is marked with FEW if it is small.
    """
    columns = [Column("IoU % per class", str, kind=CLASS)]
    columns.append(Column("images", lambda label: _image_count(result.classes[label]), kind=TEXT))
    base, *others = result.backends.values()

    def digits(label: str) -> int:
        found = ((each.iou[label], each.iou_change.get(label), each.iou_change_interval.get(label)) for each in others)
        return decimals(base.iou[label], *found)

    for name, entry in result.backends.items():
        columns.append(Column(name, entry.iou.get, digits))
        if entry is not base:
            columns += change_columns(entry.iou_change.get, entry.iou_change_interval.get, digits)
    return Table("classes", columns, list(result.classes))


def compared_classes_table(comparison: ModelComparison) -> Table:
    """Return the IoU of every class in the simulation of each model; a change that is certain has a color."""
    columns = [Column("IoU %; color: the interval of the change from FP32 excludes zero", str, kind=CLASS)]
    columns.append(Column("images", lambda label: _image_count(comparison.last.classes[label]), kind=TEXT))
    for model in comparison.models:
        if entry := model.simulated:
            shade = change_columns(entry.iou_change.get, entry.iou_change_interval.get)[0].shade
            columns.append(Column(model.short_name, entry.iou.get, 1, shade=shade))
    return Table("classes", columns, list(comparison.last.classes), dense=True)


def _image_count(classes: ClassCount) -> str:
    return f"{classes.images} {FEW}" if classes.few else str(classes.images)


def confusion_tables(result: Result) -> list[Table]:
    """Return the confusion matrix of each backend in percent of a class's labelled pixels.

    With several backends, the change from the first to the second comes first.
    """
    shares, classes = {}, list(result.classes)
    for name, entry in result.backends.items():
        matrix = np.array(entry.confusion_matrix, np.float64)
        shares[name] = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # 0 without labelled pixels
    found = [_matrix_table(f"{name}, percent", classes, share, share / 20) for name, share in shares.items()]
    if len(shares) > 1:
        (first, before), (second, after) = list(shares.items())[:2]
        is_certain = changed_cells(*list(result.details.scores.confusion_matrices.values())[:2])
        better = np.where(np.eye(len(classes)), 1, -1) * np.where(is_certain, after - before, 0.0)
        title = f"Change from {first} to {second} in percentage points; colored if its interval excludes zero"
        found.insert(0, _matrix_table(title, classes, after - before, better))
    return found


def _matrix_table(title: str, classes: Sequence[str], matrix: np.ndarray, shades: np.ndarray) -> Table:
    """Return the table of a matrix with a row and a column for each class."""
    columns = [Column(title, classes.__getitem__, kind=CLASS)]
    for index, label in enumerate(classes):
        columns.append(Column(label, matrix[:, index].tolist().__getitem__, 1, shade=shades[:, index].__getitem__))
    return Table(title.partition(",")[0].replace(" ", "-"), columns, range(len(classes)), dense=True)


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """Return the quantizers, the most sensitive one first."""
    columns = (
        Column("most sensitive quantizers", lambda row: f"{row.layer} {row.role}", kind=TEXT),
        Column("kind", lambda row: row.kind, kind=TEXT),
        Column("bits", lambda row: row.bits),
        Column("SQNR dB, only enabled", lambda row: row.sqnr_only_enabled, 1),
        Column("agreement %", lambda row: row.agreement_only_enabled),
        Column("gain dB, only disabled", sensitivity.gain, kind=CHANGE),
        Column("agreement %", lambda row: row.agreement_only_disabled),
    )
    return Table("sensitivity", columns, sensitivity.rows, numbered=True)


def placement_table(placement: Sequence[tuple[str, str]]) -> Table:
    """Return the tensors that only one of the encodings and the published configuration quantizes."""
    columns = (
        Column("tensor", lambda row: row[0], kind=TEXT),
        Column("quantized only by", lambda row: row[1], kind=TEXT),
    )
    return Table("placement", columns, placement)


def models_table(comparison: ModelComparison) -> Table:
    """Return the models of a comparison with their costs and the units of the costs by which they are on the front."""
    fronts = comparison.fronts()
    columns = (
        Column(f"model ({COMMON_PREFIX}...)", lambda model: model.short_name, kind=MODEL),
        Column(f"{comparison.precision} %", lambda model: model.miou),
        Column("M params", lambda model: model.parameters / 1e6),
        Column("GMACs", lambda model: model.gmacs, 1),
        Column("latency ms", lambda m: m.published and m.published.describe_latency(), kind=TEXT, optional=True),
        Column("at", lambda m: m.published and "{}x{}".format(*m.published.input_size), kind=TEXT, optional=True),
        Column("on front", lambda m: ", ".join(f.cost.unit for f in fronts if f.has(m)), kind=TEXT, optional=True),
    )
    return Table("models", columns, comparison.models, numbered=True)


def compared_backends_table(comparison: ModelComparison) -> Table:
    """Return the metrics of every backend of every model; those of the NPU on the images that it ran."""
    rows: list[BackendRow] = []
    for model in comparison.models:
        result = model.result
        rows += [BackendRow(name, result, model.short_name, result.images) for name in result.backends]
        for label, npu in result.npus.items():
            rows.append(BackendRow(result.names.of(NPU), npu, model.short_name, len(npu.images), label))
    return _backends_table(rows)


def front_table(front: Front) -> Table:
    """Return the members of a Pareto front from the cheapest to the most accurate one."""
    columns = (
        Column(f"Pareto front by {front.cost.name}", lambda member: member.model.short_name, kind=MODEL),
        Column(front.cost.unit, lambda member: member.cost, 1),
        Column("mIoU %", lambda member: member.model.miou),
        Column("gain", lambda member: member.gain and member.gain.value, kind=CHANGE),
        Column("95 % CI", lambda member: member.gain_interval, optional=True),
        Column(
            "excludes 0",
            lambda member: {None: "", True: "yes", False: "no"}[excludes_zero(member.gain_interval)],
            kind=TEXT,
        ),
    )
    return Table(f"front-{COSTS.index(front.cost) + 1}", columns, front.members)

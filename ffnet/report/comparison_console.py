"""The comparison of several models on the console."""

from collections.abc import Sequence

from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.results.comparison import COMMON_PREFIX, COSTS, ComparedModel, Front, ModelComparison
from ffnet.results.comparison_notes import all_notes
from ffnet.system.text import Rows, count, format_number, format_table, interval_column, join_columns

LEGEND = f"""\
Pareto front: no other model has at most the same cost (GMACs: 10**9 multiply-accumulates of one image, or ms: published
latency) and at least the same mIoU of {INT8_SIMULATED}.
Gain: in percentage points over the next cheaper model of the front, with its paired 95 % confidence interval (CI)."""


def format_comparison(comparison: ModelComparison) -> str:
    """Return the comparison as text: heading and notes, the tables, and which model to deploy."""
    images = count(comparison.images, "image")
    models = count(len(comparison.models), "model")
    height, width = comparison.image_size
    title = f"Comparison of {models} on {images} of {comparison.dataset}, {height}x{width}, {comparison.device}"
    heading = [title, *(f"Note: {note}" for note in all_notes(comparison))]
    fronts = comparison.fronts()
    tables = (_models_table(comparison), _backends_table(comparison), *(_front_table(front) for front in fronts))
    parts = ["\n".join(heading), *(format_table(rows) for rows in tables if rows)]
    answers = [front.describe(comparison.images) for front in fronts]
    return "\n\n".join((*parts, LEGEND, "\n".join(answers)) if answers else parts)


def _models_table(comparison: ModelComparison) -> Rows:
    """Return a row per model; published values have columns only if there are any."""
    models = comparison.models
    int8 = [model.backends.get(INT8_SIMULATED) for model in models]
    columns = [
        [f"model ({COMMON_PREFIX}...)", *(model.short_name for model in models)],
        ["FP32 %", *(format_number(model.miou(FP32)) for model in models)],
        ["INT8 %", *(format_number(model.int8_miou) for model in models)],
        ["drop", *(format_number(model.drops.get(INT8_SIMULATED)) for model in models)],
        interval_column([entry.drop_interval if entry else None for entry in int8]),
        _column("published %", [_published(model) for model in models]),
        ["M params", *(format_number(model.parameters / 1e6) for model in models)],
        ["GMACs", *(format_number(model.gmacs, 1) for model in models)],
        _column("latency ms", [_latency(model) for model in models]),
        _column("on front", [_marks(comparison, model) for model in models]),
    ]
    return join_columns(columns)


def _column(heading: str, cells: Sequence[str]) -> list[str]:
    """Return a column; empty if no model has a value."""
    return [heading, *(cell or "-" for cell in cells)] if any(cells) else []


def _published(model: ComparedModel) -> str:
    values = [format_number(model.published.get(name), 1) for name in (FP32, INT8_SIMULATED)]
    return "/".join(values) if model.published else ""


def _latency(model: ComparedModel) -> str:
    if model.latency is None:
        return ""
    latency = model.latency.milliseconds
    return "/".join(format_number(value, 1) for value in (latency.tflite, latency.dlc, latency.onnx))


def _marks(comparison: ModelComparison, model: ComparedModel) -> str:
    """Return the units of the costs by which a model is on the Pareto front."""
    return ", ".join(cost.unit for cost in COSTS if model in comparison.front(cost))


def _backends_table(comparison: ModelComparison) -> Rows:
    """Return the INT8 backends beside the simulation, with their number of images; empty if there are none."""
    scores = comparison.other_backends()
    columns = [
        ["other INT8 backends", *(score.model.short_name for score in scores)],
        ["backend", *(score.backend for score in scores)],
        ["images", *(str(score.images) for score in scores)],
        ["mIoU %", *(format_number(score.result.miou) for score in scores)],
        ["mIoU drop", *(format_number(score.drop) for score in scores)],
        interval_column([score.result.drop_interval for score in scores]),
    ]
    return join_columns(columns) if scores else []


def _front_table(front: Front) -> Rows:
    """Return the members of a Pareto front from the cheapest to the most accurate one."""
    members = front.members
    columns = [
        [f"Pareto front by {front.cost.name}", *(member.model.short_name for member in members)],
        [front.cost.unit, *(format_number(member.cost, front.cost.digits) for member in members)],
        ["INT8 %", *(format_number(member.miou) for member in members)],
        ["gain", *(format_number(member.gain, sign="+") for member in members)],
        interval_column([member.gain_interval for member in members]),
        ["excludes 0", *({None: "-", True: "yes", False: "no"}[member.distinct] for member in members)],
    ]
    return join_columns(columns)

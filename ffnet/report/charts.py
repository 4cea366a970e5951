"""Charts as SVG, each for light and for dark pages."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffnet.evaluation.metrics import Interval
from ffnet.evaluation.scores import FP32
from ffnet.quantization.recovery.outcome import CHOSEN, KEPT, NOT_KEPT, Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT
from ffnet.results.comparison import Front, ModelComparison

WIDTH = 5.2  # inches; a phone shrinks an SVG as a whole, which makes the text of a wider one too small
NUMBERED_QUANTIZERS = 5  # the sensitivity chart numbers only the most sensitive ones
LEAST_COST_RANGE = 4  # percent; taken for the range of the costs in the recovery chart if they differ less
STEP_DISTANCE = 0.06  # least distance of two steps in the recovery chart, as a share of the range of their costs

TEXT, GRID, GRAY, ORANGE, BLUE, PAPER = "#33383f", "#d8dce2", "#6b7686", "#c2410c", "#1d6fb8", "#ffffff"
DARK = {TEXT: "#c9d0da", GRID: "#39414d", GRAY: "#97a3b4", ORANGE: "#fb8a4c", BLUE: "#5eb0ef", PAPER: "#14171c"}
ON_FRONT, NOT_ON_FRONT = "on the Pareto front", "not on it"
KINDS = {  # kind of a point -> color, area of the marker in pt²
    NOT_ON_FRONT: (GRAY, 130),
    NOT_KEPT: (GRAY, 130),
    KEPT: (BLUE, 130),
    CHOSEN: (ORANGE, 190),
    ON_FRONT: (ORANGE, 150),
}
STYLE = matplotlib.rc_context(
    {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.axisbelow", "axes.grid", "figure.constrained_layout.use"), True),
        "axes.grid.axis": "y",
        "grid.linewidth": 0.7,
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "ffnet",  # the same result gives the same file
    }
)


@dataclass(frozen=True)
class Chart:
    """One chart as two SVG texts."""

    light: str
    dark: str


@STYLE
def sensitivity_chart(sensitivity: Sensitivity) -> Chart:
    """Draw the SQNR with only one quantizer enabled and the gain with only one disabled, from input to output."""
    figure = Figure((WIDTH, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for kind, color, marker in ((WEIGHT, BLUE, "o"), (ACTIVATION, ORANGE, "^")):
        rows = [row for row in sensitivity.rows if row.kind == kind]
        for axes, value in ((upper, lambda row: row.sqnr_only_enabled), (lower, sensitivity.gain)):
            values = np.array([value(row) for row in rows], float)  # nan for None
            axes.scatter([row.position for row in rows], values, s=20, color=color, marker=marker, label=kind)
    for rank, row in enumerate(sensitivity.rows[:NUMBERED_QUANTIZERS], 1):
        if row.sqnr_only_enabled is not None:
            point = (row.position, row.sqnr_only_enabled)
            upper.annotate(str(rank), point, (0, -12), textcoords="offset points", ha="center")
    upper.set(ylabel="only this enabled: SQNR, dB", ymargin=0.15)
    lower.set(ylabel="only this disabled: gain, dB", xlabel="quantizers from input to output")
    lower.axhline(0, color=TEXT, linewidth=0.8)
    add_legend(upper)
    return to_chart(figure)


@STYLE
def recovery_chart(recovery: Recovery) -> Chart:
    """Draw each step's mIoU against what it costs, numbered as in the report's table.

    Steps that cost the same, or nearly so, are drawn beside one another.
    """
    figure = Figure((WIDTH, 5.6))
    panels = figure.subplots(2, 1, sharey=True)
    for axes, name in zip(panels, ("bit_operations", "weight_bytes"), strict=True):
        _draw_baselines(axes, recovery)
        positions = spread([100 * getattr(step, name) for step in recovery.steps])
        for number, (step, position) in enumerate(zip(recovery.steps, positions, strict=True), 1):
            _draw_point(axes, number, position, step.miou, step.miou_interval, recovery.outcome(step))
        axes.set(xlabel=f"{name.replace('_', ' ')}, percent of W8A8", ylabel="mIoU, percent", xmargin=0.1)
    add_legend(panels[0], columns=3)
    return to_chart(figure)


@STYLE
def front_chart(comparison: ModelComparison, front: Front) -> Chart:
    """Draw the mIoU of each model in the simulation against its cost, numbered as in the report's table of models.

    Models on the Pareto front have their confidence intervals. The line through them is the highest mIoU that each cost
    allows.
    """
    figure, cost = Figure((WIDTH, 4.0)), front.cost
    axes = figure.subplots()
    line = [(member.cost, member.model.miou or 0.0) for member in front.members]
    axes.step(*np.transpose(line), where="post", color=ORANGE, linewidth=1, zorder=1)
    for number, model in enumerate(comparison.models, 1):
        on_front, value = front.has(model), cost.of(model)
        if on_front is not None and value is not None:
            interval = model.simulated.miou_interval if on_front and model.simulated else None
            _draw_point(axes, number, value, model.miou, interval, ON_FRONT if on_front else NOT_ON_FRONT)
    label = cost.name if cost.name == cost.unit else f"{cost.name}, {cost.unit}"
    axes.set(xlabel=label, ylabel="mIoU, percent", xmargin=0.08, ymargin=0.1)
    add_legend(axes)
    return to_chart(figure)


def _draw_point(axes: Axes, number: int, cost: float, miou: float | None, interval: Interval | None, kind: str) -> None:
    """Draw a mIoU with its confidence interval and, in the marker, a number; nothing without an mIoU."""
    color, area = KINDS[kind]
    if kind not in axes.get_legend_handles_labels()[1]:
        axes.scatter([], [], s=40, color=color, label=kind)
    if miou is None:
        return
    if interval:
        axes.vlines(cost, *interval, color=color, linewidth=area / 80, zorder=2)
    zorder = 4 if kind in (CHOSEN, ON_FRONT) else 3
    axes.scatter(cost, miou, s=area, color=color, zorder=zorder)
    axes.text(cost, miou, str(number), color=PAPER, fontsize=7.5, ha="center", va="center_baseline", zorder=zorder)


def _draw_baselines(axes: Axes, recovery: Recovery) -> None:
    """Draw the mIoU of FP32 and the least one that meets the target, as far as there are any."""
    if recovery.fp32_miou is None:
        return
    axes.axhline(recovery.fp32_miou, color=TEXT, linewidth=1.2, zorder=1, label=FP32)
    if recovery.target is not None:
        least, label = recovery.fp32_miou - recovery.target, f"target: {FP32} − {recovery.target:g}"
        axes.axhline(least, color=TEXT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1, label=label)


def spread(costs: Sequence[float]) -> list[float]:
    """Return costs in percent, increased as far as their markers would overlap; equal costs keep their order."""
    distance = STEP_DISTANCE * max(LEAST_COST_RANGE, np.ptp(costs))
    positions, last = np.array(costs, float), -np.inf
    for index in np.argsort(costs, kind="stable"):
        last = positions[index] = max(positions[index], last + distance)
    return positions.tolist()


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Add a legend above the axes, without a frame."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderpad=0)


def to_chart(figure: Figure) -> Chart:
    """Return a figure in the colors of light and of dark pages."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = dark = file.getvalue()
    for color, dark_color in DARK.items():
        dark = dark.replace(color, dark_color)
    return Chart(light, dark)

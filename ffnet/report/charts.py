"""Charts as SVG, each for light and for dark pages."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffnet.evaluation.backends import FP32
from ffnet.labels import CLASSES
from ffnet.onnx.divergence import LayerDivergence
from ffnet.quantization.recovery.outcome import CHOSEN, KEPT, NOT_KEPT, Recovery, RecoveryStep
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT
from ffnet.results.result import Result

WIDTH = 5.2  # inches; a phone shrinks an SVG as a whole, which makes the text of a wider one too small
NUMBERED_QUANTIZERS = 5  # of the most sensitive ones, in the sensitivity chart

LEAST_COST_RANGE = 4  # percent; width of the recovery chart's axes if the costs differ less
STEP_DISTANCE = 0.045  # least distance of two steps in the recovery chart, as a share of the range of their costs

TEXT, GRID, GRAY, ORANGE, BLUE, PAPER = "#33383f", "#d8dce2", "#6b7686", "#c2410c", "#1d6fb8", "#ffffff"
DARK = {
    TEXT: "#c9d0da",
    GRID: "#39414d",
    GRAY: "#97a3b4",
    ORANGE: "#fb8a4c",
    BLUE: "#5eb0ef",
    PAPER: "#14171c",
}
OUTCOMES = {CHOSEN: (ORANGE, 190), KEPT: (BLUE, 130), NOT_KEPT: (GRAY, 130)}  # -> color, area of the marker in pt²
STYLE = matplotlib.rc_context(
    {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.axisbelow", "figure.constrained_layout.use"), True),
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
def class_chart(result: Result) -> Chart:
    """Draw the IoU of each class in the first two backends, and the change, in the order of Cityscapes' classes."""
    first, second = list(result.backends)[:2]
    changes = {label: change for label in CLASSES if (change := result.iou_change(second, label)) is not None}
    before, after = ([result.backends[name].iou[label] for label in changes] for name in (first, second))
    rows = range(len(changes))
    figure = Figure((WIDTH, 0.9 + 0.235 * len(changes)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.hlines(rows, before, after, color=ORANGE, linewidth=2)
    left.scatter(after, rows, s=20, color=ORANGE, marker="D", label=second, zorder=2)
    left.scatter(before, rows, s=64, facecolors="none", edgecolors=GRAY, linewidths=1.6, label=first, zorder=3)
    left.set(xlim=(-3, 103), xlabel="IoU, percent", yticks=rows, yticklabels=changes, ylim=(len(changes) - 0.4, -0.6))
    add_legend(left, reverse=True)
    right.barh(rows, changes.values(), height=0.62, color=[ORANGE if c < 0 else BLUE for c in changes.values()])
    right.axvline(0, color=TEXT, linewidth=0.8)
    right.set(xlabel="change, percentage points", xmargin=0.1)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return to_chart(figure)


@STYLE
def sensitivity_chart(sensitivity: Sensitivity) -> Chart:
    """Draw the SQNR with only one quantizer enabled and the gain with only one disabled, from input to output."""
    figure = Figure((WIDTH, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for kind, color, marker in ((WEIGHT, BLUE, "o"), (ACTIVATION, ORANGE, "^")):
        rows = [row for row in sensitivity.rows if row.kind == kind]
        sqnr, gain = [row.sqnr_only_enabled for row in rows], [sensitivity.gain(row) for row in rows]
        for axes, values in ((upper, sqnr), (lower, gain)):
            positions = [row.position for row in rows]
            axes.scatter(positions, np.array(values, float), s=20, color=color, marker=marker, label=kind)
    for rank, row in enumerate(sensitivity.rows[:NUMBERED_QUANTIZERS], 1):
        if row.sqnr_only_enabled is not None:
            point = (row.position, row.sqnr_only_enabled)
            upper.annotate(str(rank), point, (0, -12), textcoords="offset points", ha="center")
    upper.set(ylabel="only this enabled: SQNR, dB", ymargin=0.15)
    lower.set(ylabel="only this disabled: gain, dB", xlabel="quantizers from input to output")
    lower.axhline(0, color=TEXT, linewidth=0.8)
    add_legend(upper)
    for axes in (upper, lower):
        axes.grid(axis="y")
    return to_chart(figure)


@STYLE
def npu_chart(layers: Sequence[LayerDivergence]) -> Chart:
    """Draw how far the NPU is from the simulation at each quantized activation, from input to output."""
    figure = Figure((WIDTH, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    positions = range(len(layers))
    for axes, values in (
        (upper, lambda difference: 100 * difference.differing),
        (lower, lambda difference: difference.mean_steps),
    ):
        axes.plot(positions, [values(layer.total) for layer in layers], color=ORANGE, label="from the image on")
        axes.bar(
            positions, [values(layer.own) for layer in layers], color=BLUE, label="layer alone, for the same input"
        )
        axes.grid(axis="y")
    upper.set(ylabel="differing values, percent", ylim=(0, None))
    lower.set(ylabel="mean difference, steps", xlabel="quantized activations from input to output", ylim=(0, None))
    add_legend(upper)
    return to_chart(figure)


@STYLE
def recovery_chart(recovery: Recovery) -> Chart:
    """Draw each step's mIoU against what it costs, numbered as in the report's table.

    Steps that cost the same, or nearly so, are drawn beside one another.
    """
    steps = recovery.steps
    costs = {
        "bit operations, percent of W8A8": [100 * step.bit_operations for step in steps],
        "weight bytes, percent of W8A8": [100 * step.weight_bytes for step in steps],
    }
    figure = Figure((WIDTH, 5.6))
    panels = figure.subplots(2, 1, sharey=True)
    for axes, (label, values) in zip(panels, costs.items(), strict=True):
        _draw_baselines(axes, recovery)
        positions = _cost_axis(axes, values)
        for number, (position, step) in enumerate(zip(positions, steps, strict=True), 1):
            _draw_step(axes, position, number, step, recovery.outcome(step))
        axes.set(xlabel=label, ylabel="mIoU, percent")
        axes.grid(axis="y")
    for outcome, (color, _) in OUTCOMES.items():
        if outcome in map(recovery.outcome, steps):
            panels[0].scatter([], [], s=40, color=color, label=outcome)
    add_legend(panels[0], columns=3)
    return to_chart(figure)


def _cost_axis(axes: Axes, costs: Sequence[float]) -> list[float]:
    """Set the limits of the axis of costs in percent, and return where on it each step is drawn."""
    distance = STEP_DISTANCE * max(LEAST_COST_RANGE, np.ptp(costs))
    positions = spread(costs, distance)
    middle = (min(positions) + max(positions)) / 2
    width = max(LEAST_COST_RANGE, np.ptp(positions) + 3 * distance)
    axes.set_xlim(middle - width / 2, middle + width / 2)
    return positions


def _draw_step(axes: Axes, position: float, number: int, step: RecoveryStep, outcome: str) -> None:
    """Draw a step's mIoU with its confidence interval, and its number in the marker; nothing without an mIoU."""
    if step.miou is None:
        return
    color, area = OUTCOMES[outcome]
    if step.miou_interval:
        axes.vlines(position, *step.miou_interval, color=color, linewidth=area / 80, zorder=2)
    axes.scatter(position, step.miou, s=area, color=color, zorder=3)
    axes.text(position, step.miou, str(number), color=PAPER, fontsize=7.5, ha="center", va="center_baseline")


def _draw_baselines(axes: Axes, recovery: Recovery) -> None:
    """Draw the mIoU of FP32 and the least one that meets the target, as far as there are any."""
    if recovery.fp32_miou is None:
        return
    axes.axhline(recovery.fp32_miou, color=TEXT, linewidth=1.2, zorder=1, label=FP32)
    if recovery.target is not None:
        least, label = recovery.fp32_miou - recovery.target, f"target: {FP32} − {recovery.target:g}"
        axes.axhline(least, color=TEXT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1, label=label)


def spread(values: Sequence[float], distance: float) -> list[float]:
    """Return the values moved as little as gives all of them at least this distance; equal ones keep their order.

    This is a least-squares fit: without the distances, the moved values must not decrease. Neighbours that would are
    replaced by their mean.
    """
    order = np.argsort(values, kind="stable")
    offsets = distance * np.arange(len(values))
    groups: list[list[float]] = []
    for value in np.take(values, order) - offsets:
        groups.append([value])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = np.empty(len(values))
    moved[order] = [np.mean(group) for group in groups for _ in group] + offsets
    return moved.tolist()


def add_legend(axes: Axes, reverse: bool = False, columns: int = 2) -> None:
    """Add a legend above the axes, without a frame."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderpad=0, reverse=reverse)


def to_chart(figure: Figure) -> Chart:
    """Return a figure in the colors of light and of dark pages."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = dark = file.getvalue()
    for color, dark_color in DARK.items():
        dark = dark.replace(color, dark_color)
    return Chart(light, dark)

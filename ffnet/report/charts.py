"""Charts as SVG, each for light and for dark pages."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets.cityscapes import CLASSES
from ffnet.onnx.divergence import LayerDivergence
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT
from ffnet.report.result import Result

WIDTH = 5.2  # inches; a phone shrinks an SVG as a whole, which makes the text of a wider one too small
NUMBERED_QUANTIZERS = 5  # of the most sensitive ones, in the sensitivity chart

TEXT, GRID, GRAY, ORANGE, BLUE = "#33383f", "#d8dce2", "#6b7686", "#c2410c", "#1d6fb8"
DARK = {TEXT: "#c9d0da", GRID: "#39414d", GRAY: "#97a3b4", ORANGE: "#fb8a4c", BLUE: "#5eb0ef"}
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
    _legend(left, reverse=True)
    right.barh(rows, changes.values(), height=0.62, color=[ORANGE if c < 0 else BLUE for c in changes.values()])
    right.axvline(0, color=TEXT, linewidth=0.8)
    right.set(xlabel="change, percentage points", xmargin=0.1)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return _chart(figure)


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
    _legend(upper)
    for axes in (upper, lower):
        axes.grid(axis="y")
    return _chart(figure)


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
    _legend(upper)
    return _chart(figure)


def _legend(axes: Axes, reverse: bool = False) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0, reverse=reverse)


def _chart(figure: Figure) -> Chart:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = dark = file.getvalue()
    for color, dark_color in DARK.items():
        dark = dark.replace(color, dark_color)
    return Chart(light, dark)

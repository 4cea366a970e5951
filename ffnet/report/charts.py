"""Charts as SVG, each once for light and once for dark pages."""

import io
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets.cityscapes import CLASSES
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT
from ffnet.report.result import Result

WIDTH = 5.2  # inches; a phone shrinks an SVG as a whole, which makes the text of a wider one too small
NUMBERED_QUANTIZERS = 5  # of the most sensitive ones, in the sensitivity chart

TEXT, GRID, GRAY, ORANGE, BLUE = "#33383f", "#d8dce2", "#6b7686", "#c2410c", "#1d6fb8"
DARK = {TEXT: "#c9d0da", GRID: "#39414d", GRAY: "#97a3b4", ORANGE: "#fb8a4c", BLUE: "#5eb0ef"}
STYLE = matplotlib.rc_context(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "ffnet",  # the same result gives the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": TEXT,
        "axes.edgecolor": GRID,
        "axes.labelcolor": TEXT,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "figure.constrained_layout.use": True,
    }
)


@dataclass(frozen=True)
class Chart:
    """One chart as two SVG texts, and its description for those who can't see it."""

    light: str
    dark: str
    description: str


@STYLE
def class_chart(result: Result) -> Chart:
    """Draw the IoU of each class in the first two backends, and the change, in the order of Cityscapes' classes."""
    first, second = list(result.backends)[:2]
    differences = {label: result.iou_change(second, label) for label in CLASSES}
    changes = {label: change for label, change in differences.items() if change is not None}
    before, after = ([result.backends[name].iou[label] for label in changes] for name in (first, second))
    rows = range(len(changes))

    figure = Figure((WIDTH, 0.9 + 0.235 * len(changes)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.hlines(rows, before, after, color=ORANGE, linewidth=2)
    left.scatter(after, rows, s=20, color=ORANGE, marker="D", label=second, zorder=2)
    left.scatter(before, rows, s=64, facecolors="none", edgecolors=GRAY, linewidths=1.6, label=first, zorder=3)
    left.set(xlim=(-3, 103), xlabel="IoU, percent", yticks=rows, yticklabels=changes)
    left.set_ylim(len(changes) - 0.4, -0.6)
    _legend(left, reverse=True)
    right.barh(rows, changes.values(), height=0.62, color=[ORANGE if c < 0 else BLUE for c in changes.values()])
    right.axvline(0, color=TEXT, linewidth=0.8)
    right.set(xlabel="change, percentage points")
    right.margins(x=0.1)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return _chart(figure, f"IoU per class in {first} and in {second}, and the change; the table has the same numbers")


@STYLE
def sensitivity_chart(sensitivity: Sensitivity) -> Chart:
    """Draw the SQNR with only one quantizer enabled and the gain with only one disabled, from input to output."""
    figure = Figure((WIDTH, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for kind, color, marker in ((WEIGHT, BLUE, "o"), (ACTIVATION, ORANGE, "^")):
        rows = sorted((row for row in sensitivity.rows if row.kind == kind), key=lambda row: row.position)
        sqnr = [(row.position, row.sqnr_only_enabled) for row in rows]
        gain = [(row.position, sensitivity.gain(row)) for row in rows]
        for axes, points in ((upper, sqnr), (lower, gain)):
            x, y = ([point[i] for point in points if point[1] is not None] for i in (0, 1))
            axes.scatter(x, y, s=20, color=color, marker=marker, label=kind)
    for rank, row in enumerate(sensitivity.rows[:NUMBERED_QUANTIZERS], 1):
        if row.sqnr_only_enabled is not None:
            point = (row.position, row.sqnr_only_enabled)
            upper.annotate(str(rank), point, (0, -12), textcoords="offset points", ha="center")
    upper.set(ylabel="only this enabled: SQNR, dB")
    upper.margins(y=0.15)
    lower.set(ylabel="only this disabled: gain, dB", xlabel="quantizers from input to output")
    lower.axhline(0, color=TEXT, linewidth=0.8)
    _legend(upper)
    for axes in (upper, lower):
        axes.grid(axis="y")
    return _chart(
        figure,
        "Signal-to-quantization-noise ratio of the logits with only one quantizer enabled, and the gain with only one "
        "disabled, from input to output; the table has the same numbers",
    )


def _legend(axes: Axes, reverse: bool = False) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0, reverse=reverse)


def _chart(figure: Figure, description: str) -> Chart:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = dark = file.getvalue()
    for color, dark_color in DARK.items():
        dark = dark.replace(color, dark_color)
    return Chart(light, dark, description)

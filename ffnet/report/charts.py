"""Charts: of changes around zero, which the page draws, and others as SVG, each for light and for dark pages."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffnet.evaluation.metrics import Interval
from ffnet.evaluation.scores import FP32, NPU
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT
from ffnet.results.comparison import Front, ModelComparison, excludes_zero
from ffnet.results.result import Result
from ffnet.results.verdict import Verdict, judged_backend
from ffnet.system.text import count, decimals, format_interval, format_number

WIDTH = 5.2  # inches; a phone shrinks an SVG as a whole, which makes the text of a wider one too small
NUMBERED_QUANTIZERS = 5  # the sensitivity chart numbers only the most sensitive ones

TEXT, GRID, GRAY, ORANGE, BLUE, PAPER = "#33383f", "#d8dce2", "#6b7686", "#c2410c", "#1d6fb8", "#ffffff"
DARK = {TEXT: "#c9d0da", GRID: "#39414d", GRAY: "#97a3b4", ORANGE: "#fb8a4c", BLUE: "#5eb0ef", PAPER: "#14171c"}
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
class ChangeRow:
    """One change against FP32 in percentage points, minus is worse."""

    name: str
    change: float | None
    interval: Interval | None
    remark: str = ""

    @property
    def tone(self) -> str:
        """The kind of the change: "up" or "down" if the interval excludes zero, and otherwise ""."""
        return ("up" if (self.change or 0.0) > 0 else "down") if excludes_zero(self.interval) else ""

    @property
    def text(self) -> str:
        """The change and its interval."""
        digits = decimals(None, (None, self.change, self.interval))
        interval = f" {format_interval(self.interval, digits)}" if self.interval else ""
        return format_number(self.change, digits, "+") + interval


@dataclass(frozen=True)
class ChangeChart:
    """Rows of changes on one scale around zero, and the largest drop that an option allows."""

    rows: Sequence[ChangeRow]
    drop: float | None = None
    option: str = "--fail-under"
    base: str = FP32  # what the changes are from

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of the scale."""
        values = [value for row in self.rows for value in (row.change or 0.0, *(row.interval or ()))]
        values += [0.0, -(self.drop or 0.0)]
        margin = 0.05 * (max(values) - min(values)) or 0.01
        return min(values) - margin, max(values) + margin

    def place(self, value: float) -> float:
        """Return how far a value is from the left end, in percent of the width."""
        low, high = self.ends
        return round(100 * (value - low) / (high - low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values on the scale with their texts."""
        low, high = self.ends
        power = 10.0 ** math.floor(math.log10((high - low) / 3))
        step = next(step * power for step in (5, 2, 1) if step * power <= (high - low) / 3)
        digits = max(0, -math.floor(math.log10(step)))
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        return [(number * step, format_number(number * step, digits, "+" if number else "")) for number in numbers]


def backends_chart(result: Result) -> ChangeChart:
    """Return the change of every backend; that of the NPU on the images that it ran."""
    rows = [
        ChangeRow(name, entry.change, entry.change_interval)
        for name, entry in result.backends.items()
        if entry is not result.base
    ]
    for label, npu in result.npus.items():
        entry = npu.backends[result.names.of(NPU)]
        rows.append(ChangeRow(label, entry.change, entry.change_interval, count(len(npu.images), "image")))
    return ChangeChart(rows, result.options["fail_under"])


def baseline_chart(result: Result) -> ChangeChart:
    """Return the change of every backend since the run that `--baseline` names."""
    if not result.baseline:
        return ChangeChart([])
    rows = [ChangeRow(each.backend, each.change, each.change_interval) for each in result.baseline.changes]
    return ChangeChart(rows, result.options["fail_under"], base=result.baseline.folder)


def losses_chart(verdict: Verdict) -> ChangeChart:
    """Return the classes that lose most."""
    return ChangeChart([ChangeRow(loss.name, loss.change, loss.interval) for loss in verdict.losses])


def classes_chart(result: Result) -> ChangeChart:
    """Return the change of every class with labelled pixels in the backend that the verdict is about."""
    entry = judged_backend(result)[1]
    rows = []
    for name, change in entry.iou_change.items():
        images = count(result.classes[name].images, "image")
        rows.append(ChangeRow(name, change, entry.iou_change_interval[name], images))
    return ChangeChart(rows)


def front_chart(front: Front) -> ChangeChart:
    """Return how far every model is from the best one of the Pareto front, in the order of their costs."""
    rows, unit = [], front.cost.unit
    for candidate in sorted(front.candidates, key=lambda candidate: candidate.cost):
        change = candidate.estimate - front.best.estimate
        remark = f"{candidate.cost:.1f} {unit}{', on the front' if front.has(candidate.model) else ''}"
        rows.append(ChangeRow(candidate.model.short_name, change.value, change.interval, remark))
    return ChangeChart(rows, base=front.best.model.short_name)


def recovery_chart(recovery: Recovery) -> ChangeChart:
    """Return the change in each step of accuracy recovery, with what it costs."""
    rows = []
    for step in recovery.steps:
        cost = f"{100 * step.bit_operations:.0f} % bit operations, {100 * step.weight_bytes:.0f} % weights"
        rows.append(ChangeRow(step.name, step.change, step.change_interval, f"{recovery.outcome(step)}; {cost}"))
    return ChangeChart(rows, recovery.target, "--max-drop")


def models_chart(comparison: ModelComparison) -> ChangeChart:
    """Return the change of every model in the simulation."""
    found = [(model.short_name, model.simulated) for model in comparison.models if model.simulated]
    rows = [ChangeRow(name, entry.change, entry.change_interval) for name, entry in found]
    return ChangeChart(rows, comparison.options["fail_under"])


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

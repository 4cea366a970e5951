"""Charts as SVG: each once for light and once for dark pages."""

import io
from dataclasses import dataclass

WIDTH = 5.2  # inches: on a phone an SVG shrinks as a whole, so that a wide one could not be read

SURFACES = {
    "light": {"text": "#33383f", "grid": "#d8dce2", "first": "#6b7686", "second": "#c2410c", "third": "#1d6fb8"},
    "dark": {"text": "#c9d0da", "grid": "#39414d", "first": "#97a3b4", "second": "#fb8a4c", "third": "#5eb0ef"},
}


@dataclass(frozen=True)
class Chart:
    """One chart: two SVG files and what they show, in words."""

    light: str
    dark: str
    words: str


def class_chart(result):
    """IoU a class in the first pass and in the one behind it, and the change, classes in Cityscapes' order."""
    first, second = list(result["passes"])[:2]
    before, after = (result["passes"][name]["iou"] for name in (first, second))
    present = [name for name, iou in before.items() if None not in (iou, after[name])]
    changes = [after[name] - before[name] for name in present]

    def paint(figure, colors):
        figure.set_size_inches(WIDTH, 0.9 + 0.235 * len(present))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = range(len(present))
        values = [before[name] for name in present], [after[name] for name in present]
        left.hlines(rows, *values, color=colors["second"], linewidth=2)
        left.scatter(values[1], rows, s=20, color=colors["second"], marker="D", label=second, zorder=2)
        ring = {"facecolors": "none", "edgecolors": colors["first"], "linewidths": 1.6}
        left.scatter(values[0], rows, s=64, **ring, label=first, zorder=3)
        left.set(xlim=(-3, 103), xlabel="IoU, percent", yticks=rows, yticklabels=present)
        left.set_ylim(len(present) - 0.4, -0.6)
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0, reverse=True)
        right.barh(rows, changes, height=0.62, color=[colors["second" if c < 0 else "third"] for c in changes])
        right.axvline(0, color=colors["text"], linewidth=0.8)
        right.set(xlabel=f"{second} - {first}, points")
        right.margins(x=0.1)
        for axes in (left, right):
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)

    words = f"IoU of every class in {first} and in {second}, and the change; the table holds the same figures"
    return _chart(paint, words)


def sensitivity_chart(sensitivity, labelled=5):
    """SQNR with each quantizer alone on, and what leaving each out gains, in graph order; the worst are numbered."""
    ranks = {row.position: rank for rank, row in enumerate(sensitivity.rows, 1)}
    rows = sorted(sensitivity.rows, key=lambda row: row.position)

    def paint(figure, colors):
        figure.set_size_inches(WIDTH, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for kind, color, marker in (("weight", "third", "o"), ("activation", "second", "^")):
            chosen = [row for row in rows if row.kind == kind]
            for axes, height in ((upper, lambda row: row.sqnr_on), (lower, sensitivity.gain)):
                points = [(row.position, height(row)) for row in chosen if height(row) is not None]
                if points:
                    axes.scatter(*zip(*points, strict=True), s=20, color=colors[color], marker=marker, label=kind)
        for row in rows:
            if ranks[row.position] <= labelled and row.sqnr_on is not None:
                upper.annotate(
                    str(ranks[row.position]),
                    (row.position, row.sqnr_on),
                    (0, -12),
                    textcoords="offset points",
                    ha="center",
                )
        upper.set(ylabel="alone on: SQNR, dB")
        lower.set(ylabel="alone off: gain, dB", xlabel="quantizers from input to output")
        upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0)
        upper.margins(y=0.15)
        lower.axhline(0, color=colors["text"], linewidth=0.8)
        for axes in (upper, lower):
            axes.grid(axis="y")

    words = (
        "Signal-to-quantization-noise ratio of the logits with each quantizer alone on, and the gain where each alone "
        "is off, from input to output; the table holds the same figures"
    )
    return _chart(paint, words)


def _chart(paint, words):
    return Chart(*(_svg(paint, colors) for colors in SURFACES.values()), words)


def _svg(paint, colors):
    """What `paint(figure, colors)` draws, as SVG text that is the same in every run."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ffnet",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": colors["text"],
        "axes.edgecolor": colors["grid"],
        "axes.labelcolor": colors["text"],
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": colors["text"],
        "ytick.color": colors["text"],
        "grid.color": colors["grid"],
        "grid.linewidth": 0.7,
        "figure.constrained_layout.use": True,
    }
    file = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure()
        paint(figure, colors)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()

"""Small charts of the layers that lose most."""

import numpy as np
from matplotlib.figure import Figure

from ffnet.quantization.layers import BINS, OUTER_BINS, ActivationHistogram, WeightRanges
from ffnet.report.charts import BLUE, GRAY, ORANGE, STYLE, TEXT, Chart, add_legend, to_chart

SIZE = (3.6, 2.1)  # inches


@STYLE
def histogram_chart(histogram: ActivationHistogram) -> Chart:
    """Draw the values in FP32, clipped ones in another color, and mark the limits of the quantization grid."""
    counts = np.array(histogram.counts)
    width = (histogram.high - histogram.low + histogram.step) / BINS
    edges = histogram.low - histogram.step / 2 + width * np.arange(-OUTER_BINS, BINS + OUTER_BINS)
    inside = (np.arange(len(counts)) >= OUTER_BINS) & (np.arange(len(counts)) < OUTER_BINS + BINS)
    figure = Figure(SIZE)
    axes = figure.subplots()
    for chosen, color, label in ((inside, BLUE, "in the grid"), (~inside, ORANGE, "clipped")):
        if (shown := chosen & (counts > 0)).any():
            axes.bar(edges[shown], counts[shown] / counts.sum(), width, align="edge", color=color, label=label)
    for limit in (histogram.low, histogram.high):
        axes.axvline(limit, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(yscale="log", xlabel=f"value in FP32; grid in steps of {histogram.step:.3g}", ylabel="share")
    add_legend(axes)
    return to_chart(figure)


@STYLE
def weights_chart(weights: WeightRanges) -> Chart:
    """Draw the largest absolute weight of every output channel before and after equalization."""
    figure = Figure(SIZE)
    axes = figure.subplots()
    for ranges, color, label in ((weights.before, GRAY, "before"), (weights.after, BLUE, "after")):
        axes.plot(ranges, ".", markersize=4, color=color, label=label)
    axes.set(xlabel="output channel", ylabel="largest |weight|", ylim=(0, None))
    add_legend(axes)
    return to_chart(figure)

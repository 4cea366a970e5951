"""The chart of mIoU against a cost, for the comparison of several models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.evaluation.bootstrap import Interval
from ffnet.report.charts import GRAY, ORANGE, STYLE, WIDTH, Chart, add_legend, to_chart
from ffnet.report.label_layout import Box, place_labels
from ffnet.results.comparison import COMMON_PREFIX, ComparedModel, Cost, Front, ModelComparison

LABELED_MODELS = 8  # with more, only members of the front have labels, intervals and FP32
FEW_HEIGHT, MANY_HEIGHT = 4.0, 5.4  # inches
LOG_RATIO = 8  # of the highest to the lowest cost, above which the axis of costs is logarithmic
LABEL_SIZE = 8  # points
LABEL_PREFIX = f"{COMMON_PREFIX}ffnet"  # that labels leave out
LABEL_LENGTH = 40  # characters
LEADER_LENGTH = 12  # points; a line links labels that are farther from their points
MARKER = 4.5  # points; half the width of a model's marker
LINE = 1.0  # points; half the width that labels leave to a line
ON_FRONT, NOT_ON_FRONT, NOT_COMPARABLE = "INT8, on the Pareto front", "INT8, not on it", "INT8, not comparable"
MARKERS = {ON_FRONT: ("o", ORANGE, ORANGE), NOT_ON_FRONT: ("o", "none", ORANGE), NOT_COMPARABLE: ("s", "none", GRAY)}


@dataclass(frozen=True)
class _Point:
    """What is drawn of a model."""

    name: str
    kind: str  # ON_FRONT, NOT_ON_FRONT or NOT_COMPARABLE
    cost: float
    int8: float  # mIoU in percent
    interval: Interval | None  # of `int8`
    fp32: float | None  # mIoU in percent


@STYLE
def front_chart(comparison: ModelComparison, front: Front) -> Chart:
    """Draw each model's mIoU against its cost, and the Pareto front as a line through filled markers.

    INT8 simulated has its 95 % confidence interval, and FP32 a small mark. With many models, only those on the front
    have labels, intervals and FP32.
    """
    points = [point for model in comparison.models if (point := _point(comparison, front, model)) is not None]
    points.sort(key=lambda point: point.kind != ON_FRONT)  # their labels get the best places
    few = len(points) <= LABELED_MODELS
    labeled = [point for point in points if few or point.kind == ON_FRONT]
    figure = Figure((WIDTH, FEW_HEIGHT if few else MANY_HEIGHT), dpi=72)  # so that its unit is a point
    axes = figure.subplots()
    _set_axes(axes, front.cost, points)
    _draw_points(axes, points)
    _draw_fp32(axes, labeled)
    for point in labeled:
        if point.interval:
            axes.vlines(point.cost, *point.interval, color=MARKERS[point.kind][2], linewidth=1.4, zorder=2)
    steps = _steps(front)
    axes.plot(*zip(*steps, strict=True), color=ORANGE, linewidth=1, zorder=1)
    add_legend(axes)
    _label_points(figure, axes, labeled, points, steps)
    return to_chart(figure)


def _point(comparison: ModelComparison, front: Front, model: ComparedModel) -> _Point | None:
    """Return what is drawn of a model; None if its cost or its mIoU is unknown."""
    cost, miou = front.cost.of(model), model.int8_miou
    if cost is None or miou is None:
        return None
    eligible = comparison.eligible(model, front.cost)
    kind = ON_FRONT if model in front else NOT_ON_FRONT if eligible else NOT_COMPARABLE
    return _Point(model.name, kind, cost, miou, model.backends[INT8_SIMULATED].miou_interval, model.miou(FP32))


def _steps(front: Front) -> list[tuple[float, float]]:
    """Return the corners (cost, mIoU) of the highest mIoU that each cost allows."""
    members = [(member.cost, member.miou) for member in front.members]
    corners = [(cost, miou) for (_, miou), (cost, _) in zip(members, members[1:], strict=False)]
    return [members[0], *(place for pair in zip(corners, members[1:], strict=True) for place in pair)]


def _set_axes(axes: Axes, cost: Cost, points: Sequence[_Point]) -> None:
    costs = [point.cost for point in points]
    if max(costs) > LOG_RATIO * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.08, 0.1)
    axes.set(xlabel=cost.name if cost.name == cost.unit else f"{cost.name}, {cost.unit}", ylabel="mIoU, percent")
    axes.grid()


def _draw_points(axes: Axes, points: Sequence[_Point]) -> None:
    for kind, (marker, face, edge) in MARKERS.items():
        those = [point for point in points if point.kind == kind]
        if those:
            costs, mious = [point.cost for point in those], [point.int8 for point in those]
            size = (2 * MARKER - 1) ** 2
            axes.scatter(costs, mious, size, marker=marker, facecolors=face, edgecolors=edge, label=kind, zorder=3)


def _draw_fp32(axes: Axes, points: Sequence[_Point]) -> None:
    known = [(point.cost, point.fp32) for point in points if point.fp32 is not None]
    if known:
        costs, mious = ([pair[column] for pair in known] for column in (0, 1))
        axes.scatter(costs, mious, 26, marker="_", color=GRAY, linewidths=1.2, label=FP32, zorder=2)


def _label_points(
    figure: Figure,
    axes: Axes,
    labeled: Sequence[_Point],
    points: Sequence[_Point],
    steps: Sequence[tuple[float, float]],
) -> None:
    """Write names beside their points, over nothing else as far as that is possible."""
    texts = [
        axes.text(0, 0, _label(point.name), fontsize=LABEL_SIZE, parse_math=False, in_layout=False) for point in labeled
    ]
    figure.draw_without_rendering()  # lays out the axes
    figure.set_layout_engine("none")
    extents = [text.get_window_extent() for text in texts]
    places = [_place(axes, point.cost, point.int8) for point in labeled]
    obstacles = [box for point in points for box in _obstacles(axes, point, alone=point not in labeled)]
    obstacles += [
        _box(_place(axes, *first), _place(axes, *second), LINE) for first, second in zip(steps, steps[1:], strict=False)
    ]
    left, bottom, right, top = map(float, axes.bbox.padded(-MARKER).extents)
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place_labels(places, sizes, obstacles, (left, bottom, right, top))
    for text, place, box in zip(texts, places, boxes, strict=True):
        _move_label(axes, text, place, box)


def _label(name: str) -> str:
    """Return the end of a name that tells variants apart; question marks stand for what is no text."""
    return name.removeprefix(LABEL_PREFIX)[:LABEL_LENGTH].encode("utf-8", "replace").decode()


def _place(axes: Axes, cost: float, miou: float) -> tuple[float, float]:
    """Return where in the figure something is drawn, in points."""
    x, y = axes.transData.transform((cost, miou))
    return float(x), float(y)


def _obstacles(axes: Axes, point: _Point, alone: bool) -> list[Box]:
    """Return the boxes of a model's marker and, unless it is drawn alone, of its FP32 mark and interval, in points."""
    spans = [(point.int8, point.int8, MARKER)]
    if point.fp32 is not None and not alone:
        spans.append((point.fp32, point.fp32, MARKER / 2))
    if point.interval and not alone:
        spans.append((*point.interval, LINE))
    return [
        _box(_place(axes, point.cost, lower), _place(axes, point.cost, upper), half) for lower, upper, half in spans
    ]


def _box(first: tuple[float, float], second: tuple[float, float], half: float) -> Box:
    """Return the box of a vertical or rising line between two places, `half` of whose width is given."""
    return first[0] - half, first[1] - half, second[0] + half, second[1] + half


def _move_label(axes: Axes, text: Text, place: tuple[float, float], box: Box) -> None:
    """Move a label into its box, and link it to its point if it is far from it."""
    left, bottom, right, top = box
    to_axes = axes.transAxes.inverted().transform
    on_left = right < place[0]
    text.set_transform(axes.transAxes)
    text.set_position(tuple(to_axes((right if on_left else left, bottom)).tolist()))
    text.set(horizontalalignment="right" if on_left else "left", verticalalignment="bottom")
    nearest = (min(max(place[0], left), right), min(max(place[1], bottom), top))
    if np.hypot(nearest[0] - place[0], nearest[1] - place[1]) > LEADER_LENGTH:
        (x, y), (end_x, end_y) = to_axes(nearest), to_axes(place)
        axes.plot((x, end_x), (y, end_y), color=GRAY, linewidth=0.6, transform=axes.transAxes, zorder=1)

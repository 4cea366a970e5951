"""Where the labels of points go in a chart, so that they cover neither one another nor the points."""

from collections.abc import Iterator, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top

DIRECTIONS = (  # of a label from its point: right, up; the first ones are preferred
    *((1, 0), (-1, 0), (1, -1), (-1, 1), (1, 1), (-1, -1), (0, -1), (0, 1)),
    *((1, -0.5), (-1, 0.5), (1, 0.5), (-1, -0.5), (0.5, -1), (-0.5, 1), (0.5, 1), (-0.5, -1)),
)
DISTANCES = (7, 14, 22, 32, 44, 58, 74, 92, 112, 134)  # from a point to its label, in the unit of the boxes
COVERED_AREA = 100.0  # how much worse covered area is than an equal square of the distance


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[Box]:
    """Return the box of each label: near its point, inside the frame, and as far as possible over nothing else.

    Labels are placed one after the other, each where it covers least and, if several places are equal, nearest.

    Args:
        points: what the labels belong to.
        sizes: width and height of each label.
        obstacles: boxes that labels should not cover.
        frame: box that all labels lie in.
    """
    placed = list(obstacles)
    boxes = []
    for point, size in zip(points, sizes, strict=True):
        candidates = list(_candidates(point, size, frame))
        covered = [sum(overlap(box, other) for other in placed) for box, _ in candidates]
        costs = [COVERED_AREA * area + distance**2 for area, (_, distance) in zip(covered, candidates, strict=True)]
        box, _ = candidates[int(np.argmin(costs))]
        boxes.append(box)
        placed.append(box)
    return boxes


def overlap(first: Box, second: Box) -> float:
    """Return the area that two boxes have in common."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


def _candidates(point: tuple[float, float], size: tuple[float, float], frame: Box) -> Iterator[tuple[Box, float]]:
    """Yield boxes around a point, moved into the frame, with their distance from the point before that."""
    width, height = size
    for distance in DISTANCES:
        for right, up in DIRECTIONS:
            left = point[0] + right * distance - (width if right < 0 else 0 if right > 0 else width / 2)
            bottom = point[1] + up * distance - (height if up < 0 else 0 if up > 0 else height / 2)
            left = min(max(left, frame[0]), frame[2] - width)
            bottom = min(max(bottom, frame[1]), frame[3] - height)
            yield (left, bottom, left + width, bottom + height), float(distance)

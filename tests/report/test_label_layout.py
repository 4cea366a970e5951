"""Where labels go: worked by hand, and on random points."""

import numpy as np
import pytest

from ffnet.report.label_layout import overlap, place_labels

FRAME = (0, 0, 300, 200)


@pytest.mark.parametrize(
    ("second", "area"),
    (
        ((0, 0, 4, 3), 12),
        ((3, 2, 9, 9), 1),
        ((1, 1, 2, 2), 1),
        ((4, 0, 8, 3), 0),
        ((5, 5, 6, 6), 0),
        ((-2, -2, 2, 9), 6),
    ),
)
def test_the_overlap_is_the_common_area(second, area):
    assert overlap((0, 0, 4, 3), second) == overlap(second, (0, 0, 4, 3)) == area


def test_a_label_is_to_the_right_of_its_point_if_nothing_is_there():
    assert place_labels([(100, 100)], [(50, 10)], [], FRAME) == [(107, 95, 157, 105)]


def test_a_label_moves_to_the_other_side_of_an_obstacle():
    assert place_labels([(100, 100)], [(50, 10)], [(120, 90, 130, 110)], FRAME) == [(43, 95, 93, 105)]


def test_a_label_at_the_edge_stays_inside_the_frame():
    for corner in ((0, 0), (300, 0), (0, 200), (300, 200)):
        ((left, bottom, right, top),) = place_labels([corner], [(50, 10)], [], FRAME)
        assert left >= 0 and bottom >= 0 and right <= 300 and top <= 200


@pytest.mark.parametrize("seed", range(20))
def test_labels_of_a_few_points_never_overlap(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(point) for point in rng.uniform((10, 10), (290, 190), (8, 2))]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes = place_labels(points, [(100, 9)] * 8, markers, FRAME)
    for index, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in (*boxes[:index], *markers))

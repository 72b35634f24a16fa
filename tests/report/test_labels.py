"""Names beside points: they cover nothing, stay in the frame, and lie where they lay."""

from __future__ import annotations

import itertools
import random

import pytest

from modelpatch.report.labels import MARK, Box, Place, arrange, is_far

FRAME = (0.0, 0.0, 600.0, 400.0)


def box(point: Place, offset: Place, size: Place) -> Box:
    x, y = point[0] + offset[0], point[1] + offset[1]
    return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2


def overlap(one: Box, other: Box) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


@pytest.mark.parametrize("seed", range(5))
def test_names_cover_neither_each_other_nor_points(seed: int) -> None:
    choose = random.Random(seed)
    points = [(300 + choose.gauss(0, 60), 320 + choose.gauss(0, 25)) for _ in range(13)]
    marks = [(x, y - 40) for x, y in points]
    sizes = [(choose.uniform(20, 110), 9.0) for _ in points]
    offsets = arrange(points, sizes, FRAME, marks)
    assert offsets == arrange(points, sizes, FRAME, marks)
    boxes = [box(*one) for one in zip(points, offsets, sizes, strict=True)]
    covered = [box(point, (0, 0), (2 * MARK, 2 * MARK)) for point in (*points, *marks)]
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    assert not any(overlap(one, other) for one in boxes for other in covered)
    for left, bottom, right, top in boxes:
        assert left >= 0
        assert bottom >= 0
        assert right <= 600
        assert top <= 400


def test_a_lonely_name_stands_above_its_point() -> None:
    ((dx, dy),) = arrange([(300, 200)], [(50, 9)], FRAME)
    assert dx == 0
    assert dy > 0
    assert not is_far((dx, dy), (50, 9))
    assert is_far((0, 60), (50, 9))
    assert arrange([], [], FRAME) == []


def test_a_name_at_the_edge_stays_in_the_frame() -> None:
    ((dx, _),) = arrange([(2, 399)], [(80, 9)], FRAME)
    assert 2 + dx - 40 >= 0


def test_names_without_room_are_placed_all_the_same() -> None:
    assert len(arrange([(5, 5)] * 20, [(50, 9)] * 20, (0, 0, 60, 30))) == 20

"""Place names beside points so that they cover no point and no other name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

DISTANCES = (14, 18, 23, 30, 40, 52, 66, 82, 100, 120, 140)  # from a point to a name's nearest edge, about
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (-0.7, -0.7), (0.7, -0.7))  # above first
MARK = 6.0  # half the side of what a point covers


def arrange(points: Sequence[Place], sizes: Sequence[Place], frame: Box, marks: Sequence[Place] = ()) -> list[Place]:
    """The offset of every name's middle from its point.

    `sizes` are the names' (width, height); `frame` is what they must not leave and `marks` are more points that they must
    not cover, all in one unit. A line to a name that `is_far` crosses no other name. The most crowded points choose first;
    the same points give the same places. If no place is free, the one that covers least is taken.
    """
    taken = [_around(place, (2 * MARK, 2 * MARK)) for place in (*points, *marks)]
    named: list[Box] = []
    offsets = [(0.0, 0.0)] * len(points)
    for number in sorted(range(len(points)), key=lambda one: _room(points, one)):
        (x, y), size = points[number], sizes[number]
        least = math.inf
        for dx, dy in _offsets(size):
            box = _around((x + dx, y + dy), size)
            covered = sum(_overlap(box, other) for other in (*taken, *named))
            covered += 10 * (size[0] * size[1] - _overlap(box, frame))
            if is_far((dx, dy), size):
                covered += sum(_overlap(dot, other) for dot in _line((x, y), (dx, dy)) for other in named)
            if covered < least - 1e-6:
                offsets[number], least = (dx, dy), covered
            if least <= 1e-6:
                break
        if is_far(offsets[number], size):
            taken += _line((x, y), offsets[number])
        named.append(_around((x + offsets[number][0], y + offsets[number][1]), size))
    return offsets


def is_far(offset: Place, size: Place) -> bool:
    """True if a name lies so far from its point that a line should join them."""
    gap = max(abs(offset[0]) - size[0] / 2, abs(offset[1]) - size[1] / 2)
    return gap > DISTANCES[0]


def _line(start: Place, offset: Place, steps: int = 24) -> list[Box]:
    """Dots along the line from a point to its name."""
    places = [(start[0] + offset[0] * step / steps, start[1] + offset[1] * step / steps) for step in range(steps)]
    return [_around(place, (2, 2)) for place in places]


def _offsets(size: Place) -> Iterator[Place]:
    """Places for the middle of a name, the nearest first."""
    for distance in DISTANCES:
        for across, up in DIRECTIONS:
            yield across * (distance + size[0] / 2 - MARK), up * (distance + size[1] / 2 - MARK)


def _room(points: Sequence[Place], number: int) -> float:
    """The distance to the nearest other point."""
    others = (point for other, point in enumerate(points) if other != number)
    return min((math.dist(points[number], other) for other in others), default=math.inf)


def _around(middle: Place, size: Place) -> Box:
    (x, y), (width, height) = middle, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across, up = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0

"""Boxes around the outlines that COCO's annotations have: polygons, and runs of pixels, plain or as text."""

from collections.abc import Iterable

from modelpatch.data.sources.documents import Fields, shown
from modelpatch.data.sources.headers import Corners

LONGEST_SHIFT = 60  # bits of a length in a text of runs


def box_of_outline(entry: Fields) -> Corners | None:
    """The box around an annotation's `segmentation`, None for one without area. Raises `DataError` with its place."""
    outline = entry.value("segmentation")
    if isinstance(outline, dict):
        return _box_of_runs(Fields(outline, entry.file, *entry.place, "segmentation"))
    if not isinstance(outline, list):
        entry.fail(f"segmentation is {shown(outline)}; expected polygons, or counts with a size")
    rings = outline if all(isinstance(ring, list) for ring in outline) else [outline]
    points = [entry.numbers_of("segmentation", ring) for ring in rings]
    across, down = ([value for ring in points for value in ring[start::2]] for start in (0, 1))
    if any(len(ring) % 2 for ring in points):
        entry.fail("a polygon of its segmentation has an odd number of values; expected x and y of each corner")
    if not across or max(across) <= min(across) or max(down) <= min(down):
        return None
    return min(across), min(down), max(across), max(down)


def _box_of_runs(runs: Fields) -> Corners | None:
    """The box around runs of pixels, down the columns, of which every second one is the object's."""
    height, width = (int(side) for side in runs.numbers("size", 2))
    counts = runs.value("counts")
    lengths = _decode(counts) if isinstance(counts, str) else [int(count) for count in runs.numbers("counts")]
    if height < 1 or width < 1 or min(lengths, default=0) < 0 or sum(lengths) > height * width:
        runs.fail(f"its counts do not fit its size of {height} x {width} pixels")
    return _box_of_spans(_spans(lengths), height)


def _spans(lengths: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Begin and end of every second run that is not empty."""
    begin = 0
    for number, length in enumerate(lengths):
        if number % 2 and length:
            yield begin, begin + length
        begin += length


def _box_of_spans(spans: Iterable[tuple[int, int]], height: int) -> Corners | None:
    left = top = right = bottom = -1
    for begin, end in spans:
        first, last = begin // height, (end - 1) // height
        upper, lower = (0, height) if last > first else (begin % height, (end - 1) % height + 1)
        left, right = first if left < 0 else min(left, first), max(right, last + 1)
        top, bottom = upper if top < 0 else min(top, upper), max(bottom, lower)
    return None if left < 0 else (float(left), float(top), float(right), float(bottom))


def _decode(text: str) -> list[int]:
    """The lengths in COCO's text of runs: five bits a character; from the fourth on, differences to the last but one."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if shift > LONGEST_SHIFT:
            return [-1]  # no length
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths

"""Pictures of dense answers: colours, legends, and names that lie apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modelpatch.tasks.drawing import add_legend, draw_frames, find_place, overlap, palette

SIZE = (200, 100)


def test_colours_differ_and_are_bright() -> None:
    colors = palette(21).astype(int)
    distances = [np.abs(one - other).max() for one, other in combinations(colors, 2)]
    assert min(distances) > 32
    assert (colors.max(1) >= 170).all()
    assert palette(0).shape == (0, 3)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_a_legend_has_the_colour_of_every_class_that_is_found(count: int) -> None:
    picture = Image.new("RGB", SIZE, "black")
    colors = [tuple(color) for color in palette(count + 1).tolist()]  # the last is not found
    made = add_legend(picture, [(colors[number], f"class {number}") for number in range(count)])
    assert made.width == picture.width
    assert np.array_equal(np.asarray(made)[: SIZE[1]], np.asarray(picture))
    strip = {tuple(pixel) for row in np.asarray(made)[SIZE[1] :].tolist() for pixel in row}
    assert strip.issuperset(colors[:count])
    assert colors[count] not in strip


def test_the_legend_of_a_small_picture_is_whole() -> None:
    entries = [((200, 0, 0), "golden retriever 98 %"), ((0, 0, 200), "cat 2 %")]
    made = np.asarray(add_legend(Image.new("RGB", (16, 12), "black"), entries))
    wide = np.asarray(add_legend(Image.new("RGB", (made.shape[1] + 1, 12), "black"), entries))
    assert np.array_equal(made[12:], wide[12 : len(made), :-1])
    assert not (made[:12, :16]).any()
    assert (made[:12, 16:] == 255).all()
    assert (made[:, -1] == 255).all(), "the text ends before the edge"


def test_a_box_has_its_frame_and_its_name() -> None:
    image = Image.new("RGB", SIZE, "black")
    color = palette(2)[1]
    drawn = np.asarray(draw_frames(image, [((20.0, 40.0, 180.0, 90.0), tuple(color.tolist()), "b 90 %")]))
    assert (drawn[40:90, 20] == color).all()
    assert (drawn[90, 20:180] == color).all()
    assert not drawn[50:80, 60:170].any(), "within the frame is the image"
    assert drawn[25:39, 20:50].any(), "the name stands above"


@given(st.lists(st.tuples(st.floats(-10, 200), st.floats(-10, 100), st.floats(1, 90), st.floats(1, 60)), max_size=6))
def test_names_stay_in_the_image_and_apart_if_there_is_room(boxes: list[tuple[float, float, float, float]]) -> None:
    taken: list[tuple[float, float, float, float]] = []
    for left, top, width, height in boxes:
        box = (left, top, left + width, top + height)
        place = find_place(box, (30, 12), SIZE, taken)
        assert place[0] >= 0
        assert place[1] >= 0
        assert place[2] <= SIZE[0]
        assert place[3] <= SIZE[1]
        if any(overlap(place, other) for other in taken):
            inside = (max(min(left, 170), 0), max(min(top, 88), 0))
            assert any(overlap((*inside, inside[0] + 30, inside[1] + 12), other) for other in taken)
        taken.append(place)

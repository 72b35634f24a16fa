"""The description of a computation in a file is a stranger's: any text, and any number of lines, is compared at once."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpatch.backbone.operations import MOST, MOST_ALIGNED, Description

WORDS = st.text(" -=ab.\n", max_size=12)


def described(*lines: str, repeated: int = 1, segments: int = 1) -> Description:
    kind = tuple(range(len(lines))) * repeated
    return Description(lines=tuple(f"{line}" for line in lines), kinds=(kind,), segments=(0,) * segments)


@given(st.lists(WORDS.filter(str.isprintable), max_size=6), st.lists(WORDS.filter(str.isprintable), max_size=6))
def test_lines_of_any_form_are_compared(ours: list[str], theirs: list[str]) -> None:
    found = described(*ours).differences(described(*theirs), ["stem"])
    assert bool(found) <= (ours != theirs)
    assert all(isinstance(one, str) for one in found)


@pytest.mark.parametrize(("lines", "others"), [(50, 4000), (MOST_ALIGNED, MOST_ALIGNED - 6), (260, 250)])
def test_long_segments_are_not_aligned_line_by_line(lines: int, others: int) -> None:
    """Alignment is cubic in the lines: it took 98 s for 100 segments of 520 lines against 500."""
    ours = described("a relu", "b conv x=1", repeated=lines // 2, segments=64)
    theirs = described("b conv x=1", "a relu", repeated=others // 2, segments=64)
    begin = time.process_time()
    found = ours.differences(theirs, [f"stage {number}" for number in range(64)])
    assert found
    assert time.process_time() - begin < 1.0
    assert others * 2 <= 2 * MOST


def test_the_first_and_last_equal_lines_are_passed_over() -> None:
    ours = described("a conv x=1", "- relu", "- add", "b conv x=1")
    added = described("a conv x=1", "- relu", "- mul", "- add", "b conv x=1")
    assert ours.differences(added, ["stem"]) == ["stem.a: mul is added"]
    assert added.differences(ours, ["stem"]) == ["stem.a: mul is left out"]
    assert described("a conv x=1", "- relu").differences(described("a conv x=2", "- silu"), ["stem"]) == [
        "x of stem.a: 1 against 2",
        "relu against silu after stem.a",
    ]

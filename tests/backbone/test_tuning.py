"""Running in pieces: the same answers whatever the pieces, and pieces that fit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelpatch.backbone.tuning import Tuning, run_in_pieces


@given(
    widths=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    rows=st.integers(0, 9),
    piece_bytes=st.integers(0, 128),
)
def test_pieces_change_no_answer_and_keep_to_their_bytes(widths: list[int], rows: int, piece_bytes: int) -> None:
    seen: list[list[int]] = [[] for _ in widths]

    def module(place: int, x: Tensor) -> Tensor:
        seen[place].append(len(x))
        return 2 * x + place

    modules = [lambda x, place=place: module(place, x) for place in range(len(widths))]
    x = torch.arange(float(rows))[:, None]
    given_ = run_in_pieces(modules, widths, x, Tuning(piece_bytes=piece_bytes))
    expected = x
    for place in range(len(widths)):
        expected = 2 * expected + place
    assert torch.equal(given_, expected)
    for width, pieces in zip(widths, seen, strict=True):
        assert sum(pieces) == rows
        assert piece_bytes or len(pieces) == 1
        assert all(size == 1 or not piece_bytes or size * width <= piece_bytes for size in pieces if size)


def test_pieces_grow_as_activations_become_narrower() -> None:
    sizes: list[int] = []

    def module(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    run_in_pieces([module, module, module], [40, 25, 10], torch.zeros(8, 1), Tuning(piece_bytes=80))
    assert sizes == [2, 2, 2, 2, 2, 2, 2, 2, 8]

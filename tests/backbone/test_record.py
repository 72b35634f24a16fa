"""A recording says which call consumed which tensor, whatever the network's Python does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelpatch.backbone.record import ROWS, Count, Named, Recording, Value, leaves, record, transform
from modelpatch.errors import UntraceableBackboneError


def recorded(module: nn.Module, leaf: type[nn.Module] = nn.Linear) -> Recording:
    torch.manual_seed(0)
    first, second = (torch.randn(rows, 4) for rows in ROWS)
    images = [first, torch.cat([first[:1], second[1:]])]
    return record(module.eval(), module, images, lambda one, name: isinstance(one, leaf))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        mask = torch.zeros(rows, 4)
        mask[:, :2] += self.table[:2]
        parts = [self.one(x), mask]
        parts.append(self.two(parts[0]))
        return torch.stack(parts).reshape(3 * rows, 4)[:rows]


def test_streams_are_what_depends_on_the_image_and_nothing_else() -> None:
    calls = recorded(Net()).calls
    streams = {call.name for call in calls if call.streams}
    assert streams == {"one", "two", "stack", "reshape", "getitem"}
    assert [call.target for call in calls if isinstance(call.target, str)] == ["one", "two"]
    assert any(isinstance(slot, Named) and slot.name == "table" for call in calls for slot in call.slots)


def test_numbers_that_follow_the_batch_are_counts() -> None:
    calls = {call.name: call for call in recorded(Net()).calls}
    assert calls["reshape"].slots[1:] == [Count(0, 3), 4]
    assert calls["zeros"].slots == [Count(0, 1), 4]


def test_a_branch_on_the_content_is_refused_and_one_on_a_shape_is_not() -> None:
    class Branch(nn.Module):
        def __init__(self, content: bool) -> None:
            super().__init__()
            self.content, self.fc = content, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if (x.sum() > 1e9 if self.content else x.shape[1] > 9) else self.fc(x) + 1

    assert [call.name for call in recorded(Branch(False)).calls] == ["fc", "add"]
    with pytest.raises(UntraceableBackboneError, match=r"content \(__bool__\)"):
        recorded(Branch(True))


def test_what_is_written_in_place_later_is_known_and_a_table_written_with_content_is_a_stream() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(x.shape[0], 4)
            table[:, 1:] = x[:, 1:]
            return table.relu_()

    recording = recorded(Writes())
    assert [call.name for call in recording.calls if call.streams] == ["getitem", "setitem", "relu"]
    made = next(call for call in recording.calls if call.name == "zeros").outputs
    assert recording.written >= set(made)


def test_rows_of_images_are_told_from_rows_of_anything_else() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            halves = x.reshape(-1, 2)
            return halves, torch.cat(x.chunk(2, 1)), x.t()

    recording = recorded(Windows())
    numbers = [slot.number for slot in leaves(recording.result) if isinstance(slot, Value)]
    assert [recording.rows_of(number) for number in numbers] == [
        2,
        0,
        0,
    ]  # the second has all images' first halves first


def test_a_network_that_computes_other_calls_for_another_batch_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if len(x) % 2 else x.relu() + 1

    with pytest.raises(UntraceableBackboneError, match="another batch"):
        recorded(Odd())


@pytest.mark.parametrize(
    "tree", [(1, [2, {"a": 3}]), slice(1, None, 2), ({"x": (4,)},), torch.Size([1, 2]), ([], {}, ())], ids=str
)
def test_trees_are_rebuilt_in_the_order_of_their_leaves(tree: Any) -> None:
    counter = itertools.count()
    rebuilt = transform(tree, lambda leaf: (next(counter), leaf)[1])
    assert leaves(rebuilt) == leaves(tree)
    assert next(counter) == len(leaves(tree))


class Averaging(nn.Module):
    """Divides by a number that it makes of the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1.0 / len(x))


def test_a_fraction_that_follows_the_batch_is_refused() -> None:
    with pytest.raises(UntraceableBackboneError, match="another way for another batch"):
        recorded(Averaging())

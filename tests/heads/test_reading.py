"""One function runs a chain for what is read of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import ForeignTensorError
from modelpatch.heads.reading import ChainPart, Read, Reading, run_chain
from tolerance import close

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """A module that counts its calls and adds `shift` to its output."""

    def __init__(self, module: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.module, self.calls = module, 0
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.module(x) + self.shift


def counted(backbone: Backbone, variant: int | None = None) -> list[ChainPart]:
    """The backbone's segments as parts, one of them changed by a variant."""
    parts = []
    for segment in backbone.chain:
        base = Counting(segment.module) if segment.index == variant else None
        run = Counting(segment.module, 1.0 if base else 0.0)
        parts.append(ChainPart(segment.index, segment.index + 1, run, base))
    return parts


def calls(parts: list[ChainPart]) -> list[int]:
    return [part.module.calls for part in parts]  # type: ignore[attr-defined]


def test_reads_come_in_their_order_and_nothing_runs_behind_the_last(tiny: Backbone) -> None:
    parts = counted(tiny)
    late, early = run_chain(parts, IMAGES, [Read(3), Read(1)])
    assert torch.equal(late, tiny.chain.run(IMAGES, 0, 4))
    assert torch.equal(early, tiny.chain.run(IMAGES, 0, 2))
    assert calls(parts) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_run_goes_on_from_the_input_of_a_segment(tiny: Backbone) -> None:
    parts = counted(tiny)
    (features,) = run_chain(parts, tiny.chain.run(IMAGES, 0, 4), [Read()], 4)
    assert torch.equal(features, tiny.chain(IMAGES))
    assert calls(parts) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_is_frozen_for_both_streams_runs_once(tiny: Backbone) -> None:
    parts = counted(tiny, variant=4)
    own, base = run_chain(parts, IMAGES, [Read(), Read(of="base")])
    assert torch.equal(base, tiny.chain(IMAGES))
    assert not close(own, base)
    assert calls(parts) == [1, 1, 1, 1, 1, 2, 2, 2]
    assert own.requires_grad
    assert not base.requires_grad


def test_a_stream_runs_no_further_than_it_is_read(tiny: Backbone) -> None:
    parts = counted(tiny, variant=2)
    own, base = run_chain(parts, IMAGES, [Read(7), Read(4, of="base")])
    assert torch.equal(base, tiny.chain.run(IMAGES, 0, 5))
    assert own.shape == tiny.chain(IMAGES).shape
    assert calls(parts) == [1, 1, 1, 2, 2, 1, 1, 1]


def test_outputs_come_in_the_forms_that_are_asked_for(tiny: Backbone) -> None:
    parts, block = counted(tiny), tiny.chain.blocks[0].index
    x = tiny.chain.run(IMAGES, 0, block + 1)
    maps = Reading(tiny.chain, [Read(block, "map")]).run(parts, IMAGES)
    assert isinstance(maps, tuple)
    assert torch.equal(maps[0], x)
    pooled = Reading(tiny.chain, [Read(block, "pooled"), Read()]).run(parts, IMAGES)
    assert isinstance(pooled, Tensor)
    assert close(pooled[:, : x.shape[1]], nn.functional.normalize(x.mean((2, 3)), dim=1))
    assert torch.equal(pooled[:, x.shape[1] :], tiny.chain(IMAGES))


@pytest.mark.parametrize(("segment", "spans"), [(8, ()), (-9, ()), (3, ((2, 5),))])
def test_segments_that_cannot_be_read_are_refused(tiny: Backbone, segment: int, spans: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(ForeignTensorError, match=f"reads segment {segment}"):
        Reading(tiny.chain, [Read(segment)], spans)
    assert Reading(tiny.chain, [Read(4)], [(2, 5)]).segments == (4,)

"""Blocks of a chain by name, the tensors that a patch owns of them, and the values that these start at."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain, Segment
from modelpatch.errors import MethodError
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.model import PatchedModel

Statistics = Literal["frozen", "learned"]
RUNNING = ("running_mean", "running_var")


@torch.no_grad()
def start_at(model: PatchedModel, segment: Segment, values: nn.Module) -> None:
    """Give what the model owns of a segment the values of another module of the same structure."""
    tensors = model.tensors()
    for name, tensor in (*values.named_parameters(), *values.named_buffers()):
        for own in (f"replace/{segment.tensor_names[name]}", f"graft/{segment.index}-{segment.index + 1}/{name}"):
            if own in tensors:
                tensors[own].copy_(tensor)


def find_segments(backbone: Backbone, names: Sequence[str]) -> list[Segment]:
    """The segments that `names` mean (see `Subset.blocks`), in order; all blocks without any. Raises `MethodError`."""
    chain = backbone.chain
    if not names:
        return list(chain.blocks)
    chosen: set[int] = set()
    for name in names:
        found = _find(chain, name)
        if not any(segment.parameters for segment in found):
            blocks = ", ".join(block.name for block in chain.blocks)
            raise MethodError(f"{name!r} names no block of {backbone.spec} with parameters. Its blocks: {blocks}.")
        chosen |= {segment.index for segment in found if segment.parameters}
    return [chain[index] for index in sorted(chosen)]


def _find(chain: Chain, name: str) -> list[Segment]:
    named = [segment for segment in chain if segment.name == name or segment.name.startswith(name + ".")]
    if not named and name == "last":
        return [chain.blocks[-1]]
    if not named and (match := re.fullmatch(r"stage(-?\d+)", name)):
        number, count = int(match[1]), len(chain.stages)
        if not -count <= number < count:
            raise MethodError(f"{name}: the backbone has stages 0 to {count - 1}.")
        return list(chain.stages[number])
    return named


def graft_on(segment: Segment, kind: str, **arguments: Any) -> Graft:
    """Modules of a registered kind added to one segment."""
    return Graft(kind=kind, start=segment.index, end=segment.index + 1, arguments=arguments)


def name_tensors(segments: Iterable[Segment], pick: Callable[[nn.Module], Iterable[str]]) -> tuple[str, ...]:
    """The backbone's names of those parameters and buffers of every module, its children's aside, that `pick` names.

    Those that several segments hold are left out, since no patch can own them.
    """
    return tuple(
        called
        for segment in segments
        for path, module in segment.module.named_modules()
        for name in pick(module)
        if (called := segment.tensor_names[f"{path}.{name}".lstrip(".")]) not in segment.tied
    )


def own_segments(segments: Sequence[Segment], statistics: Statistics) -> Blueprint:
    """A blueprint that owns all parameters of the segments, and their running statistics where they are learned.

    Those that several segments hold stay the backbone's.
    """
    owned: list[str] = []
    for segment in segments:
        named = [name for name, _ in segment.module.named_parameters()]
        named += [n for n, _ in segment.module.named_buffers() if statistics == "learned" and n.endswith(RUNNING)]
        owned += [segment.tensor_names[name] for name in named if segment.tensor_names[name] not in segment.tied]
    return Blueprint(owned=tuple(owned))

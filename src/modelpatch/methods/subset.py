"""Fine-tune some blocks of the backbone and a head: the body of SubTuning.

    f = chain with theta_S trained from the pretrained values, S a subset of the blocks; all else frozen

Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach: *Less is More: Selective Layer Finetuning with SubTuning*
(2023), section 2. Blocks are chosen by the profile and by greedy selection there; here they are named.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain, Segment
from modelpatch.errors import MethodError, MethodNotApplicableError
from modelpatch.methods.method import Method
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.model import PatchedModel

Statistics = Literal["frozen", "learned"]
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class Subset(Method):
    """Trains every parameter of the named blocks: `Subset("layer4")`, `Subset(("layer3.1", "layer4"))`.

    `blocks` needs no keyword. It holds names of segments (`layer4.1`), prefixes of names (`layer4`), stages (`stage0`,
    `stage-1`) or `last`, the last block; a name that the network itself uses means the network's. `statistics="learned"`
    runs their BatchNorm layers in train mode and stores what they learn, as the paper's code does; that needs large
    batches. `reinitialize` starts the blocks from random values, the paper's control: every layer with a
    `reset_parameters` is reset, while frozen statistics and parameters outside such layers (a layer scale) keep the
    base's values.
    """

    name: ClassVar[str] = "subset"
    paper: ClassVar[str] = "Kaplun et al., Less is More: Selective Layer Finetuning with SubTuning, 2023"
    lists: ClassVar[frozenset[str]] = frozenset({"blocks"})

    blocks: Annotated[tuple[str, ...], Field(min_length=1)] = field(default=("last",), kw_only=False)
    statistics: Statistics = "frozen"
    weight_decay: NonNegativeFloat = 1e-2
    reinitialize: bool = False

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """Owns the parameters of the blocks and, where they are learned, their running statistics."""
        return own_segments(find_segments(backbone, self.blocks), self.statistics)

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Draw the blocks' values anew if they are to be. Raises `MethodNotApplicableError` if no layer can be reset."""
        if self.reinitialize:
            for segment in find_segments(backbone, self.blocks):
                start_at(model, segment, self._reset(segment.module))

    def _reset(self, module: nn.Module) -> nn.Module:
        """A copy whose layers drew their values anew. Statistics of BatchNorm stay where they are frozen."""
        fresh = copy.deepcopy(module)
        layers = [layer for layer in fresh.modules() if callable(getattr(layer, "reset_parameters", None))]
        if not layers:
            raise MethodNotApplicableError(f"{type(module).__name__} has no layer that says how it is initialised.")
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]
        if self.statistics == "frozen":
            for name, buffer in module.named_buffers():
                fresh.get_buffer(name).copy_(buffer)
        return fresh


@torch.no_grad()
def start_at(model: PatchedModel, segment: Segment, values: nn.Module) -> None:
    """Give what the model owns of a segment the values of another module of the same structure."""
    tensors = model.tensors()
    for name, tensor in (*values.named_parameters(), *values.named_buffers()):
        for own in (f"replace/{segment.tensor_names[name]}", f"graft/{segment.index}-{segment.index + 1}/{name}"):
            if own in tensors:
                tensors[own].copy_(tensor)


def find_segments(backbone: Backbone, names: Sequence[str]) -> list[Segment]:
    """The segments that `names` mean (see `Subset.blocks`), in order. Raises `MethodError` for a name that means none."""
    chain = backbone.chain
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


def own_segments(segments: Sequence[Segment], statistics: Statistics) -> Blueprint:
    """A blueprint that owns all parameters of the segments, and their running statistics where they are learned."""
    owned: list[str] = []
    for segment in segments:
        owned += [segment.tensor_names[name] for name, _ in segment.module.named_parameters()]
        if statistics == "learned":
            owned += [segment.tensor_names[n] for n, _ in segment.module.named_buffers() if n.endswith(RUNNING)]
    return Blueprint(owned=tuple(owned))

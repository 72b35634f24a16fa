"""Fine-tune some blocks of the backbone and a head: the body of SubTuning.

    f = chain with theta_S trained from the pretrained values, S a subset of the blocks; all else frozen

Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach: *Less is More: Selective Layer Finetuning with SubTuning*
(2023), section 2. Blocks are chosen by the profile and by greedy selection there; here they are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from modelpatch.backbone import Backbone, Chain, Segment
from modelpatch.errors import MethodError
from modelpatch.methods.method import Method, learn_statistics
from modelpatch.patch import Blueprint, PatchedModel

Statistics = Literal["frozen", "learned"]
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class Subset(Method):
    """Trains every parameter of the named blocks.

    `blocks` holds names of segments (`layer4.1`), prefixes of names (`layer4`), stages (`stage0`, `stage-1`) or `last`,
    the last block; a name that the network itself uses means the network's. `statistics="learned"` runs their BatchNorm
    layers in train mode and stores what they learn, as the paper's code does; that needs large batches.
    """

    name: ClassVar[str] = "subset"
    paper: ClassVar[str] = "Kaplun et al., Less is More: Selective Layer Finetuning with SubTuning, 2023"
    lists: ClassVar[frozenset[str]] = frozenset({"blocks"})

    blocks: Annotated[tuple[str, ...], Field(min_length=1)] = ("last",)
    statistics: Statistics = "frozen"
    weight_decay: NonNegativeFloat = 1e-2

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """Owns the parameters of the blocks and, where they are learned, their running statistics."""
        return own_segments(find_segments(backbone, self.blocks), self.statistics)

    def activate(self, model: PatchedModel) -> None:
        """BatchNorm layers of the blocks follow `statistics`; all others keep the backbone's."""
        super().activate(model)
        if self.statistics == "learned":
            learn_statistics(model)


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

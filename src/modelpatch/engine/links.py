"""The links of an engine's plans: the backbone's own segments and the variants of bound patches."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from modelpatch.backbone.chain import Segment
from modelpatch.engine.resident import BoundPart


@dataclass(frozen=True, eq=False)
class SegmentLink:
    """A segment of the backbone as it is."""

    segment: Segment
    own: bool = False

    @property
    def span(self) -> tuple[int, int]:
        return self.segment.index, self.segment.index + 1

    @property
    def key(self) -> str:
        return f"base {self.segment.index}"

    @property
    def name(self) -> str:
        return self.segment.name

    @property
    def macs(self) -> int:
        return self.segment.macs

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.segment.named_tensors())

    @property
    def output_bytes(self) -> int:
        return 4 * prod(self.segment.output_shape)


@dataclass(frozen=True, eq=False)
class PartLink:
    """A patch's variant of a span."""

    part: BoundPart
    output_bytes: int
    own: bool = True

    @property
    def span(self) -> tuple[int, int]:
        return self.part.span

    @property
    def key(self) -> str:
        return self.part.key

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def macs(self) -> int:
        return self.part.macs

    @property
    def nbytes(self) -> int:
        return self.part.template.nbytes

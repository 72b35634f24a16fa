"""The backbone's own segments as links of a plan; the variants of bound patches are links too, see `resident.py`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from modelpatch.backbone.chain import Segment


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

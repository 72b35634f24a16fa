"""Running a chain for what a head reads of it.

Read(segment, form, of)      one input of a head: the output of a segment, of the patched chain or of the base's own
run_chain(parts, x, reads)   runs the chain, with a patch's variants in place of their spans, as far as it is read
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain, channels_first
from modelpatch.errors import ForeignTensorError

HeadInput = Tensor | tuple[Tensor, ...]  # features (B, D), or the maps (B, C, H, W) of a decoder
Form = Literal["features", "pooled", "map"]
Stream = Literal["patch", "base"]


@dataclass(frozen=True)
class Read:
    """One input of a head: the output of `segment` (-1: the last) as `form`, of the patched chain or of the base's own.

    `features` are the output as it is, `pooled` its mean over positions at unit length (B, C), a `map` has its channels
    first, (B, C, H, W).
    """

    segment: int = -1
    form: Form = "features"
    of: Stream = "patch"


class ChainPart(NamedTuple):
    """A module that runs the segments `[start, end)`. `base` runs them in the base's stream, where it differs."""

    start: int
    end: int
    module: Callable[[Tensor], Tensor]
    base: Callable[[Tensor], Tensor] | None = None


def run_chain(parts: Sequence[ChainPart], x: Tensor, reads: Sequence[Read], start: int = 0) -> list[Tensor]:
    """The outputs that `reads` ask for, in their order, from the input `x` of segment `start`, as the segments give them.

    `parts` are the whole chain in order. Nothing runs after the last segment that is read, and no part before both streams
    differ runs twice. Gradients reach the patched stream only.
    """
    wanted = [(read.of, read.segment % parts[-1].end) for read in reads]
    ends = {of: max((segment for source, segment in wanted if source == of), default=-1) for of in ("patch", "base")}
    last = max(ends.values())
    found: dict[tuple[str, int], Tensor] = {}
    own = base = x
    for part in parts:
        if part.start < start:
            continue
        shared = own is base and part.base is None
        before = base
        if part.start <= ends["patch"] or (shared and part.start <= ends["base"]):
            own = part.module(own)
        if shared:
            base = own
        elif part.start <= ends["base"]:
            with torch.no_grad():
                base = (part.base or part.module)(before)
        for of, output in (("patch", own), ("base", base)):
            if (of, part.end - 1) in wanted:
                found[of, part.end - 1] = output
        if part.end > last:
            break
    return [found[key] for key in wanted]


class Reading:
    """The reads of a head on a chain whose `spans` are replaced as one; `segments` are those that are read, in order.

    `both` says that the base's own features are read too, `maps` that the head is a decoder, `inner` that outputs are read in
    other forms than as features. Raises `ForeignTensorError` for a segment outside of the chain or inside a span.
    """

    def __init__(self, chain: Chain, reads: Sequence[Read], spans: Sequence[tuple[int, int]] = ()) -> None:
        count = len(chain)
        for read in reads:
            if not -count <= read.segment < count:
                raise ForeignTensorError(f"the head reads segment {read.segment}; the backbone has {count}.")
            if any(start <= read.segment % count < end - 1 for start, end in spans):
                raise ForeignTensorError(
                    f"the head reads segment {read.segment}, inside a run of segments the patch replaces."
                )
        self.reads = tuple(replace(read, segment=read.segment % count) for read in reads)
        self.segments = tuple(sorted({read.segment for read in self.reads}))
        self.both = any(read.of == "base" for read in self.reads)
        self.maps = any(read.form == "map" for read in self.reads)
        self.inner = any(read.form != "features" for read in self.reads)
        self._axes = tuple(pooled_axes(chain, read.segment) for read in self.reads)

    def run(self, parts: Sequence[ChainPart], x: Tensor, start: int = 0) -> HeadInput:
        """The head's input from the input `x` of segment `start`."""
        return self.join(run_chain(parts, x, self.reads, start))

    def join(self, outputs: Sequence[Tensor], pooled: bool = False) -> HeadInput:
        """The head's input from the outputs of its reads, of which those to be pooled may be `pooled` already."""
        shape = {"map": as_map} if pooled else {"map": as_map, "pooled": pool}
        reads = zip(self.reads, outputs, self._axes, strict=True)
        formed = tuple(shape[read.form](x, axes) if read.form in shape else x for read, x, axes in reads)
        if self.maps:
            return formed
        return formed[0] if len(formed) == 1 else torch.cat(formed, 1)


def pool(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """An activation (B, ...) averaged over the axes `positions` and scaled to unit length: (B, C)."""
    return nn.functional.normalize(x.mean(positions) if positions else x, dim=1)


def as_map(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """An activation (B, ...) with channels first, (B, C, H, W): tokens in a square, without those that stand before it."""
    if positions == (1, 2):
        return x.permute(0, 3, 1, 2)
    if positions == (1,):
        side = math.isqrt(x.shape[1])
        return x[:, x.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    return x


def pooled_axes(chain: Chain, segment: int) -> tuple[int, ...]:
    """The axes of a segment's output, batch axis counted, that are positions and not channels."""
    shape = chain[segment].output_shape
    if len(shape) == 3:
        return (2, 3) if channels_first(shape, chain[0].input_shape) else (1, 2)
    return (1,) if len(shape) == 2 else ()


def pooled_width(chain: Chain, segment: int) -> int:
    """Channels of a segment's output."""
    shape = chain[segment].output_shape
    return shape[0] if pooled_axes(chain, segment) == (2, 3) else shape[-1]

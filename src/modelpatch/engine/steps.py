"""The links of a plan, which are segments and variants, and its steps: runs of links on streams, pools, and heads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Protocol

from torch import Tensor

from modelpatch.backbone.chain import Segment

Rows = tuple[int, ...]  # of the batch, in order
Batches = Mapping[Hashable, Tensor]  # images by root


class Link(Protocol):
    """One module of a patch's path: it stands for the segments `[span[0], span[1])`.

    `own` is True for a patch's variant and False for a segment of the backbone, `nbytes` are the bytes of the tensors that it
    reads and `output_bytes` those of its output for an image. `key` is equal for links that compute the same, `macs` are
    multiply-adds an image.
    """

    span: tuple[int, int]
    name: str
    own: bool
    nbytes: int
    output_bytes: int

    @property
    def key(self) -> str: ...

    @property
    def macs(self) -> int: ...


class SegmentLink:
    """A segment of the backbone as it is."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.own, self.name = segment, False, segment.name
        self.span, self.key = (segment.index, segment.index + 1), f"base {segment.index}"
        self.nbytes = sum(tensor.nbytes for _, tensor in segment.named_tensors())
        self.output_bytes = 4 * prod(segment.output_shape)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return self.segment.macs


@dataclass(frozen=True)
class Take:
    """Rows of a stream, as places in it; None takes them all."""

    stream: int
    places: Rows | None = None


@dataclass(frozen=True)
class RunStep:
    """Run links one after another on the concatenated `inputs`; every input has its own output stream.

    `sizes` are the rows of the inputs, `scale` their pixels over the backbone's own.
    """

    links: tuple[Link, ...]
    inputs: tuple[Take, ...]
    outputs: tuple[int, ...]
    sizes: tuple[int, ...]
    scale: float = 1.0
    frees: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The names of its first and last link."""
        first, last = self.links[0], self.links[-1]
        return first.name if first is last else f"{first.name} ... {last.name}"

    @property
    def own(self) -> bool:
        """True if one of the links is a patch's."""
        return any(link.own for link in self.links)


@dataclass(frozen=True)
class PoolStep:
    """Pool the output of segment `tap` for heads that read it."""

    tap: int
    stream: int
    output: int
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeadStep:
    """The heads of `members`. Each reads its `takes`; several members are linear heads that read one stream."""

    members: tuple[str, ...]
    takes: tuple[tuple[Take, ...], ...]
    frees: tuple[int, ...] = ()


Step = RunStep | PoolStep | HeadStep
Roots = tuple[tuple[Hashable, int, Rows], ...]  # preprocessing, stream and rows of the images


def run_flops(run: RunStep, place: int) -> int:
    """Floating point operations of a run on one of its inputs."""
    return sum(round(2 * link.macs * run.sizes[place] * run.scale) for link in run.links)


def reads(step: Step) -> tuple[int, ...]:
    """The streams a step reads."""
    if isinstance(step, PoolStep):
        return (step.stream,)
    takes = step.inputs if isinstance(step, RunStep) else chain.from_iterable(step.takes)
    return tuple(dict.fromkeys(take.stream for take in takes))


def writes(step: Step) -> tuple[int, ...]:
    """The streams a step makes."""
    if isinstance(step, RunStep):
        return step.outputs
    return (step.output,) if isinstance(step, PoolStep) else ()

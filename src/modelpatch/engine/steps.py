"""The steps of a plan: runs of modules on streams, pools, and heads."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

Rows = tuple[int, ...]  # of the batch, in order


class Link(Protocol):
    """One module of a patch's path: it stands for the segments `[span[0], span[1])`."""

    @property
    def span(self) -> tuple[int, int]: ...

    @property
    def key(self) -> str:
        """Equal for links that compute the same."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def own(self) -> bool:
        """True for a patch's variant, False for the backbone's segment."""
        ...

    @property
    def macs(self) -> int:
        """Multiply-adds an image."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it reads."""
        ...

    @property
    def output_bytes(self) -> int:
        """Bytes of its output for an image."""
        ...


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

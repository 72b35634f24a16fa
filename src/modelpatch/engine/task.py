"""The tasks of an engine: the backbone, a patch, several patches of one task, or a cascade of them.

`bind_one` and `bind_options` make one of patches. Several patches are `options`, the cheapest first; of a cascade they run in
rounds, see `rounds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from pathlib import Path

from torch import nn

from modelpatch.backbone.chain import Segment
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.cascade import Cascade, Confidence
from modelpatch.engine.plan import Link, PlannedTask
from modelpatch.engine.resident import BoundPart, BoundPatch, Templates
from modelpatch.errors import EngineError, WrongBackboneError
from modelpatch.heads.linear import LinearHead
from modelpatch.heads.reading import Reading
from modelpatch.patch.contents import Patch
from modelpatch.tasks.classification import Classification

AnyPatch = Patch | BoundPatch | str | Path
Given = AnyPatch | Sequence[AnyPatch] | Cascade


class SegmentLink:
    """A segment of the backbone as it is, as a link of plans."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.own, self.name = segment, False, segment.name
        self.span, self.key = (segment.index, segment.index + 1), f"base {segment.index}"
        self.nbytes = sum(tensor.nbytes for _, tensor in segment.named_tensors())
        self.output_bytes = 4 * prod(segment.output_shape)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return self.segment.macs


@dataclass(frozen=True, eq=False)
class EngineTask:
    """A task with all that runs it.

    `path` are the links that cover the chain, or what is left of it after the activations that `root` stands for; without a
    `root` it begins at the images as `preprocessing` sees them.
    """

    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    head: nn.Module
    path: tuple[Link, ...]
    reading: Reading | None = None
    kind: str = Classification.name
    beside: tuple[Link, ...] = ()
    bound: BoundPatch | None = None
    root: Hashable = None
    options: tuple[EngineTask, ...] = ()
    stages: tuple[CascadeStage, ...] = ()

    @property
    def parts(self) -> tuple[BoundPart, ...]:
        """The variants of the task's patches."""
        return tuple(part for patch in self.patches for part in patch.parts)

    @property
    def patches(self) -> tuple[BoundPatch, ...]:
        """The bound patches."""
        own = () if self.bound is None else (self.bound,)
        return (*own, *(patch for option in self.options for patch in option.patches))

    @property
    def members(self) -> frozenset[EngineTask]:
        """The task and all tasks that run for it."""
        return frozenset((self, *self.options, *(task for stage in self.stages for task in stage.running)))

    @property
    def kinds(self) -> tuple[Preprocessing, ...]:
        """The preprocessings of its images: one, or for a cascade that of every stage."""
        return tuple(dict.fromkeys(task.preprocessing for task in self.whole))

    @property
    def whole(self) -> tuple[EngineTask, ...]:
        """The tasks that run for an image that only the last stage is sure of, each under a name of its own."""
        return self.options if self.stages else (self,)

    def planned(self, shape: tuple[int, int] | None, own: int) -> PlannedTask:
        """The task for a plan: one batch of `shape` (height, width), or None for images as the task sees them; the
        backbone's own are `own` x `own`."""
        linear = type(self.head) in (nn.Linear, LinearHead)
        root = self.root if self.root is not None else None if shape else self.preprocessing
        height, width = shape or (self.preprocessing.image_size,) * 2
        scale = height * width / own**2
        reads = self.reading.reads if self.reading is not None else ()
        return PlannedTask(self.name, self.path, root, (height, width), scale, reads, linear, self.beside)


@dataclass(frozen=True, eq=False)
class CascadeStage:
    """A patch in a cascade: the task that runs, on images or on the activations that stage `source` kept for it.

    `keeps` are the prefixes whose outputs later stages start from, by the numbers of those stages.
    """

    task: EngineTask
    source: int | None
    keeps: Mapping[int, EngineTask]
    confidence: Confidence

    @property
    def running(self) -> tuple[EngineTask, ...]:
        """The tasks of its round."""
        return (self.task, *self.keeps.values())


def bind_one(templates: Templates, segments: Sequence[SegmentLink], name: str, patch: AnyPatch) -> EngineTask:
    """A patch as a task. Raises `WrongBackboneError` for one that is bound elsewhere, and what reading and binding raise."""
    backbone = templates.backbone
    if not isinstance(patch, BoundPatch):
        patch = BoundPatch(backbone, patch if isinstance(patch, Patch) else Patch.load(patch), templates)
    if patch.backbone is not backbone:
        raise WrongBackboneError(f"{name!r} is bound to another backbone than the engine's, {backbone.spec}.")
    path = tuple(segments[one] if isinstance(one, int) else one for one in patch.path())
    beside = tuple(segments) if patch.reading.both else ()
    for part in patch.parts:
        _ = part.key  # hashed now, not in the first call
    task, seen = patch.task, patch.preprocessing
    return EngineTask(name, seen, task.classes, patch.head, path, patch.reading, task.kind, beside, patch)


def bind_options(
    templates: Templates, segments: Sequence[SegmentLink], name: str, patches: Sequence[AnyPatch]
) -> EngineTask:
    """Several patches of one task, the cheapest first; without a choice the last answers. Raises `EngineError`."""
    if not patches:
        raise EngineError(f"{name!r} has no patches; expected one or more.")
    options = [bind_one(templates, segments, name, patch) for patch in patches]
    if other := [option for option in options if option.kind != options[0].kind]:
        kinds = f"{options[0].kind} and for {other[0].kind}"
        raise EngineError(f"{name!r} has patches for {kinds}. Give them names of their own.")
    if other := [option for option in options if option.classes != options[0].classes]:
        raise EngineError(
            f"{name!r} has patches with {len(options[0].classes)} and {len(other[0].classes)} classes, which are not those of "
            "one task. Give them names of their own."
        )
    options.sort(key=cost)
    return replace(options[-1], name=name, reading=None, beside=(), bound=None, options=tuple(options))


def cost(task: EngineTask, done: int = 0) -> float:
    """Multiply-adds of an image, its head left out, in those of the backbone's own resolution times the pixels; without its
    first `done` links. What a siamese head reads of the base counts from where it leaves the task's own path."""
    planned = task.planned(None, 1)
    own, base = planned.walks.values()
    return sum(link.macs for link in (*own[done:], *base[count_alike(own, base) :])) * planned.scale


def count_alike(first: Sequence[Link], second: Sequence[Link]) -> int:
    """The number of links at their beginning that compute the same."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: (pair[0].span, pair[0].key) == (pair[1].span, pair[1].key), pairs))


@dataclass(frozen=True)
class Wish:
    """The choice among several patches of a task: that of `resolution` pixels, or the most costly that takes at most
    `latency` seconds for one image. Raises `EngineError` for both at once, or what is no such number."""

    resolution: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and self.latency is not None:
            raise EngineError("give resolution or latency, not both.")
        for name in ("resolution", "latency"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                unit = "pixels" if name == "resolution" else "seconds"
                raise EngineError(f"{name}={value!r}; expected a number of {unit} above 0.")

    def pick(self, tasks: Sequence[EngineTask], measured: Callable[[EngineTask], float]) -> list[EngineTask]:
        """The task to run for each. Raises `EngineError` if no task has a choice, or none of its patches fits."""
        choices = [task.options and not task.stages for task in tasks]
        if self != ANY and not any(choices):
            raise EngineError(
                "resolution and latency choose among several patches of a task, and none of the tasks has several. Add them "
                "as a list: engine.add('signs', [small, large])."
            )
        return [self._one(task, measured) if choice else task for task, choice in zip(tasks, choices, strict=True)]

    def _one(self, task: EngineTask, measured: Callable[[EngineTask], float]) -> EngineTask:
        if self.resolution is not None:
            fitting = [option for option in task.options if option.preprocessing.image_size == self.resolution]
            if not fitting:
                known = ", ".join(str(option.preprocessing.image_size) for option in task.options)
                raise EngineError(f"{task.name} has no patch for {self.resolution} px; it has: {known}.")
            return fitting[-1]
        if self.latency is not None:
            times = [measured(option) for option in task.options]
            quick = [option for option, time in zip(task.options, times, strict=True) if time <= self.latency]
            if not quick:
                raise EngineError(
                    f"no patch of {task.name} answers within {self.latency:g} s here; the fastest takes {min(times):.4g} s."
                )
            return quick[-1]
        return task.options[-1]


ANY = Wish()

"""The tasks of an engine: the backbone, a patch, several patches of one task, or a cascade of them.

Several patches are `options`, the cheapest first. Those of a cascade run in rounds:

    round 0     every task, and the first stage of every cascade, in one plan; activations for later stages are kept
    round n     the stages n of all cascades in one plan, each on the rows that are left

A stage starts from the longest prefix that it shares with a stage before it, if both have the same preprocessing. Rows leave
as soon as a stage is sure of them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.cascade import Cascade, Confidence, is_cascade
from modelpatch.engine.plan import Batches, Link, PlannedTask, Rows
from modelpatch.engine.resident import BoundPart, BoundPatch, Templates
from modelpatch.errors import EngineError, WrongBackboneError
from modelpatch.heads.linear import LinearHead
from modelpatch.heads.reading import Reading
from modelpatch.patch.contents import Patch
from modelpatch.tasks.classification import Classification

AnyPatch = Patch | BoundPatch | str | Path
Given = AnyPatch | Sequence[AnyPatch] | Cascade


@dataclass(frozen=True, eq=False)
class EngineTask:
    """A task with all that runs it.

    `facts` are the options of its record, such as thresholds; `options` its patches, where it has several.
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
    options: tuple["EngineTask", ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple["CascadeStage", ...] = ()

    @property
    def parts(self) -> tuple[BoundPart, ...]:
        """The variants of the task's patches."""
        return tuple(part for patch in self.patches for part in patch.parts)

    @property
    def patches(self) -> tuple[BoundPatch, ...]:
        """The bound patches, those of `options` if there are any."""
        return tuple(task.bound for task in (self, *self.options) if task.bound is not None)

    @property
    def members(self) -> frozenset["EngineTask"]:
        """The task and all tasks that run for it."""
        return frozenset((self, *self.options, *(task for stage in self.stages for task in stage.running)))

    @property
    def kinds(self) -> tuple[Preprocessing, ...]:
        """The preprocessings of its images: one, or for a cascade that of every stage."""
        return tuple(dict.fromkeys(task.preprocessing for task in self.whole))

    @property
    def whole(self) -> tuple["EngineTask", ...]:
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
    """A patch in a cascade: the task that runs, on images or on the activations that a stage before kept for it.

    `keeps` are the prefixes whose outputs later stages start from, by the numbers of those stages.
    """

    task: EngineTask
    keeps: Mapping[int, EngineTask]
    confidence: Confidence

    @property
    def running(self) -> tuple[EngineTask, ...]:
        """The tasks of its round."""
        return (self.task, *self.keeps.values())


def bind(templates: Templates, name: str, given: Given) -> EngineTask:
    """A task of what an engine is given. Raises what reading and binding raise, and `EngineError`."""
    if isinstance(given, str | Path) and is_cascade(given):
        given = Cascade.load(given)
    if isinstance(given, Cascade):
        return bind_cascade(templates, name, given)
    if isinstance(given, list | tuple):
        return bind_options(templates, name, given)
    return bind_one(templates, name, given)  # type: ignore[arg-type]


def bind_one(templates: Templates, name: str, patch: AnyPatch) -> EngineTask:
    """A patch as a task. Raises `WrongBackboneError` for one that is bound elsewhere, and what reading and binding raise."""
    backbone = templates.backbone
    if not isinstance(patch, BoundPatch):
        patch = BoundPatch(backbone, patch if isinstance(patch, Patch) else Patch.load(patch), templates)
    if patch.backbone is not backbone:
        raise WrongBackboneError(f"{name!r} is bound to another backbone than the engine's, {backbone.spec}.")
    beside = templates.segments if patch.reading.both else ()
    for part in patch.parts:
        _ = part.key  # hashed now, not in the first call
    task, seen = patch.task, patch.preprocessing
    return EngineTask(
        name, seen, task.classes, patch.head, patch.path, patch.reading, task.kind, beside, patch, facts=task.options
    )


def bind_options(templates: Templates, name: str, patches: Sequence[AnyPatch]) -> EngineTask:
    """Several patches of one task, the cheapest first; without a choice the last answers. Raises `EngineError`."""
    if not patches:
        raise EngineError(f"{name!r} has no patches; expected one or more.")
    options = [bind_one(templates, name, patch) for patch in patches]
    first, *others = options
    for other in others:
        given = f"with {len(first.classes)} and {len(other.classes)} classes, which are not those of one task"
        if first.kind != other.kind:
            given = f"for {first.kind} and for {other.kind}"
        if (first.kind, first.classes) != (other.kind, other.classes):
            raise EngineError(f"{name!r} has patches {given}. Give them names of their own.")
    options.sort(key=cost)
    return replace(options[-1], name=name, reading=None, beside=(), bound=None, options=tuple(options))


def bind_cascade(templates: Templates, name: str, cascade: Cascade) -> EngineTask:
    """A cascade as a task. Raises what binding its patches raises."""
    bound = [bind_one(templates, name, patch) for patch in cascade.patches]
    shared = [reuse(bound[:number], task) for number, task in enumerate(bound)]
    stages = []
    for number, (task, confidence) in enumerate(zip(bound, cascade.confidences, strict=True)):
        begun = shared[number][1]
        turn = replace(task, path=task.path[begun:], root=("stage", task) if number else None)
        keeps = {
            later: replace(
                turn, name=_kept(name, later), path=task.path[begun:links], head=nn.Identity(), reading=None, beside=()
            )
            for later, (origin, links) in enumerate(shared)
            if origin == number
        }
        stages.append(CascadeStage(turn, keeps, confidence))
    options = tuple(replace(task, name=f"{name} (stage {number + 1})") for number, task in enumerate(bound))
    return replace(options[-1], name=name, reading=None, beside=(), bound=None, options=options, stages=tuple(stages))


def _kept(name: str, stage: int) -> str:
    return f"{name}\0{stage}"  # a name that no task has


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


def reuse(earlier: Sequence[EngineTask], task: EngineTask) -> tuple[int | None, int]:
    """The number of the earlier task that shares most links with this one, and how many; (None, 0) for none.

    A task whose head reads the base's features as well starts anew; so does one whose head pools segments before the fork. At
    least one link is left to run.
    """
    best: tuple[int | None, int] = (None, 0)
    for number, other in enumerate(earlier):
        if other.preprocessing != task.preprocessing or task.beside:
            continue
        limit = min(read.segment for read in task.planned(None, 1).inputs)
        open_links = [link for link in task.path[:-1] if link.span[1] <= limit]
        alike = count_alike(other.planned(None, 1).walks["patch"], open_links)
        if alike > best[1]:
            best = number, alike
    return best


@dataclass(frozen=True)
class Wish:
    """The choice among several patches of a task: that of `resolution` pixels, or the most costly that takes at most
    `latency` seconds for one image. Raises `EngineError` for both at once, or what is no such number."""

    resolution: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and self.latency is not None:
            raise EngineError("give resolution or latency, not both.")
        for name, unit in (("resolution", "pixels"), ("latency", "seconds")):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
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
Turn = tuple[EngineTask, Rows]  # a task and the rows that it is asked for
Compute = Callable[[Sequence[Turn], Batches], dict[str, Tensor]]


@dataclass(frozen=True)
class Routed:
    """Logits (B, K) and the number of the stage (B,) that answered each row, 0 for tasks that are no cascades."""

    logits: Tensor
    stages: Tensor


class _Walk:
    """The state of one cascade between rounds. `left` are places in `rows` without an answer yet."""

    def __init__(self, task: EngineTask, rows: Rows) -> None:
        self.task, self.rows = task, torch.tensor(rows, dtype=torch.long)
        self.left = torch.arange(len(rows))
        self.logits: Tensor | None = None
        self.stages = torch.zeros(len(rows), dtype=torch.long)
        self.kept: dict[int, Tensor] = {}

    def take(self, number: int, found: Mapping[str, Tensor]) -> None:
        """Keep the answers of stage `number` that it is sure of, and the activations that later stages need."""
        stage, logits = self.task.stages[number], found[self.task.name]
        sure = stage.confidence.sure(logits)
        if self.logits is None:
            self.logits = logits.new_zeros(len(self.rows), logits.shape[1])
        settled = sure.cpu()
        self.logits[self.left[settled].to(logits.device)] = logits[sure]
        self.stages[self.left[settled]] = number
        self.left = self.left[~settled]
        self.kept |= {later: found[_kept(self.task.name, later)] for later in stage.keeps}
        self.kept = {later: kept[~sure] for later, kept in self.kept.items() if later > number}

    def images(self, number: int, batches: Batches) -> Tensor:
        """The input of stage `number`: the rows that are left of the images, or of the activations kept for it."""
        if number in self.kept:
            return self.kept.pop(number)
        batch = batches[None if None in batches else self.task.stages[number].task.preprocessing]
        return batch[self.rows[self.left].to(batch.device)]


@torch.inference_mode()
def run_rounds(turns: Sequence[Turn], batches: Batches, compute: Compute) -> dict[str, Routed]:
    """Every task on its rows, cascades in rounds; `compute(turns, batches)` runs one plan."""
    walks = [_Walk(task, rows) for task, rows in turns if task.stages]
    firsts = [(one, rows) for task, rows in turns for one in (task.stages[0].running if task.stages else (task,))]
    found = compute(firsts, batches)
    answers = {task.name: found[task.name] for task, _ in turns if not task.stages}
    routed = {name: Routed(logits, torch.zeros(len(logits), dtype=torch.long)) for name, logits in answers.items()}
    number, going = 0, walks
    while going:
        for walk in going:
            walk.take(number, found)
        number += 1
        going = [walk for walk in going if len(walk.left)]
        if going:
            inputs = {walk.task.stages[number].task.root: walk.images(number, batches) for walk in going}
            rest = [(walk.task.stages[number], tuple(range(len(walk.left)))) for walk in going]
            found = compute([(one, rows) for stage, rows in rest for one in stage.running], inputs)
    for walk in walks:
        assert walk.logits is not None
        routed[walk.task.name] = Routed(walk.logits, walk.stages)
    return {task.name: routed[task.name] for task, _ in turns}

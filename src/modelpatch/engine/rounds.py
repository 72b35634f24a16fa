"""Cascades in an engine: rounds in which each stage sees the rows that no stage before it was sure of.

    round 0     every task, and the first stage of every cascade, in one plan; activations for later stages are kept
    round n     the stages n of all cascades in one plan, each on the rows that are left

A stage starts from the longest prefix that it shares with a stage before it, if both have the same preprocessing, so that it
is computed once. Rows leave as soon as a stage is sure of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modelpatch.engine.cascade import Cascade
from modelpatch.engine.plan import Batches, Rows
from modelpatch.engine.resident import Templates
from modelpatch.engine.task import CascadeStage, EngineTask, SegmentLink, bind_one, cost, count_alike

Compute = Callable[[Sequence[EngineTask], Sequence[Rows], Batches], dict[str, Tensor]]


@dataclass(frozen=True)
class Routed:
    """Logits (B, K) and the number of the stage (B,) that answered each row, 0 for tasks that are no cascades."""

    logits: Tensor
    stages: Tensor


def bind_cascade(templates: Templates, segments: Sequence[SegmentLink], name: str, cascade: Cascade) -> EngineTask:
    """A cascade as a task. Raises what binding its patches raises."""
    bound = [bind_one(templates, segments, name, patch) for patch in cascade.patches]
    shared = [reuse(bound[:number], task) for number, task in enumerate(bound)]
    stages = []
    for number, (task, confidence) in enumerate(zip(bound, cascade.confidences, strict=True)):
        source, begun = shared[number]
        turn = replace(task, path=task.path[begun:], root=("stage", task) if number else None)
        keeps = {
            later: replace(
                turn, name=_kept(name, later), path=task.path[begun:links], head=nn.Identity(), reading=None, beside=()
            )
            for later, (origin, links) in enumerate(shared)
            if origin == number
        }
        stages.append(CascadeStage(turn, source, keeps, confidence))
    options = tuple(replace(task, name=f"{name} (stage {number + 1})") for number, task in enumerate(bound))
    return replace(options[-1], name=name, reading=None, beside=(), bound=None, options=options, stages=tuple(stages))


def _kept(name: str, stage: int) -> str:
    return f"{name}\0{stage}"  # a name that no task has


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


def stage_costs(tasks: Sequence[EngineTask]) -> list[float]:
    """Multiply-adds an image that each task adds when it runs after those before it, for the backbone's own pixels squared;
    heads left out."""
    return [cost(task, reuse(tasks[:number], task)[1]) for number, task in enumerate(tasks)]


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
        stage = self.task.stages[number]
        if stage.source is not None:
            return self.kept.pop(number)
        batch = batches[None if None in batches else stage.task.preprocessing]
        return batch[self.rows[self.left].to(batch.device)]


@torch.inference_mode()
def run_rounds(
    tasks: Sequence[EngineTask], rows: Sequence[Rows], batches: Batches, compute: Compute
) -> dict[str, Routed]:
    """Every task on its rows, cascades in rounds; `compute(tasks, rows, batches)` runs one plan."""
    walks = [_Walk(task, own) for task, own in zip(tasks, rows, strict=True) if task.stages]
    firsts = [task.stages[0].running if task.stages else (task,) for task in tasks]
    turns = [(turn, own) for running, own in zip(firsts, rows, strict=True) for turn in running]
    found = compute([turn for turn, _ in turns], [own for _, own in turns], batches)
    answers = {task.name: found[task.name] for task in tasks if not task.stages}
    routed = {name: Routed(logits, torch.zeros(len(logits), dtype=torch.long)) for name, logits in answers.items()}
    number, going = 0, walks
    while going:
        for walk in going:
            walk.take(number, found)
        number += 1
        going = [walk for walk in going if len(walk.left)]
        if going:
            inputs = {walk.task.stages[number].task.root: walk.images(number, batches) for walk in going}
            pairs = [(turn, len(walk.left)) for walk in going for turn in walk.task.stages[number].running]
            found = compute([turn for turn, _ in pairs], [tuple(range(count)) for _, count in pairs], inputs)
    for walk in walks:
        assert walk.logits is not None
        routed[walk.task.name] = Routed(walk.logits, walk.stages)
    return {task.name: routed[task.name] for task in tasks}

"""Greedy selection of the blocks to patch, by cross-validation.

    S = {}, best = 0
    repeat   L* = argmax_L CV(S + L);  if CV(S + L*) > best + epsilon: S = S + L*, best = CV(S + L*);  else stop
    train S on all training images, report the test accuracy once

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), Algorithm 1. `rule="code"` is what the
authors' code does: it begins with the linear probe (or all blocks, or the better), goes on while the best candidate is at
most epsilon worse than the best so far, adds blocks to none and removes them from all, and returns the best set seen.

Greedy choice stops where two blocks would gain together what neither gains alone. So what it finds is compared with both ends,
no blocks and all of them, on the same folds, and the best of the three is trained.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import MethodError, TrainingError
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.select.budget import Budget
from modelpatch.select.study import (
    Candidate,
    Rater,
    Score,
    applicable,
    best,
    describe,
    open_study,
    score_by_halving,
    units,
)
from modelpatch.train.fitting import fit

Rule = Literal["paper", "code"]
Start = Literal["none", "all", "better"]


@dataclass(frozen=True)
class Step:
    """A candidate of a round: the block or stage it adds or removes, its blocks then, its score, and the limit it breaks."""

    block: str
    blocks: tuple[str, ...]
    score: Score | None
    left_out: str | None = None


@dataclass(frozen=True)
class Round:
    """All candidates of a round, the position of the best one, and whether its block was taken."""

    number: int
    steps: tuple[Step, ...]
    best: int | None
    accepted: bool
    effect: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = [one.score.as_dict() if one.score else {"top1": None} for one in self.steps]
        return {
            "round": self.number,
            "best": None if self.best is None else self.steps[self.best].block,
            "accepted": self.accepted,
            "halving": self.effect,
            "candidates": [
                {"block": one.block, "left_out": one.left_out, **score}
                for one, score in zip(self.steps, scores, strict=True)
            ],
        }


@dataclass(frozen=True)
class Complexity:
    """The bound of Theorem 1 on the error, but for the distance Δ that training moves: sqrt(r') log(kL) / sqrt(m).

    `tuned` is r', the parameters of the k chosen `blocks` (or stages) among L `candidates`, `images` m; `every` is r, those
    of all candidates, for which the bound of full fine-tuning is sqrt(r) / sqrt(m).
    """

    tuned: int
    blocks: int
    candidates: int
    images: int
    every: int

    @property
    def bound(self) -> float:
        """Of the selection, up to Δ and a constant."""
        return math.sqrt(self.tuned / self.images) * math.log(max(self.blocks, 1) * self.candidates)

    @property
    def full_bound(self) -> float:
        """Of fine-tuning all candidates, up to Δ and a constant."""
        return math.sqrt(self.every / self.images)

    def __str__(self) -> str:
        favours = "these blocks" if self.bound < self.full_bound else "all blocks"
        return (
            f"r' = {self.tuned:,} of {self.every:,}, k = {self.blocks}, L = {self.candidates}, m = {self.images:,}: "
            f"{self.bound:.1f} against {self.full_bound:.1f} for all blocks, times Δ; the smaller bound is that of {favours}"
        )


@dataclass(frozen=True)
class Selection:
    """The blocks in the order they were chosen, the rounds that chose them, and the patch trained on all training images.

    `score` is the chosen set's on the folds, `probe` the linear probe's and `every` that of all blocks to choose among, None
    where it was not measured; `every_left_out` says which limit they break. `replaced` is what greedy choice had found, where
    one of these two ends did better. `dropped` says which limit the patch would have broken with blocks that were given up.
    """

    task: str
    backbone: str
    method: str
    blocks: tuple[str, ...]
    probe: Score
    score: Score
    rounds: tuple[Round, ...]
    patch: Patch
    complexity: Complexity
    every: Score | None = None
    every_left_out: str | None = None
    replaced: tuple[str, Score] | None = None
    dropped: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "backbone": self.backbone,
            "method": self.method,
            "blocks": list(self.blocks),
            "linear_probe": self.probe.as_dict(),
            "all_blocks": self.every.as_dict() if self.every else None,
            "all_blocks_left_out": self.every_left_out,
            "cross_validation": self.score.as_dict(),
            "replaced": {"name": self.replaced[0], **self.replaced[1].as_dict()} if self.replaced else None,
            "rounds": [one.as_dict() for one in self.rounds],
            "complexity": asdict(self.complexity)
            | {"bound": self.complexity.bound, "full": self.complexity.full_bound},
            "dropped": list(self.dropped),
            "test": dict(self.patch.metrics),
        }


@dataclass(frozen=True)
class Greedy:
    """The rules by which blocks are chosen, of `candidates`, by default all, or as whole `stages`.

    `ends` compares what was found with no blocks and with all of them; without it the algorithm's own choice is trained.
    """

    rule: Rule = "paper"
    start: Start = "none"
    epsilon: float = 0.01
    warm_start: bool = False
    halving: int = 0
    candidates: tuple[str, ...] = ()
    stages: bool = False
    ends: bool = True

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule) or self.start not in get_args(Start):
            raise TrainingError(
                f"rule={self.rule!r}, start={self.start!r}: expected a rule of {', '.join(get_args(Rule))} and a start of "
                f"{', '.join(get_args(Start))}."
            )
        if self.rule == "paper" and self.start != "none":
            raise TrainingError("the paper's rule starts with no blocks. Give rule='code' to start with others.")
        if self.warm_start and self.start != "none":
            raise TrainingError("a warm start adds blocks to trained ones: it goes with start='none' only.")
        if self.stages and self.candidates:
            raise TrainingError("stages chooses among all stages. Leave out the blocks to choose among, or stages.")
        if not 0 <= self.epsilon < 1:
            raise TrainingError(f"epsilon is {self.epsilon}; expected a share of images from 0 to below 1.")


class GreedySearch:
    """The rounds of one selection, within a study."""

    def __init__(
        self, study: Rater, method: Method, greedy: Greedy, budget: Budget, each_round: Callable[[Round], None]
    ) -> None:
        self.study, self.method, self.greedy, self.budget, self.each_round = study, method, greedy, budget, each_round
        backbone = study.bench.backbone
        named = {describe(backbone, unit): unit for unit in units(backbone, stages=greedy.stages)}
        if unknown := [name for name in greedy.candidates if name not in named]:
            raise MethodError(f"{backbone.spec} has no block {unknown[0]!r}. It has: {', '.join(named)}.")
        able, _ = applicable(backbone, method, [named[name] for name in greedy.candidates or named], "block")
        self.units = {name: candidate.blocks for name, (candidate, _) in able.items()}  # what can be added, by name
        self.every = Candidate.of(method, tuple(itertools.chain.from_iterable(self.units.values())))
        self.rounds: list[Round] = []
        self.sets: list[tuple[Candidate, Score]] = []  # every set that was current, in order

    def run(self) -> None:
        """Rounds until the rule says stop."""
        current, score = self._begin()
        self.sets.append((current, score))
        removing = len(current.blocks) > 0
        bar = 0.0 if self.greedy.rule == "paper" else score.top1
        while current.blocks or not removing:
            changes = {name: unit for name, unit in self.units.items() if (unit[0] in current.blocks) == removing}
            if not changes:
                return
            parent = current if self.greedy.warm_start and current.blocks else None
            sets = [
                tuple(block for block in current.blocks if block not in unit) if removing else (*current.blocks, *unit)
                for unit in changes.values()
            ]
            candidates = [Candidate.of(self.method, blocks, parent) for blocks in sets]
            steps, effect = self._score(list(changes), candidates)
            number = best([None if step.left_out else step.score for step in steps])
            found = None if number is None else steps[number].score
            accepted = found is not None and self._accepts(found.top1, bar)
            self.rounds.append(Round(len(self.rounds) + 1, steps, number, accepted, effect))
            self.each_round(self.rounds[-1])
            if found is None or number is None or not accepted:
                return
            current, bar = candidates[number], max(bar, found.top1)
            self.sets.append((current, found))

    def _begin(self) -> tuple[Candidate, Score]:
        """The set to start from: none, all blocks, or the better of both."""
        none = Candidate.of(self.method, ())
        starts = {"none": [none], "all": [self.every], "better": [none, self.every]}[self.greedy.start]
        able = self.score_able(starts, "start")
        number = best([score for _, score in able])
        if number is None:
            raise TrainingError(f"nothing to start from keeps the limits: {self.why_not(starts[0])}.")
        return able[number]

    def score_able(self, candidates: Sequence[Candidate], title: str) -> list[tuple[Candidate, Score]]:
        """Those of the candidates that keep the limits, with their scores."""
        able = [candidate for candidate in candidates if self.why_not(candidate) is None]
        return list(zip(able, self.study.score(able, title=title), strict=True))

    def why_not(self, candidate: Candidate) -> str | None:
        """The limit that a candidate breaks."""
        return self.budget.why_not(self.study.bench, candidate)

    def _score(self, names: Sequence[str], candidates: Sequence[Candidate]) -> tuple[tuple[Step, ...], str | None]:
        """The steps of a round to these sets, each with one block more (or fewer) than the current one, and its halving."""
        steps = [Step(name, one.blocks, None, self.why_not(one)) for name, one in zip(names, candidates, strict=True)]
        trained = [n for n, step in enumerate(steps) if step.left_out is None]
        able, title = [candidates[n] for n in trained], f"round {len(self.rounds) + 1}"
        scores, effect = score_by_halving(self.study, able, self.greedy.halving, title)
        for n, score in zip(trained, scores, strict=True):
            too_large = self.budget.bytes is not None and score.file_bytes > self.budget.bytes
            reason = f"{score.file_bytes:,} bytes" if too_large else score.failure
            steps[n] = replace(steps[n], score=score, left_out=reason)
        return tuple(steps), effect

    def _accepts(self, top1: float, bar: float) -> bool:
        if self.greedy.rule == "code":
            return top1 >= bar - self.greedy.epsilon
        return top1 > bar + self.greedy.epsilon or not self.rounds  # best = 0 before the first round

    def chosen(self) -> list[tuple[Candidate, Score]]:
        """The sets to train, the best first: the paper's rule takes the last one, the code's the best one seen."""
        if self.greedy.rule == "paper":
            return self.sets[::-1]
        return sorted(self.sets, key=lambda pair: -pair[1].top1)


def select(
    backbone: Backbone,
    data: Task,
    method: Method | str = "subset",
    *,
    greedy: Greedy | None = None,
    max_blocks: int | None = None,
    max_bytes: int | None = None,
    max_latency: float | None = None,
    folds: int = 5,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    each_round: Callable[[Round], None] = lambda _: None,
    **options: Any,
) -> Selection:
    """Choose the blocks that `method` patches, and train the patch.

    `max_blocks`, `max_bytes` (of the file) and `max_latency` (share of the base's time, see `added_latency`) are limits:
    what cannot keep them is not tried, and the trained patch is measured against them again. `folds` folds of the training
    images, or one held-out split. `each_round` is called with every round as it ends. `out` and `checkpoint` are those of the
    final `fit`; for the other options see `open_study`, the rest are settings of `fit`. Run again after an interruption with
    the same `trials` file, it goes on.
    """
    chosen = make_method(method) if isinstance(method, str) else method
    budget = Budget(max_blocks, max_bytes, max_latency)
    with open_study(backbone, data, title="select", folds=folds, **options) as study:
        search = GreedySearch(study, chosen, greedy or Greedy(), budget, each_round)
        none = Candidate.of(chosen, ())
        probe = study.score([none], title="linear probe")[0]
        search.run()
        ranked = search.chosen()
        found = ranked[0]
        ends = search.score_able([none, search.every], "both ends") if search.greedy.ends else []
        better = sorted((end for end in ends if end[1].top1 > found[1].top1), key=lambda end: -end[1].top1)
        candidate, score, patch, dropped = train_first_within(
            study, [*better, *ranked], budget, out=out, checkpoint=checkpoint
        )
    return Selection(
        task=data.task.name,
        backbone=backbone.spec,
        method=chosen.name,
        blocks=candidate.blocks,
        probe=probe,
        score=score,
        rounds=tuple(search.rounds),
        patch=patch,
        complexity=Complexity(
            tuned=candidate.method.count_parameters(backbone),
            blocks=sum(unit[0] in candidate.blocks for unit in search.units.values()),
            candidates=len(search.units),
            images=len(data.train),
            every=search.every.method.count_parameters(backbone),
        ),
        every=next((score for end, score in ends if end.blocks), None),
        every_left_out=search.why_not(search.every) if search.greedy.ends else None,
        replaced=(found[0].name, found[1]) if better and candidate is better[0][0] else None,
        dropped=tuple(dropped),
    )


def train_first_within(
    study: Rater,
    ranked: Sequence[tuple[Candidate, Score]],
    budget: Budget,
    *,
    out: str | Path | None,
    checkpoint: str | Path | None = None,
) -> tuple[Candidate, Score, Patch, list[str]]:
    """Train the first candidate on all training images; where its patch breaks the budget, the next, and so on.

    Returns the candidate, its score, its patch, written to `out`, and why those before it were given up. Raises
    `TrainingError` if none keeps the budget.
    """
    backbone = study.bench.backbone
    dropped: list[str] = []
    common: dict[str, Any] = {"checkpoint": checkpoint, "progress": study.progress, **asdict(study.settings)}
    for candidate, score in ranked:
        stored = {} if candidate.dtype is None else {"dtype": candidate.dtype}
        patch = fit(backbone, study.data, candidate.method, **common | stored)
        if (broken := budget.broken_by(backbone, patch)) is None:
            if out is not None:
                patch.save(out)
            return candidate, score, patch, dropped
        dropped.append(f"{candidate.name}: {broken}")
    raise TrainingError(f"no patch keeps the budget: {'; '.join(dropped) or 'there is no candidate'}.")

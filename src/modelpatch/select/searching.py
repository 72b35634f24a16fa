"""The best patch within a budget: method, blocks and settings chosen by validation.

1. profile     every block alone, few epochs: which blocks are worth training
2. propose     methods over the best, the last and all blocks, the last stages; every number of Δ-modules; learning rates
3. leave out   what cannot keep the budget, by the bytes and the time of an untrained patch
4. halve       few epochs for all that is left, more for the best third, and so on (Jamieson and Talwalkar, 2016)
5. weigh       of what is as accurate as the best within its standard error, the cheapest first (Breiman et al., 1984)
6. train       the first on all training images; its patch is measured again, and must keep the budget
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import MethodNotApplicableError, MissingExtraError, TrainingError
from modelpatch.methods.method import confine
from modelpatch.methods.registry import make_method, spellings
from modelpatch.patch.contents import Patch
from modelpatch.select.budget import Budget
from modelpatch.select.greedy import train_first_within
from modelpatch.select.study import (
    Candidate,
    Profile,
    Score,
    describe,
    open_study,
    profile_units,
    score_by_halving,
    units,
)

RATES = (1 / 3, 1.0, 3.0)  # times a method's own
BEST_BLOCKS = 3
SMALL = "float16"  # the dtype of patches that must keep a limit of bytes
SMALLEST = "int8"  # that of those that keep it so alone
NOISE = 0.05  # added latencies that differ by less are alike
PROFILE_SHARE = 4  # the profile has a fourth of the epochs


@dataclass(frozen=True)
class Proposal:
    """A candidate with its score and its added latency; `kept` says whether it was trained to the last rung."""

    candidate: Candidate
    score: Score
    latency: float
    kept: bool

    def beats(self, other: Self) -> bool:
        """True if this one is at least as good in accuracy, bytes and time, and better in one of them."""
        mine = (-self.score.top1, self.score.file_bytes, self.latency)
        theirs = (-other.score.top1, other.score.file_bytes, other.latency)
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def front(proposals: Sequence[Proposal]) -> tuple[Proposal, ...]:
    """The fully trained proposals that no other one beats."""
    kept = [one for one in proposals if one.kept]
    return tuple(one for one in kept if not any(other.beats(one) for other in kept))


@dataclass(frozen=True)
class Search:
    """The proposals that were trained, the best first, those left out with the limit they break, and the trained patch."""

    task: str
    backbone: str
    budget: Budget
    profile: Profile
    proposals: tuple[Proposal, ...]
    left_out: dict[str, str]
    chosen: Candidate
    patch: Patch
    dropped: tuple[str, ...]
    effect: str | None
    best: Candidate
    error: float

    @property
    def front(self) -> tuple[Proposal, ...]:
        """The fully trained proposals that no other one beats."""
        return front(self.proposals)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        front = self.front
        limits = {name: getattr(self.budget, name) for name in ("bytes", "latency", "blocks")}
        rows = [
            {"name": one.candidate.name, "latency": one.latency, "pareto": one in front, **one.score.as_dict()}
            for one in self.proposals
        ]
        return {
            "task": self.task,
            "backbone": self.backbone,
            "limits": limits,
            "profile": self.profile.as_dict(),
            "proposals": rows,
            "left_out": self.left_out,
            "chosen": self.chosen.name,
            "best": self.best.name,
            "error": self.error,
            "dropped": list(self.dropped),
            "halving": self.effect,
            "test": dict(self.patch.metrics),
        }


def search(
    backbone: Backbone,
    data: Task,
    methods: Sequence[str] | None = None,
    *,
    max_bytes: int | None = None,
    max_latency: float | None = None,
    tries: int = 48,
    folds: int = 1,
    halving: int = 3,
    margin: float = 1.0,
    out: str | Path | None = None,
    **options: Any,
) -> Search:
    """Find and train the best patch of at most `max_bytes` that adds at most the share `max_latency` to the base's time.

    `methods` are spellings (see `make_method`), by default those in `Method.searched`. At most `tries` proposals are trained;
    where there are more, a seeded draw leaves some out, but never the linear probe. `halving=0` trains all of them to the end.
    Of the proposals within `margin` standard errors of the best accuracy the one that adds the least time, then bytes, is
    trained; `margin=0` trains the best. With `max_bytes` patches are stored as float16, and as int8 where only that keeps the
    limit, unless `dtype` says otherwise. For the other options see `open_study`; the
    rest are settings of `fit`. Raises `TrainingError` if nothing keeps the budget.
    """
    if not 0 <= margin < math.inf:
        raise TrainingError(f"margin = {margin!r} is not valid; expected a number of standard errors from 0 on.")
    budget = Budget(bytes=max_bytes, latency=max_latency)
    packs = max_bytes is not None and "dtype" not in options
    methods = spellings("searched") if methods is None else methods
    if max_bytes is not None:
        options.setdefault("dtype", SMALL)
    for name in methods:
        make_method(name)
    with open_study(backbone, data, title="search", folds=folds, **options) as study:
        epochs = max(1, study.settings.epochs // PROFILE_SHARE)
        profiled = profile_units(study, make_method("subset"), units(backbone), "blocks", epochs=epochs)
        able: list[Candidate] = []
        left_out: dict[str, str] = {}
        for candidate in propose(backbone, methods, profiled, left_out):
            forms = [candidate]
            if packs:
                forms.append(replace(candidate, name=f"{candidate.name}, {SMALLEST}", dtype=SMALLEST))
            kept = next((form for form in forms if budget.why_not(study.bench, form) is None), None)
            if kept is None:
                left_out[candidate.name] = str(budget.why_not(study.bench, candidate))
            else:
                able.append(kept)
        able = _draw(able, tries, study.settings.seed, left_out)
        if not able:
            first = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            raise TrainingError(
                f"nothing keeps the budget, stored as {study.settings.dtype} ({first}; ...). Raise a limit, or try dtype=int8."
            )
        scores, effect = score_by_halving(study, able, halving, "proposals")
        longest = max((score.epochs for score in scores if score.top1s), default=0)
        proposals = [
            Proposal(one, score, budget.added(study.bench, one.method), score.epochs == longest)
            for one, score in zip(able, scores, strict=True)
            if score.top1s
        ]
        proposals.sort(key=lambda one: (-one.score.epochs, -one.score.top1, one.score.file_bytes))
        fitting = [one for one in proposals if max_bytes is None or one.score.file_bytes <= max_bytes]
        images = sum(len(held) for _, held in study.bench.folds.rows)
        ranked = [(one.candidate, one.score) for one in weigh(fitting, images, margin)]
        chosen, _, patch, dropped = train_first_within(study, ranked, budget, out=out)
    return Search(
        task=data.task.name,
        backbone=backbone.spec,
        budget=budget,
        profile=profiled,
        proposals=tuple(proposals),
        left_out=left_out,
        chosen=chosen,
        patch=patch,
        dropped=tuple(dropped),
        effect=effect,
        best=fitting[0].candidate,
        error=margin * fitting[0].score.error_on(images),
    )


def weigh(proposals: Sequence[Proposal], images: int, margin: float) -> list[Proposal]:
    """Proposals, the best first, put in order of cost where they are within `margin` errors of the best on `images`."""
    if not (proposals and margin):
        return list(proposals)
    best = proposals[0].score
    least = best.top1 - margin * best.error_on(images)
    near = [one for one in proposals if one.score.epochs == best.epochs and one.score.top1 >= least]
    near.sort(key=lambda one: (round(one.latency / NOISE), one.score.file_bytes))
    return [*near, *(one for one in proposals if not any(one is other for other in near))]


def propose(
    backbone: Backbone, methods: Sequence[str], profiled: Profile, left_out: dict[str, str]
) -> Iterator[Candidate]:
    """Methods over sets of blocks, each at several learning rates; what cannot be made is left out with the reason."""
    sets = _block_sets(backbone, profiled)
    seen: set[str] = set()
    for spelled in methods:
        try:
            forms = list(_forms(backbone, spelled, sets))
        except (MethodNotApplicableError, MissingExtraError) as error:
            left_out[spelled] = str(error)
            continue
        for form in forms:
            try:
                form.method.count_parameters(backbone)
            except (MethodNotApplicableError, MissingExtraError) as error:
                left_out[form.name] = str(error)
                continue
            for candidate in _at_rates(form):
                method = candidate.method
                chosen = {key: value for key, value in method.hyperparameters().items() if key != "blocks"}
                changes = method.blueprint(backbone).model_dump_json()  # where blocks=last has its name
                known = json.dumps([method.name, chosen, changes], sort_keys=True)
                if known not in seen:
                    seen.add(known)
                    yield candidate


def _forms(backbone: Backbone, spelled: str, sets: Sequence[tuple[str, ...]]) -> Iterator[Candidate]:
    """A method over every set of blocks, or as it is where it changes none; one with sizes of its own at each of them."""
    method = make_method(spelled)
    blueprint = method.blueprint(backbone)
    if sizes := method.sizes(backbone):
        yield from (Candidate(f"{spelled} {label}", (), sized) for label, sized in sizes)
        return
    yield Candidate(spelled, (), method)
    if blueprint.owned or blueprint.grafts:
        for blocks in sets:
            yield Candidate(f"{spelled} in {describe(backbone, blocks)}", blocks, confine(method, blocks))


def _at_rates(form: Candidate) -> Iterator[Candidate]:
    """The candidate at several learning rates; several methods in one patch, and the head alone, keep theirs."""
    method = form.method
    if len(method.members) > 1 or method.trains_head_alone:
        yield form
        return
    for rate in RATES:
        lr = method.lr * rate
        yield replace(form, name=f"{form.name}, lr {lr:.2g}", method=replace(method, lr=lr))


def _block_sets(backbone: Backbone, profiled: Profile) -> list[tuple[str, ...]]:
    """The best one, two and three blocks of the profile, the last one, two and three, and the last one, two, ... stages."""
    order = [block.name for block in backbone.chain.blocks]
    ranked = sorted(profiled.rows, key=lambda row: -row.score.top1)
    sets = [tuple(row.blocks[0] for row in ranked[:count]) for count in range(1, BEST_BLOCKS + 1)]
    sets += [tuple(order[-count:]) for count in range(1, BEST_BLOCKS + 1)]
    stages = [tuple(block.name for block in stage) for stage in backbone.chain.stages]
    sets += [sum(stages[start:], ()) for start in range(len(stages))]
    return list(dict.fromkeys(tuple(sorted(blocks, key=order.index)) for blocks in sets))


def _draw(able: list[Candidate], tries: int, seed: int, left_out: dict[str, str]) -> list[Candidate]:
    """At most `tries` of the candidates, in their order. The linear probe, which all must beat, is always among them."""
    if len(able) <= tries:
        return able
    kept = [one for one in able if one.method.trains_head_alone]
    others = [one for one in able if not one.method.trains_head_alone]
    kept += random.Random(seed).sample(others, max(0, tries - len(kept)))
    names = {one.name for one in kept}
    left_out.update({one.name: f"not drawn among {tries} tries" for one in able if one.name not in names})
    return [one for one in able if one.name in names]

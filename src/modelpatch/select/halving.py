"""Successive halving over epochs: few epochs for all candidates, more for the best of them.

    rung r:  epochs_r = epochs / eta^(R - r),  the best ceil(n / eta^r) candidates of the rung before

Jamieson and Talwalkar: *Non-stochastic Best Arm Identification and Hyperparameter Optimization* (2016). Every rung trains
from the start with its own schedule, so that an outcome depends on its trial alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelpatch.errors import TrainingError
from modelpatch.select.candidates import Candidate
from modelpatch.select.study import Score, Study


@dataclass(frozen=True)
class Effect:
    """What halving saved: epochs trained by all trials, and what they would have been without it."""

    epochs: int
    without: int

    def __str__(self) -> str:
        if self.epochs < self.without:
            return f"successive halving: {self.epochs:,} epochs instead of {self.without:,}"
        return f"successive halving saved nothing: {self.epochs:,} epochs, {self.without:,} without it"


def score_by_halving(
    study: Study, candidates: Sequence[Candidate], eta: int, title: str, epochs: int | None = None
) -> tuple[list[Score], Effect | None]:
    """The candidates' scores, each after the epochs of the last rung it reached; with `eta` 0, of full trials for
    all. `epochs` are those of a full trial, by default the study's.

    Compare scores of different epochs with care: only those that reached the last rung are final. Raises `TrainingError`
    for an `eta` of 1 or below 0.
    """
    if eta == 0:
        return study.score(candidates, epochs, title), None
    if eta < 2:
        raise TrainingError(f"halving={eta} would keep one candidate of {eta}. Give 2 or more, or 0 for no halving.")
    scores: list[Score | None] = [None] * len(candidates)
    alive, spent = list(range(len(candidates))), 0
    repeats = len(study.bench.data) * len(study.seeds)
    full = epochs or study.epochs
    for epochs in rungs(full, eta):
        results = study.score([candidates[number] for number in alive], epochs, f"{title}, {epochs} epochs")
        for number, result in zip(alive, results, strict=True):
            scores[number] = result
        spent += epochs * len(alive) * repeats
        ranked = sorted(zip(alive, results, strict=True), key=lambda pair: -pair[1].top1)
        alive = sorted(number for number, _ in ranked[: math.ceil(len(alive) / eta)])
    found = [score for score in scores if score is not None]
    return found, Effect(spent, full * len(candidates) * repeats)


def rungs(epochs: int, eta: int) -> list[int]:
    """Epochs of every rung, the last with all of them: 10 and 3 give 1, 3, 10."""
    result = [epochs]
    while result[0] >= eta:
        result.insert(0, result[0] // eta)
    return result


def best(scores: Sequence[Score], allowed: Sequence[bool] | None = None) -> int | None:
    """The position of the highest score among those trained longest; the first of equals. None where none is left."""
    able = [n for n, score in enumerate(scores) if score.top1s and (allowed is None or allowed[n])]
    longest = max((scores[n].epochs for n in able), default=0)
    able = [n for n in able if scores[n].epochs == longest]
    return max(able, key=lambda n: (scores[n].top1, -n), default=None)

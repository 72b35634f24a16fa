"""Candidates scored by validation: every fold, every seed, in parallel where there are workers, known outcomes reused.

score = mean ± standard error of the accuracies on what each fold holds out
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.select.candidates import Candidate
from modelpatch.select.journal import Journal
from modelpatch.select.trials import DISK, Bench, Outcome
from modelpatch.select.workers import Workers, make_workers
from modelpatch.train.evaluation import standard_error
from modelpatch.train.fitting import check_settings
from modelpatch.train.progress import Progress, quiet_progress


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1] on held-out images, one a fold and seed, after `epochs` epochs.

    `file_bytes` is the largest file among the trials' patches, `seconds` their sum. A candidate whose training failed has no
    accuracies, and `failure` says why.
    """

    epochs: int
    top1s: tuple[float, ...]
    file_bytes: int
    seconds: float
    failure: str | None = None

    @property
    def top1(self) -> float:
        """The mean, -1 for a candidate that failed."""
        return statistics.fmean(self.top1s) if self.top1s else -1.0

    @property
    def error(self) -> float | None:
        """The standard error of the mean, None for one trial."""
        return standard_error(self.top1s)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "top1": self.top1 if self.top1s else None,
            "standard_error": self.error,
            "top1s": list(self.top1s),
            "epochs": self.epochs,
            "file_bytes": self.file_bytes,
            "seconds": round(self.seconds, 3),
            "failure": self.failure,
        }


@dataclass
class Study:
    """A bench, what works on it, and what is known so far. `epochs_trained` counts those of trials that this run made."""

    bench: Bench
    workers: Workers
    journal: Journal[Outcome]
    bar: Progress
    seeds: tuple[int, ...]
    epochs_trained: int = field(default=0, init=False)

    @property
    def epochs(self) -> int:
        """Epochs of a full trial."""
        return self.bench.settings.epochs

    def score(
        self, candidates: Sequence[Candidate], epochs: int | None = None, title: str = "candidates"
    ) -> list[Score]:
        """Their scores after `epochs` epochs, those of a full trial by default."""
        epochs = epochs or self.epochs
        folds = range(len(self.bench.data))
        trials = [[c.trial(fold, seed, epochs) for seed in self.seeds for fold in folds] for c in candidates]
        keys = {self.bench.key(trial): trial for group in trials for trial in group}
        todo = {key: trial for key, trial in keys.items() if key not in self.journal.outcomes}
        names = list(todo)
        with self.bar.task(title, len(keys), len(keys) - len(todo)) as advance:
            for position, outcome in self.workers.run(list(todo.values())):
                self.journal.add(names[position], todo[names[position]].as_dict(), outcome)
                self.epochs_trained += todo[names[position]].epochs
                advance(1)
        return [self._score([self.bench.key(trial) for trial in group], epochs) for group in trials]

    def _score(self, keys: Sequence[str], epochs: int) -> Score:
        outcomes = [self.journal.outcomes[key] for key in keys]
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        return Score(
            epochs=epochs,
            top1s=() if failures else tuple(outcome.top1 for outcome in outcomes if outcome.top1 is not None),
            file_bytes=max(outcome.file_bytes for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
            failure=failures[0] if failures else None,
        )


@contextmanager
def open_study(
    backbone: Backbone,
    data: Task,
    *,
    title: str,
    folds: int,
    seeds: int = 1,
    workers: int = 1,
    ray: str | None = None,
    trials: str | Path | None = None,
    disk: int = DISK,
    same_steps: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Iterator[Study]:
    """A study on the training images of `data`.

    `folds` is the number of folds, 1 for one held-out split; every trial is repeated with `seeds` seeds. `workers` processes
    run trials side by side, on this machine or, with `ray`, on the cluster at that address (`local` starts one). `trials`
    names a file in which outcomes are kept. `disk` bounds the bytes of cached activations beyond the settings' `memory`. With
    `same_steps` trials take as many steps on their fold as the final patch will on all training images, instead of as many
    epochs; scores still name the epochs on all images.
    """
    if seeds < 1:
        raise TrainingError(f"the number of seeds is {seeds}; expected at least 1.")
    checked = check_settings(settings)
    bench = Bench(backbone, data, checked, folds=folds, disk=disk, same_steps=same_steps)
    bar = Progress(f"{title} on {data.task.name}") if progress else quiet_progress()
    journal = Journal(Outcome, trials)
    with bar, make_workers(bench, workers, ray) as pool:
        bench.bar = bar
        try:
            yield Study(bench, pool, journal, bar, tuple(range(checked.seed, checked.seed + seeds)))
        except KeyboardInterrupt:
            if trials is None:
                raise
            raise KeyboardInterrupt(f"finished trials are in {trials}; the same command goes on from there") from None
    backbone.verify()

"""Candidates scored by validation, and the finetuning profile: each block, run of blocks, pair or stage tuned alone.

    score = mean ± standard error of the accuracies on the images that each fold holds out
    profile(u) = score of the patch that trains {u, head}

Every fold and every seed is a trial. The profile is that of Kaplun et al.: *Less is More: Selective Layer Finetuning with
SubTuning* (2023), section 2.1; any method can take the place of full fine-tuning.

Successive halving gives few epochs to all candidates and more to the best of them: rung r has epochs / eta^(R - r) of them
for the best ceil(n / eta^r) candidates of the rung before (Jamieson and Talwalkar: *Non-stochastic Best Arm Identification
and Hyperparameter Optimization*, 2016). Every rung trains from the start: an outcome depends on its trial alone.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import MethodError, MethodNotApplicableError, TrainingError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method, confine
from modelpatch.methods.registry import make_method
from modelpatch.select.trials import DISK, Bench, Journal, Outcome, Run, Trial, open_workers
from modelpatch.train.evaluation import standard_error
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings, check_settings


@dataclass(frozen=True)
class Candidate:
    """A method confined to `blocks`, none for the linear probe. With `parent` its trials start from the parent's patches.

    `dtype` is how its patches are stored, by default as the study's.
    """

    name: str
    blocks: tuple[str, ...]
    method: Method
    parent: Self | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, method: Method, blocks: Sequence[str], parent: Self | None = None) -> Self:
        """The method over these blocks; over none, the linear probe with the method's head rate and optimizer."""
        if not blocks:
            probe = LinearProbe(head_lr=method.head_lr, optimizer=method.optimizer)
            return cls(probe.name, (), probe)
        return cls(" + ".join(blocks), tuple(blocks), confine(method, blocks), parent)

    def trial(self, fold: int, seed: int, epochs: int) -> Trial:
        """This candidate on one fold."""
        start = self.parent.trial(fold, seed, epochs) if self.parent else None
        return Trial(self.method, fold, seed, epochs, start, self.dtype)


def units(
    backbone: Backbone, *, consecutive: int = 1, pairs: bool = False, stages: bool = False
) -> list[tuple[str, ...]]:
    """The units that a profile fine-tunes one at a time, by the names of blocks, in the order of the chain.

    Every block; or each run of `consecutive` blocks; or all `pairs`; or the `stages`. Raises `MethodError` for more than one
    of these, or for runs longer than the chain has blocks.
    """
    names = [block.name for block in backbone.chain.blocks]
    if (consecutive != 1) + pairs + stages > 1:
        raise MethodError("consecutive, pairs and stages exclude each other. Give one of them.")
    if not 1 <= consecutive <= len(names):
        raise MethodError(f"runs of {consecutive} blocks: {backbone.spec} has {len(names)} blocks.")
    if stages:
        return [tuple(block.name for block in stage) for stage in backbone.chain.stages]
    if pairs:
        return list(itertools.combinations(names, 2))
    return [tuple(names[start : start + consecutive]) for start in range(len(names) - consecutive + 1)]


def describe(backbone: Backbone, blocks: Sequence[str]) -> str:
    """A short name for some blocks: a run is `first to last`."""
    names = [block.name for block in backbone.chain.blocks]
    places = [names.index(block) for block in blocks]
    if len(blocks) > 2 and places == list(range(places[0], places[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}"
    return " + ".join(blocks)


def applicable(
    backbone: Backbone, method: Method, names: Iterable[tuple[str, ...]], noun: str
) -> tuple[dict[str, tuple[Candidate, int]], dict[str, str]]:
    """The units in which the method has something to change, with what it trains there, and why others are left out.

    Units are found by their description. Raises `MethodNotApplicableError` if there are none; `noun` says of what.
    """
    able: dict[str, tuple[Candidate, int]] = {}
    skipped: dict[str, str] = {}
    for blocks in names:
        name, candidate = describe(backbone, blocks), Candidate.of(method, blocks)
        try:
            able[name] = candidate, candidate.method.count_parameters(backbone)
        except MethodNotApplicableError as error:
            skipped[name] = str(error)
    if not able:
        reason = next(iter(skipped.values()))
        raise MethodNotApplicableError(f"{method.name} has nothing to change in any {noun}: {reason}")
    return able, skipped


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

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], epochs: int) -> Self:
        """The score of a candidate's trials."""
        failure = next((outcome.failure for outcome in outcomes if outcome.failure), None)
        top1s = () if failure else tuple(outcome.top1 for outcome in outcomes if outcome.top1 is not None)
        size, seconds = max(one.file_bytes for one in outcomes), sum(one.seconds for one in outcomes)
        return cls(epochs, top1s, size, seconds, failure)

    @property
    def top1(self) -> float:
        """The mean, -1 for a candidate that failed."""
        return statistics.fmean(self.top1s) if self.top1s else -1.0

    @property
    def error(self) -> float | None:
        """The standard error of the mean, None for one trial."""
        return standard_error(self.top1s)

    def error_on(self, images: int) -> float:
        """The standard error of the mean on so many held-out images: that of the trials, or of the share if it is larger.

        One image more of each answer is counted, so that an accuracy of 1 is not without error.
        """
        share = (self.top1 * images + 1) / (images + 2)
        return max(self.error or 0.0, math.sqrt(share * (1 - share) / images))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {"top1": self.top1 if self.top1s else None, "standard_error": self.error}
        return {**asdict(self), **figures, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Rater:
    """A bench, what runs trials on it, and what is known so far; the task and the settings of a final patch."""

    bench: Bench
    run: Run
    journal: Journal[Outcome]
    bar: Progress
    seeds: tuple[int, ...]
    data: Task
    settings: FitSettings
    progress: bool

    def score(
        self, candidates: Sequence[Candidate], epochs: int | None = None, title: str = "candidates"
    ) -> list[Score]:
        """Their scores after `epochs` epochs, those of a full trial by default."""
        epochs = epochs or self.settings.epochs
        known, folds = self.journal.outcomes, range(len(self.bench.data))
        trials = [[c.trial(fold, seed, epochs) for seed in self.seeds for fold in folds] for c in candidates]
        keys = [[self.bench.key(trial) for trial in group] for group in trials]
        every = dict(zip(itertools.chain(*keys), itertools.chain(*trials), strict=True))
        todo = [(key, trial) for key, trial in every.items() if key not in known]
        with self.bar.task(title, len(every), len(every) - len(todo)) as advance:
            for position, outcome in self.run([trial for _, trial in todo]):
                key, trial = todo[position]
                self.journal.add(key, trial.as_dict(), outcome)
                advance(1)
        return [Score.of([known[key] for key in group], epochs) for group in keys]


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
) -> Iterator[Rater]:
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
    journal, numbers = Journal(Outcome, trials), tuple(range(checked.seed, checked.seed + seeds))
    with bar, open_workers(bench, workers, ray) as run:
        bench.bar = bar
        try:
            yield Rater(bench, run, journal, bar, numbers, data, checked, progress)
        except KeyboardInterrupt:
            if trials is None:
                raise
            raise KeyboardInterrupt(f"finished trials are in {trials}; the same command goes on from there") from None
    backbone.verify_tensors()


# successive halving -----------------------------------------------------------------------------------------


def score_by_halving(
    study: Rater, candidates: Sequence[Candidate], eta: int, title: str, epochs: int | None = None
) -> tuple[list[Score], str | None]:
    """The candidates' scores, each after the epochs of the last rung it reached, and what halving saved, in words.

    With `eta` 0 all have full trials. `epochs` are those of a full trial, by default the study's. Only scores that reached the
    last rung are final. Raises `TrainingError` for an `eta` of 1 or below 0.
    """
    if eta == 0 or not candidates:
        return study.score(candidates, epochs, title), None
    if eta < 2:
        raise TrainingError(f"halving={eta} would keep one candidate of {eta}. Give 2 or more, or 0 for no halving.")
    full, alive, spent = epochs or study.settings.epochs, list(range(len(candidates))), 0
    scores: dict[int, Score] = {}
    for rung in rungs(full, eta):
        results = study.score([candidates[number] for number in alive], rung, f"{title}, {rung} epochs")
        scores |= dict(zip(alive, results, strict=True))
        spent += rung * len(alive)
        ranked = sorted(alive, key=lambda number: -scores[number].top1)
        alive = sorted(ranked[: math.ceil(len(alive) / eta)])
    repeats = len(study.bench.data) * len(study.seeds)
    spent, without = spent * repeats, full * len(candidates) * repeats
    effect = f"successive halving: {spent:,} epochs instead of {without:,}"
    if spent >= without:
        effect = f"successive halving saved nothing: {spent:,} epochs, {without:,} without it"
    return [scores[number] for number in range(len(candidates))], effect


def rungs(epochs: int, eta: int) -> list[int]:
    """Epochs of every rung, the last with all of them: 10 and 3 give 1, 3, 10."""
    result = [epochs]
    while result[0] >= eta:
        result.insert(0, result[0] // eta)
    return result


def best(scores: Sequence[Score | None]) -> int | None:
    """The position of the highest score among those trained longest; the first of equals. None where there is none."""
    ranks = {n: (score.epochs, score.top1, -n) for n, score in enumerate(scores) if score and score.top1s}
    return max(ranks, key=lambda n: ranks[n], default=None)


# the finetuning profile --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProfileRow:
    """One unit: its blocks, what the method trains of them, its score."""

    name: str
    blocks: tuple[str, ...]
    parameters: int
    score: Score


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the chain, and the linear probe's score to compare with.

    `kind` is `blocks`, `runs`, `pairs` or `stages`; `images` is the number of training images, those held out included.
    `skipped` says why a unit is not among the rows.
    """

    task: str
    backbone: str
    method: str
    kind: str
    images: int
    blocks: tuple[str, ...]
    probe: Score
    rows: tuple[ProfileRow, ...]
    skipped: dict[str, str]
    effect: str | None = None

    @property
    def best(self) -> ProfileRow | None:
        """The row with the highest accuracy."""
        number = best([row.score for row in self.rows])
        return None if number is None else self.rows[number]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {name: getattr(self, name) for name in ("task", "backbone", "method", "kind", "images", "skipped")}
        rows = [
            {"name": row.name, "blocks": list(row.blocks), "parameters": row.parameters, **row.score.as_dict()}
            for row in self.rows
        ]
        probe = self.probe.as_dict()
        return {**own, "blocks": list(self.blocks), "linear_probe": probe, "rows": rows, "halving": self.effect}


def profile(
    backbone: Backbone,
    data: Task,
    method: Method | str = "subset",
    *,
    consecutive: int = 1,
    pairs: bool = False,
    stages: bool = False,
    folds: int = 1,
    halving: int = 0,
    **options: Any,
) -> Profile:
    """Score `method` confined to every unit (see `units`) by validation on the training images; the test split is not read.

    `folds` folds, or one held-out split; `halving=3` trains only the best third for three times the epochs, and so on. For
    the other options see `open_study`; the rest are settings of `fit`, the same for all units. Raises
    `MethodNotApplicableError` if the method has nothing to change in any unit.
    """
    chosen = make_method(method) if isinstance(method, str) else method
    names = units(backbone, consecutive=consecutive, pairs=pairs, stages=stages)
    kind = "stages" if stages else "pairs" if pairs else "runs" if consecutive > 1 else "blocks"
    with open_study(backbone, data, title="profile", folds=folds, **options) as study:
        return profile_units(study, chosen, names, kind, halving)


def profile_units(
    study: Rater,
    method: Method,
    names: Sequence[tuple[str, ...]],
    kind: str,
    halving: int = 0,
    epochs: int | None = None,
) -> Profile:
    """The profile of some units within a study, by halving or after `epochs` epochs, by default the study's."""
    backbone = study.bench.backbone
    able, skipped = applicable(backbone, method, names, "unit")
    probe = study.score([Candidate.of(method, ())], epochs, title="linear probe")[0]
    scores, effect = score_by_halving(study, [one for one, _ in able.values()], halving, "profile", epochs)
    rows = [
        ProfileRow(name, candidate.blocks, count, score)
        for (name, (candidate, count)), score in zip(able.items(), scores, strict=True)
    ]
    return Profile(
        task=study.data.task.name,
        backbone=backbone.spec,
        method=method.name,
        kind=kind,
        images=len(study.bench.folds.images),
        blocks=tuple(block.name for block in backbone.chain.blocks),
        probe=probe,
        rows=tuple(rows),
        skipped=skipped,
        effect=effect,
    )

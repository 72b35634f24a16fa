"""Methods side by side on one task with equal step budgets: accuracy, what is kept of the base, parameters, bytes, seconds."""

import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DivergedError, MethodNotApplicableError, MissingExtraError, warn_caller
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method, spellings
from modelpatch.patch.contents import Patch
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.scores import Interval, wilson_interval
from modelpatch.text import file_name
from modelpatch.train.callbacks import make_folder
from modelpatch.train.evaluation import Mean, evaluate_base, harmonic_mean
from modelpatch.train.fitting import fit
from modelpatch.train.settings import check_settings

SEEDS = 2.0  # standard deviations of seeds beyond those of as many test images


@dataclass(frozen=True)
class MethodRow:
    """Means over a method's seeds. `score` is the task's metric, for classification top-1; `score_error`, its standard error
    over seeds, is None for one seed, and `interval` the 95 % interval of top-1 for as many test images. Accuracies lie in
    [0, 1]; those of the base and `harmonic_mean` are None without base data."""

    method: str
    score: float
    score_error: float | None
    base_before: float | None
    base_after: float | None
    harmonic_mean: float | None
    trainable_parameters: int
    file_bytes: int
    seconds: float
    interval: Interval | None = None
    macro_f1: float | None = None
    balanced_accuracy: float | None = None

    @property
    def top1(self) -> float:
        """The score of a classification task."""
        return self.score

    @property
    def top1_error(self) -> float | None:
        """The standard error of `top1`."""
        return self.score_error


@dataclass(frozen=True)
class SeedRun:
    """One fit of one method with one seed; `score` is the task's metric."""

    seed: int
    score: float
    base_after: float | None
    file_bytes: int
    seconds: float
    macro_f1: float | None = None
    balanced_accuracy: float | None = None

    @property
    def top1(self) -> float:
        """The score of a classification task."""
        return self.score


@dataclass(frozen=True)
class Comparison:
    """A table of methods, the runs behind it, the first seed's patches, and why methods were `skipped`."""

    task: str
    backbone: str
    rows: tuple[MethodRow, ...]
    runs: Mapping[str, tuple[SeedRun, ...]]
    patches: Mapping[str, Patch]
    skipped: Mapping[str, str]
    kind: str = Classification.name

    @property
    def metric(self) -> str:
        """The name of the scores: the metric of the task's kind."""
        return kind_of(self.kind).metric

    @property
    def title(self) -> str:
        """The title of the scores."""
        return kind_of(self.kind).metrics[self.metric]

    @property
    def in_percent(self) -> bool:
        """True where scores are shown in percent."""
        return kind_of(self.kind).in_percent

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; scores have the name of the metric."""

        def name_scores(facts: dict[str, Any]) -> dict[str, Any]:
            return {name.replace("score", self.metric): value for name, value in facts.items()}

        return {
            "task": self.task,
            "kind": self.kind,
            "backbone": self.backbone,
            "rows": [name_scores(asdict(row)) for row in self.rows],
            "runs": {name: [name_scores(asdict(run)) for run in runs] for name, runs in self.runs.items()},
            "skipped": dict(self.skipped),
        }


def compare(
    backbone: Backbone,
    data: Task,
    methods: Sequence[str | Method] | None = None,
    *,
    base: Task | None = None,
    seeds: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    reuse: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Comparison:
    """Fit every method on the task with the same settings and number of steps and put the results in one table.

    `methods` are methods or their spellings (see `make_method`), by default those in `Method.compared`. Each is fitted `seeds`
    times, from `seed` on. `base` is a test set of the backbone's own classes, measured before the first fit and after the
    last. A method that cannot patch this backbone, whose library is not installed or whose training fails is left out, with
    the reason.

    `out` names a folder for the patches, `TASK-METHOD-seedN.safetensors`. A comparison that was interrupted goes on there:
    patches that are in it already are not trained again, unless `reuse=False` replaces them. Raises
    `CheckpointMismatchError` for one of another run.
    """
    check_settings(settings)
    kind = kind_of(data.task.kind)
    if base is not None:
        check_classification(data, "the harmonic mean with the base's accuracy")
    before = evaluate_base(backbone, base).top1 if base is not None else None
    chosen = _by_name(spellings("compared") if methods is None else methods)
    trained: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, method in chosen.items():
        try:
            trained[name] = method.count_parameters(backbone)
        except (MethodNotApplicableError, MissingExtraError) as error:
            skipped[name] = str(error)
    runs: dict[str, tuple[SeedRun, ...]] = {}
    patches: dict[str, Patch] = {}
    for name in trained:
        fitted: list[SeedRun] = []
        try:
            for number in range(seed, seed + seeds):
                files = {} if out is None else _files(Path(out), f"{data.task.name}-{name}-seed{number}", reuse)
                patch = fit(backbone, data, chosen[name], progress=progress, seed=number, **files, **settings)
                score, size = patch.metrics[f"test_{kind.metric}"], patch.inspect().file_bytes
                means = [patch.metrics.get(f"test_{figure}") for figure in ("macro_f1", "balanced_accuracy")]
                fitted.append(SeedRun(number, score, None, size, patch.created["seconds"], *means))
                patches.setdefault(name, patch)
        except (DivergedError, MethodNotApplicableError) as error:
            skipped[name] = str(error)
        else:
            runs[name] = tuple(fitted)
            if chosen[name].head != "random":
                trained[name] += sum(tensor.numel() for tensor in patches[name].head_tensors.values())
    after = evaluate_base(backbone, base).top1 if base is not None else None
    runs = {name: tuple(replace(run, base_after=after) for run in fitted) for name, fitted in runs.items()}
    rows = []
    for name, own in runs.items():
        score, seconds = Mean.of([run.score for run in own]), fmean(run.seconds for run in own)
        both = None if after is None else fmean(harmonic_mean(run.score, after) for run in own)
        size = round(fmean(run.file_bytes for run in own))
        interval = wilson_interval(score.value, len(data.test)) if kind.classifies else None
        if kind.classifies:
            warn_of_seeds(name, [run.score for run in own], len(data.test))
        means = [_mean([run.macro_f1 for run in own]), _mean([run.balanced_accuracy for run in own])]
        accuracies = (score.value, score.error, before, after, both)
        rows.append(MethodRow(name, *accuracies, trained[name], size, seconds, interval, *means))
    return Comparison(data.task.name, backbone.spec, tuple(rows), runs, patches, skipped, data.task.kind)


def warn_of_seeds(name: str, scores: Sequence[float], images: int) -> None:
    """Warn where the scores of several seeds lie further apart than so many test images explain."""
    mean = fmean(scores)
    expected = math.sqrt(mean * (1 - mean) / images)
    if len(scores) > 1 and stdev(scores) > SEEDS * expected:
        warn_caller(
            f"{name}: seeds disagree, {', '.join(f'{score:.1%}' for score in scores)}, with a standard deviation of "
            f"{stdev(scores):.1%} where {images:,} test images explain {expected:.1%}. Train longer, or lower lr."
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is unknown, as in patches of an earlier version."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _by_name(methods: Sequence[str | Method]) -> dict[str, Method]:
    """Methods by their spellings, numbered where one is given twice."""
    named: dict[str, Method] = {}
    for given in methods:
        name, method = (given, make_method(given)) if isinstance(given, str) else (given.name, given)
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        named[next(one for one in itertools.chain([name], numbered) if one not in named)] = method
    return named


def _files(folder: Path, name: str, reuse: bool) -> dict[str, Any]:
    """Return the options of `fit` that name a run's file and training state."""
    make_folder(folder, "results")
    out = folder / f"{file_name(name)}.safetensors"
    checkpoint = folder / f"{out.name}.training"
    if not reuse:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return {"out": out, "checkpoint": checkpoint, "reuse": reuse}

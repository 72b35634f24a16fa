"""A patch without a method: held-out images choose augmentation, method, blocks and learning rate; then one fit on all images.

    1  scale-bias under every augmentation                       a fifth of a fit's steps each
    2  other methods under the two best, and other rates         a fifth each
    3  the two best for longer, and the linear probe             two fifths each; then the best is trained

That is successive halving (Jamieson and Talwalkar, 2016) along one line of choices, and takes about two fits. No test image is
read before the patch is trained. A choice follows the seed, the settings and the images alone, unless minutes limit it.
"""

import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.augmentation import AugmentName, choose_augmentation
from modelpatch.data.images import Images
from modelpatch.data.task import Task
from modelpatch.errors import (
    DataError,
    DivergedError,
    MethodError,
    MethodNotApplicableError,
    MissingExtraError,
    TrainingError,
    TrainingWarning,
    warn_caller,
)
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.select.budget import added_latency
from modelpatch.select.trials import Journal, file_bytes
from modelpatch.tasks.kind import kind_of
from modelpatch.text import digest_of
from modelpatch.train.distributed import Team
from modelpatch.train.evaluation import read_patch
from modelpatch.train.fitting import Fit, check_parts
from modelpatch.train.fitting import fit as fit_method
from modelpatch.train.inputs import OwnInputs
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitOptions, FitSettings, check_settings

AUTO = "auto"
FIRSTS = ("scale-bias", "bitfit", "subset")  # methods to weigh augmentations with; the first that can patch a backbone
OTHERS = ("scale-bias+depthwise",)
PROBE = "linear-probe"
BROKEN = ", more than the limit"
RATES = (1 / 3, 3.0)  # times the method's own
HELD_OUT = 0.2  # of the training images, where the data brings none
SHORT, LONG = 0.2, 0.4  # of the steps of a fit
KEPT = 2  # augmentations after the first rung, candidates after the second
SHARE = 0.05  # of the bytes of the backbone without its classifier: the limit where none is given
RECORD = 4096  # bytes of a file that are kept for what was tried
STORED = "float16"  # unless `dtype` is given
UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Tried:
    """A candidate, the share of a fit's steps that it took, and its score on held-out images; None with the reason."""

    name: str
    augment: str
    share: float
    score: float | None
    file_bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """A method and an augmentation, all that was tried, in order, and in words why it was chosen."""

    name: str
    method: Method
    augment: str
    why: str
    tried: tuple[Tried, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the patch's record."""
        rows = [{key: value for key, value in asdict(one).items() if key != "seconds"} for one in self.tried]
        return {"method": self.name, "augment": self.augment, "why": self.why, "tried": rows}


def fit(
    backbone: Backbone,
    data: Task | tuple[Any, Any],
    method: Method | str | None = None,
    *,
    max_bytes: int | None = None,
    max_latency: float | None = None,
    budget: str | int | None = None,
    **options: Any,
) -> Patch:
    """Train a patch for the task: of a `method`, or of that which held-out images choose.

    With a method this is `modelpatch.train.fit`, whose options and settings it takes. Without one, or with "auto", held-out
    images choose method, blocks, learning rate and, unless `augment` names it, augmentation; all that was tried is in the
    patch's `created["choice"]`. The patch has at most `max_bytes`, by default 5 % of the backbone's without its classifier or,
    where that is more, what the first method takes, and adds at most the share `max_latency` to the base's time. `budget`
    limits the choice to a number of trials, or the whole run to a time such as "5min"; by default it takes about two fits
    more. Raises `TrainingError` if nothing keeps a limit.
    """
    limits = {"max_bytes": max_bytes, "max_latency": max_latency, "budget": budget}
    if method is not None and method != AUTO:
        if given := [name for name, value in limits.items() if value is not None]:
            raise TrainingError(f"{given[0]} limits what is chosen, but the method is given. Leave one of them out.")
        return fit_method(backbone, data, method, **options)
    backbone, task, _ = check_parts(backbone, data, PROBE)
    team = Team.everyone()
    limit = Limit.read(max_bytes, max_latency, budget)
    chooser = Chooser.of(backbone, task, limit, options)
    out, checkpoint = options.get("out"), options.get("checkpoint")
    if out is not None and team.follow(bool(options.get("reuse")) and Path(out).exists()):
        patch = Patch.load(out)
        known = patch.created.get("choice", {}).get("of") == chooser.digest
        return read_patch(Path(out), patch.created["run"] if known else "", backbone)
    journal = None if checkpoint is None else Path(f"{checkpoint}.choice.jsonl")
    bar = Progress(f"choosing a patch for {task.task.name}") if options.get("progress") and team.leads else None
    choice = team.follow(chooser.choose(journal, bar) if team.leads else None)
    assert choice is not None, "the leader has chosen"
    created = {**options.pop("created", {}), "choice": {**choice.as_dict(), "of": chooser.digest}}
    settings = {"dtype": chooser.settings.dtype, **options, "augment": choice.augment, "created": created}
    patch = fit_method(backbone, task, choice.method, **settings)
    if broken := limit.broken_by(file_bytes(patch), lambda: added_latency(backbone, patch, limit=limit.latency)):
        warn_caller(f"the patch that was chosen takes {broken} after training, more than the limit. Set dtype='int8'.")
    if journal is not None and team.leads:
        journal.unlink(missing_ok=True)
    return patch


@dataclass(frozen=True)
class Limit:
    """Most bytes of a file, most added latency, and how many trials or seconds a choice may take; None is no limit."""

    bytes: int | None = None
    latency: float | None = None
    trials: int | None = None
    seconds: float | None = None

    @classmethod
    def read(cls, max_bytes: Any, max_latency: Any, budget: Any) -> "Limit":
        """The limits of `fit`, checked. Raises `TrainingError`."""
        for name, value in {"max_bytes": max_bytes, "max_latency": max_latency}.items():
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0):
                raise TrainingError(f"{name} = {value!r} is not valid; expected a number from 0 on.")
        if budget is None:
            return cls(max_bytes, max_latency)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h|trials?)?\s*", str(budget))
        number, unit = (float(match[1]), match[2] or "trials") if match else (0.0, "")
        if not number or (unit.startswith("trial") and number % 1):
            raise TrainingError(f"budget = {budget!r} is not valid; expected trials or a time: 8, 90s, 5min or 1h.")
        if unit.startswith("trial"):
            return cls(max_bytes, max_latency, trials=int(number))
        return cls(max_bytes, max_latency, seconds=number * UNITS[unit])

    def broken_by(self, size: int, latency: Any) -> str | None:
        """The figure that breaks a limit, of a file's bytes or of the latency that a function measures; None if none does."""
        if self.bytes is not None and size > self.bytes:
            return f"{size:,} bytes"
        if self.latency is not None and (added := latency()) > self.latency:
            return f"{added:.0%} more time"
        return None


@dataclass(eq=False)
class Chooser:
    """The trials of one choice: on four fifths of the training images, or all where the data has a validation split."""

    backbone: Backbone
    task: Task
    limit: Limit
    settings: FitSettings
    options: FitOptions
    augments: tuple[AugmentName, ...]
    tried: list[Tried] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)

    @classmethod
    def of(cls, backbone: Backbone, task: Task, limit: Limit, given: Mapping[str, Any]) -> "Chooser":
        """The chooser for the options and settings of `fit`. Raises `TrainingError`."""
        known = {one.name for one in fields(FitOptions)}
        named = {name: value for name, value in given.items() if name in known and not isinstance(value, str)}
        own = {name: given[name] for name in FitSettings.__dataclass_fields__ if name in given and name not in named}
        settings = check_settings({"dtype": STORED, **own})
        options = FitOptions(**named)
        if options.optimizer is not None or options.scheduler is not None:
            raise TrainingError(
                "an optimizer or a scheduler of yours goes with a method, whose rates it has. Name one."
            )
        names: tuple[AugmentName, ...] = (settings.augment,)
        if settings.augment == AUTO and not (task.train.changes or options.transform):
            first = choose_augmentation(AUTO, task.train).name
            names = tuple(sorted(get_args(AugmentName)[1:], key=lambda name: name != first))
        return cls(backbone, task, limit, settings, options, names)

    @property
    def digest(self) -> str:
        """A hash of all that the choice depends on."""
        held = None if self.task.validation is None else self.task.validation.digest
        facts = [self.backbone.identity, self.task.task.model_dump(mode="json"), self.task.train.digest, held]
        return digest_of([*facts, asdict(self.settings), self.options.described, asdict(self.limit)])

    @cached_property
    def data(self) -> Task:
        """The task with held-out images, which stand in place of the test images too. Raises `DataError`."""
        if self.task.train.is_stream:
            raise DataError("its images are a stream, of which none can be held out.")
        task = self.task.with_validation(self.settings.validation or HELD_OUT, self.settings.seed)
        assert task.validation is not None, "images are held out"
        return replace(task, test=task.validation)

    @cached_property
    def opened(self) -> dict[tuple[str, bool], Images]:
        """Decoded images, which all trials share."""
        return {}

    def choose(self, path: Path | None = None, bar: Progress | None = None) -> Choice:
        """Try and choose. `path` names a file of outcomes, from which an interrupted choice goes on.

        Raises `TrainingError` if nothing keeps the limits.
        """
        self.journal, self.begin, self.bar = Journal(Tried, path), time.perf_counter(), bar or quiet_progress()
        self.methods[PROBE] = make_method(PROBE)
        try:
            _ = self.data
        except DataError as error:
            return self.fall_back(f"nothing can be held out to choose by: {error}")
        with self.bar:
            for name, augment, share in self.plan():
                if self.ended(share):
                    break
                self.tried.append(self.attempt(name, augment, share))
                self.bar.note(self.describe(self.tried[-1]))
        scored = self.rank(self.tried)
        if not scored:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in self.tried[:3])
            if any(one.reason and one.reason.endswith(BROKEN) for one in self.tried):
                raise TrainingError(
                    f"no patch that was tried keeps the limits ({reasons}). Raise one, or set dtype='int8'."
                )
            return self.fall_back(f"no trial gave a score ({reasons or 'the budget was too small for one'})")
        best = scored[0]
        why = f"{self.describe(best)}, the best of {len(scored)} trials on {len(self.data.validation or ())} held-out images"
        return Choice(best.name, self.methods[best.name], best.augment, why, tuple(self.tried))

    def fall_back(self, why: str) -> Choice:
        """The first method as it is, with a warning."""
        warn_caller(f"{self.first} is trained, since {why}")
        return Choice(self.first, self.methods[self.first], self.settings.augment, why, tuple(self.tried))

    def describe(self, tried: Tried) -> str:
        """Words for a trial."""
        kind = kind_of(self.task.task.kind)
        told = tried.reason if tried.score is None else f"{kind.metrics[kind.metric]} {tried.score:.4g}"
        return f"{tried.name} under {tried.augment} augmentation: {told} after {tried.share:.0%} of a fit's steps"

    def rank(self, tried: Sequence[Tried]) -> list[Tried]:
        """Trials with a score, those that took most steps first, then the best, then the smallest file.

        The linear probe, which has converged, stands before others that have not where it is better by a standard error.
        """
        scored = [one for one in tried if one.score is not None]
        count, share = (
            len(self.data.validation or ()),
            max((one.share for one in scored if one.name != PROBE), default=0),
        )

        def key(one: Tried) -> tuple[float, float, int]:
            score = one.score or 0.0
            if one.name == PROBE:
                return -share, -(score - (max(score * (1 - score), 0.0) / max(count, 1)) ** 0.5), one.file_bytes
            return -one.share, -score, one.file_bytes

        return sorted(scored, key=key)

    def plan(self) -> Iterator[tuple[str, str, float]]:
        """Yield candidates, their augmentations and shares of steps; later ones follow from what was tried."""
        yield from ((self.first, augment, SHORT) for augment in self.augments)
        ranked = list(dict.fromkeys(one.augment for one in self.rank(self.tried)))
        best = ranked[:KEPT] or [str(self.augments[0])]
        for rate in RATES if not self.methods[self.first].trains_head_alone else ():
            yield f"{self.first}(lr={self.methods[self.first].lr * rate:.3g})", best[0], SHORT
        for name in OTHERS if self.first == FIRSTS[0] else ():
            for augment in best:
                yield name, augment, SHORT
        if blocks := self.affordable_blocks():
            for augment in best:
                yield f"{self.first}+subset(blocks=[{','.join(blocks)}])", augment, SHORT
        for one in self.rank(self.tried)[:KEPT]:
            yield one.name, one.augment, LONG
        yield PROBE, best[0], LONG

    def affordable_blocks(self) -> tuple[str, ...]:
        """The last blocks that a patch may train beside the first method within the limit of bytes."""
        if self.methods[self.first].trains_head_alone:
            return ()
        chosen: tuple[str, ...] = ()
        for block in reversed(self.backbone.chain.blocks):
            spelled = f"{self.first}+subset(blocks=[{','.join((block.name, *chosen))}])"
            try:
                if self.measure_size(make_method(spelled)) <= self.most_bytes:
                    chosen = (block.name, *chosen)
            except (MethodError, MethodNotApplicableError):
                continue
        return chosen

    @cached_property
    def first(self) -> str:
        """The method that augmentations are weighed with: the first that this backbone can take."""
        for name in FIRSTS:
            try:
                self.methods[name] = make_method(name)
                self.methods[name].count_parameters(self.backbone)
            except MethodNotApplicableError:
                continue
            return name
        return PROBE

    @cached_property
    def most_bytes(self) -> int:
        """The limit of a file's bytes: the one given, else a share of the backbone's, and at least the first method's."""
        if self.limit.bytes is not None:
            return self.limit.bytes - RECORD
        state, classifier = self.backbone.module.state_dict(), f"{self.backbone.classifier}."
        whole = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith(classifier))
        return max(round(SHARE * whole), self.measure_size(self.methods[self.first]))

    def measure_size(self, method: Method) -> int:
        """The bytes of an untrained patch."""
        return file_bytes(self.draft(self.prepare(method, self.augments[0])))

    def prepare(self, method: Method, augment: str) -> Fit:
        """A fit on what is not held out, which shares decoded images with the others."""
        settings = replace(self.settings, augment=augment, validation=0.0, early_stopping=0)  # type: ignore[arg-type]
        fit = Fit(self.backbone, self.data, method, settings, options=self.options, bar=quiet_progress())
        if isinstance(fit.source, OwnInputs):
            fit.source = replace(fit.source, opened=self.opened)
        return fit

    def draft(self, fit: Fit) -> Patch:
        """The patch of an untrained model."""
        patch = fit.build().to_patch(fit.data.task, preprocessing=fit.preprocessing, method=fit.method)
        return patch.astype(self.settings.dtype)

    def attempt(self, name: str, augment: str, share: float) -> Tried:
        """Train a candidate for a share of a fit's steps and score it on the held-out images."""
        key = digest_of([self.digest, name, augment, share])
        if key in self.journal.outcomes:
            return self.journal.outcomes[key]
        begin = time.perf_counter()
        tried = Tried(name, augment, share, None)
        try:
            method = self.methods.setdefault(name, make_method(name))
            fit = self.prepare(method, augment)
            patch = self.draft(fit)
            tried = replace(tried, file_bytes=file_bytes(patch))
            limit = Limit(self.most_bytes, self.limit.latency)
            reason = limit.broken_by(tried.file_bytes, lambda: added_latency(self.backbone, patch, limit=limit.latency))
            score = self.score(fit, share) if reason is None else None
            tried = replace(tried, score=score, reason=reason and reason + BROKEN)
        except (DivergedError, MethodError, MethodNotApplicableError, MissingExtraError, DataError) as error:
            tried = replace(tried, reason=str(error))
        tried = replace(tried, seconds=time.perf_counter() - begin)
        self.journal.add(key, {"name": name, "augment": augment, "share": share}, tried)
        return tried

    def score(self, fit: Fit, share: float) -> float:
        """Train for a share of the steps of a fit on all images, and return the kind's metric on the held-out ones."""
        settings = self.settings
        epochs = -(-len(self.task.train) // settings.batch_size) / self.options.accumulate * settings.epochs
        model = fit.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingWarning)  # of rates for few steps
            fit.train(model, steps=max(1, round(share * epochs)))
        return float(
            fit.kind.measure(fit.data.classes, fit.answers(model, "validation"), fit.facts).figures[fit.kind.metric]
        )

    def ended(self, share: float) -> bool:
        """True where the budget has no room for another trial beside the fit that follows."""
        if self.limit.trials is not None and len(self.tried) >= self.limit.trials:
            return True
        if self.limit.seconds is None:
            return False
        whole = max((one.seconds / one.share for one in self.tried), default=0.0)
        return time.perf_counter() - self.begin + (share + 1) * whole > self.limit.seconds

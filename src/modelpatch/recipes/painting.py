"""PAINT from start to end: heads, fine-tuning, mixing with the base, and the choice of a mixture on held-out images.

    joint        one fine-tuning on all tasks' images together            theta = W + alpha delta
    sequential   one after another, each from the mixture chosen before   theta = (1 - alpha) theta_before + alpha theta_new
    parallel     one fine-tuning a task, mixed at the end                  theta = W + sum_i alpha_i delta_i

Ilharco et al. (NeurIPS 2022), section 2. With a closed vocabulary a supported task is answered by the base's own classifier
where it has its classes, else, like a patched task, by a linear probe on the base's features. `naive` trains the head along,
as the baseline of Δ-Networks' tables does.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.merging import change_of
from modelpatch.data.splits import Split, join_splits
from modelpatch.data.task import Task, check_classification, join_tasks, joint_task
from modelpatch.errors import DataError, TrainingError, require
from modelpatch.heads.base import HeadRecord
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.paint import Paint, Start
from modelpatch.patch.contents import Patch
from modelpatch.recipes.tradeoff import (
    Norms,
    Point,
    Role,
    Rule,
    ScoredTask,
    Scorer,
    alphas,
    distance_to_optimal,
    linear_cka,
    weight_cosine,
)
from modelpatch.tasks.classification import Classification
from modelpatch.train.callbacks import make_folder
from modelpatch.train.evaluation import own_classes
from modelpatch.train.fitting import fit
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import check_settings

Mode = Literal["joint", "sequential", "parallel"]
Mixing = Literal["scalar", "search", "exhaustive"]
MAX_EXHAUSTIVE = 3
HeadMaker = Callable[[Sequence[str]], nn.Module]  # class names to a head that needs no training
Tuned = tuple[Patch, list[ScoredTask]]  # a fine-tuning and its tasks, with the heads they have now


@dataclass(frozen=True, kw_only=True)
class PaintSettings:
    """Settings of the search for a trade-off.

    `mode` and `mixing` as in the module's table: of parallel patches, `scalar` gives all the same alpha / n, `exhaustive`
    tries a grid of every alpha_i (up to 3 tasks), `search` lets a seeded black-box optimiser try `trials` of them. `rule` (see
    `Rule`) chooses among `steps` values of alpha on the share `validation` of the training images. `refit` fits closed heads
    anew at every alpha, `norms` measures BatchNorm's statistics again (see `Scorer`). `orders` sequences of tasks are tried.
    `interpolate=False` takes alpha 1 everywhere: plain fine-tuning.
    """

    mode: Mode = "joint"
    mixing: Mixing = "scalar"
    rule: str = "mean"
    steps: int = 11
    trials: int = 40
    naive: bool = False
    refit: bool = False
    norms: Norms = "kept"
    orders: int = 1
    validation: float = 0.2
    interpolate: bool = True

    def __post_init__(self) -> None:
        Rule.parse(self.rule)
        alphas(self.steps)
        for name, kind in {"mode": Mode, "mixing": Mixing, "norms": Norms}.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise TrainingError(f"{name} is {value!r}; expected one of {', '.join(get_args(kind))}.")
        if self.orders < 1 or self.trials < 1 or not 0 < self.validation < 1:
            raise TrainingError("orders and trials count from 1, validation is a share between 0 and 1.")
        if self.naive and self.refit:
            raise TrainingError("naive keeps the fine-tuned head at every alpha, refit fits another. Give one of them.")


@dataclass(frozen=True)
class Order:
    """A sequence of tasks, the alpha chosen after each, and the last point."""

    tasks: tuple[str, ...]
    alphas: tuple[float, ...]
    point: Point


@dataclass(frozen=True)
class Painting:
    """Result of PAINT. `base` is the unpatched model, `curve` all mixtures that were tried, `chosen` one of them or the base.

    `distance` is equation 1 on the curve; `cka` (of features of held-out images) and `cosine` (of weights) compare the base
    with the mixture of most change. `patch` holds the whole change at the chosen strength, and a head for all patched tasks.
    """

    settings: PaintSettings
    base: Point
    curve: tuple[Point, ...]
    chosen: Point
    patch: Patch
    distance: float
    cka: float
    cosine: float
    orders: tuple[Order, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        figures = {"distance_to_optimal": self.distance, "cka": self.cka, "weight_cosine": self.cosine}
        points = {"base": self.base.as_dict(), "curve": [one.as_dict() for one in self.curve]}
        orders = [{**asdict(one), "point": one.point.as_dict()} for one in self.orders]
        settings = asdict(self.settings)
        return {"settings": settings, **points, "chosen": self.chosen.as_dict(), **figures, "orders": orders}


def paint(
    backbone: Backbone,
    data: Task | Sequence[Task],
    supported: Task | Sequence[Task],
    *,
    method: Paint | None = None,
    heads: HeadMaker | None = None,
    progress: bool = False,
    exploration: PaintSettings | None = None,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> Painting:
    """Patch a backbone on tasks while it goes on supporting others.

    `heads` makes a head of class names (see `methods.vocabulary`); without it the vocabulary is closed. `settings` are those
    of `fit`; `exploration` says how the trade-off is explored. `checkpoint` names a folder that keeps every fine-tuning, whole
    or begun, so that an interrupted run goes on; remove it afterwards. Raises `TrainingError` for settings, `DataError` for
    tasks that cannot be held out from or share a name, and `CheckpointMismatchError` for the folder of another run.
    """
    given, kept = ([one] if isinstance(one, Task) else list(one) for one in (data, supported))
    chosen = exploration or PaintSettings()
    place = None if checkpoint is None else Path(checkpoint)
    painter = Painter(backbone, given, kept, method or Paint(), heads, chosen, progress, settings, place)
    painting: Painting = getattr(painter, chosen.mode)()
    backbone.verify_tensors()
    return painting


@dataclass
class Painter:
    """One run of `paint`."""

    backbone: Backbone
    data: Sequence[Task]
    kept: Sequence[Task]
    method: Paint
    heads: HeadMaker | None
    exploration: PaintSettings
    progress: bool
    settings: dict[str, Any]
    checkpoint: Path | None
    trained: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        given, exploration, chosen = (*self.data, *self.kept), self.exploration, check_settings(self.settings)
        if not self.data or not self.kept:
            raise DataError("PAINT needs a task to patch and one to support.")
        for one in given:
            check_classification(one, "paint")
        names = [one.task.name for one in given]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two tasks are named {sorted(twice)[0]!r}. Load one of them with another name.")
        preprocessing = chosen.seen(self.backbone.preprocessing, Classification.name)
        self.backbone.check_image_size(preprocessing.image_size)
        self.scorer = Scorer(self.backbone, preprocessing, exploration.refit, exploration.norms, chosen.seed)
        self.seed, self.rule, self.grid = chosen.seed, Rule.parse(exploration.rule), alphas(exploration.steps)
        self.patched = [self._scored(one, "patched") for one in self.data]
        self.supported = [self._scored(one, "supported") for one in self.kept]
        self.tasks = [*self.patched, *self.supported]

    def _scored(self, data: Task, role: Role) -> ScoredTask:
        held = data.with_validation(self.exploration.validation, self.seed)
        return ScoredTask(held, role, self.heads(held.classes) if self.heads is not None else self._head(held, role))

    def _head(self, data: Task, role: Role) -> nn.Module:
        """The base's own rows for a supported task whose classes it has, else a probe of its features."""
        own = self.backbone.chain.head
        rows = own_classes(self.backbone, data.classes) if role == "supported" and isinstance(own, nn.Linear) else None
        if rows is None:
            return self.scorer.probe(data)
        head = LinearHead(own.in_features, len(rows)).to(self.backbone.device)  # type: ignore[arg-type]
        with torch.no_grad():
            head.weight.copy_(own.weight[rows])  # type: ignore[index]
            head.bias.copy_(own.bias[rows] if own.bias is not None else torch.zeros(len(rows)))  # type: ignore[index]
        return head.eval().requires_grad_(False)

    # fine-tuning --------------------------------------------------------------------------------------------

    def fine_tune(self, tasks: Sequence[ScoredTask], before: Patch | None = None) -> Tuned:
        """A patch of these tasks, from the base or another patch on, and the tasks with heads, trained along if `naive`."""
        head = None if self.exploration.naive else join_heads([task.head for task in tasks])
        body = {}
        if before is not None:
            frozen = {name: tensor for segment in self.backbone.chain for name, tensor in segment.named_tensors()}
            changes = change_of(self.backbone, before)
            body = {name: frozen[name].detach().cpu() + delta for name, delta in changes.items()}
        files: dict[str, Any] = {}
        if self.checkpoint is not None:
            self.trained += 1
            make_folder(self.checkpoint, "checkpoint")
            file = self.checkpoint / f"{self.trained}.safetensors"
            files = {"out": file, "reuse": True, "checkpoint": file.with_suffix(".training")}
        data, method = join_tasks([task.data for task in tasks]), replace(self.method, start=Start(head, body))
        patch = fit(self.backbone, data, method, progress=self.progress, **files, **self.settings)
        if not self.exploration.naive:
            return patch, list(tasks)
        trained = patch.head.build()
        trained.load_state_dict(patch.head_tensors)
        heads = split_head(trained.to(self.backbone.device), [len(task.data.classes) for task in tasks])
        return patch, [replace(task, head=one) for task, one in zip(tasks, heads, strict=True)]

    # mixing -------------------------------------------------------------------------------------------------

    def sweep(
        self, patches: Sequence[Patch], mixtures: Sequence[Sequence[float]], tasks: Sequence[ScoredTask]
    ) -> list[Point]:
        points = []
        bar = Progress("paint") if self.progress else quiet_progress()
        with bar, bar.task("mixtures", len(mixtures)) as advance:
            for weights in mixtures:
                points.append(self.scorer.point(self.scorer.mixed(patches, weights), tasks, weights))
                advance(1)
        return points

    def joint(self) -> Painting:
        return self._mix([self.fine_tune(self.patched)])

    def parallel(self) -> Painting:
        return self._mix([self.fine_tune([task]) for task in self.patched], self.exploration.mixing)

    def _mix(self, results: Sequence[Tuned], mixing: Mixing = "scalar") -> Painting:
        """Choose among mixtures of fine-tuned patches."""
        patches, tuned = [patch for patch, _ in results], [task for _, tasks in results for task in tasks]
        tasks, count = [*tuned, *self.supported], len(patches)
        base = self._base(tasks)
        curve = self.sweep(patches, [(alpha / count,) * count for alpha in self.grid], tasks)
        farthest = curve[-1]
        if mixing == "exhaustive":
            if count > MAX_EXHAUSTIVE:
                raise TrainingError(f"{count} tasks are too many for a grid; at most {MAX_EXHAUSTIVE}. Use search.")
            curve += self.sweep(patches, list(itertools.product(self.grid, repeat=count)), tasks)
        elif mixing == "search":
            curve += self._search(patches, tasks, base, self.rule.choose(curve, base))
        plain = self.exploration.mode == "joint" and not self.exploration.interpolate
        chosen = farthest if plain else self.rule.choose(curve, base)
        return self._result(patches, tuned, base, curve, chosen, farthest.weights)

    def sequential(self) -> Painting:
        """The tasks one after another, in several orders; the first order's patch is kept."""
        runs = []
        for number in range(self.exploration.orders):
            places = np.random.default_rng(self.seed + number).permutation(len(self.patched))
            runs.append(self._one_after_another([self.patched[place] for place in places]))
        return replace(runs[0][0], orders=tuple(order for _, order in runs))

    def _one_after_another(self, tasks: Sequence[ScoredTask]) -> tuple[Painting, Order]:
        seen: list[ScoredTask] = []
        before: Patch | None = None
        taken = []
        for task in tasks:
            patch, tuned = self.fine_tune([task], before)
            seen += tuned
            patches = [patch] if before is None else [before, patch]
            mixtures = [(alpha,) if before is None else (1 - alpha, alpha) for alpha in self.grid]
            curve = self.sweep(patches, mixtures[0 if self.exploration.interpolate else -1 :], [*seen, *self.supported])
            chosen = self.rule.choose(curve[1:], curve[0])  # validation images of tasks seen so far only
            taken.append(chosen.weights[-1])
            before = self.scorer.mixed(patches, chosen.weights)
        base = self._base([*seen, *self.supported])
        order = Order(tuple(task.name for task in tasks), tuple(taken), chosen)
        return self._result(patches, seen, base, curve, chosen, curve[-1].weights), order

    def _search(self, patches: Sequence[Patch], tasks: Sequence[ScoredTask], base: Point, start: Point) -> list[Point]:
        """Points that a tree-structured Parzen estimator tries, from the best equal weights on."""
        optuna = require("optuna", "search", "A search over all alphas")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        names = [f"alpha_{number}" for number in range(len(patches))]
        study.enqueue_trial(dict(zip(names, _weights(start, patches), strict=True)))
        points: list[Point] = []

        def objective(trial: Any) -> float:
            weights = tuple(trial.suggest_float(name, 0, 1) for name in names)
            points.extend(self.sweep(patches, [weights], tasks))
            score = self.rule.score(points[-1], base)
            return score if math.isfinite(score) else points[-1].mean("supported", "validation") - 1

        study.optimize(objective, n_trials=self.exploration.trials)
        return points

    # results ------------------------------------------------------------------------------------------------

    def _base(self, tasks: Sequence[ScoredTask]) -> Point:
        """The base under the heads it had before any fine-tuning."""
        own = {task.name: task for task in self.tasks}
        return self.scorer.base([own[task.name] for task in tasks])

    def _result(
        self,
        patches: Sequence[Patch],
        tuned: Sequence[ScoredTask],
        base: Point,
        curve: Sequence[Point],
        chosen: Point,
        most: Sequence[float],
    ) -> Painting:
        weights = _weights(chosen, patches)
        patch, farthest = self.scorer.mixed(patches, weights), self.scorer.mixed(patches, most)
        if self.exploration.norms != "kept":
            measured = self.tasks if self.exploration.norms == "shared" else self.patched[:1]
            patch = self.scorer.with_statistics(patch, [task.data for task in measured])
        task = joint_task([task.data.task for task in tuned])
        patch = patch.with_head(join_heads([task.head for task in tuned]), task).with_metrics(
            alpha=list(weights),
            test_top1=chosen.mean("patched"),
            base_test_top1=base.mean("patched"),
            supported_top1=chosen.mean("supported"),
            base_supported_top1=base.mean("supported"),
        )
        images = join_splits([cast(Split, task.data.validation) for task in self.tasks])
        after = self.scorer.features(images, self.backbone.patched(farthest))
        cka, cosine = linear_cka(self.scorer.features(images), after), weight_cosine(self.backbone, farthest)
        distance = distance_to_optimal([base, *curve])
        return Painting(self.exploration, base, tuple(curve), chosen, patch, distance, cka, cosine)


def _weights(point: Point, patches: Sequence[Patch]) -> tuple[float, ...]:
    """The weights of a point, one a patch: the base's are 0."""
    return point.weights if len(point.weights) == len(patches) else (0.0,) * len(patches)


def join_heads(heads: Sequence[nn.Module]) -> nn.Module:
    """Heads of one kind as one over all their classes."""
    if len(heads) == 1:
        return heads[0]
    states = [head.state_dict() for head in heads]
    return _head_like(heads[0], {name: torch.cat([state[name] for state in states]) for name in states[0]})


def split_head(head: nn.Module, outputs: Sequence[int]) -> Iterator[nn.Module]:
    """The parts of a joined head."""
    pieces = {name: tensor.split(list(outputs)) for name, tensor in head.state_dict().items()}
    for number in range(len(outputs)):
        yield _head_like(head, {name: parts[number] for name, parts in pieces.items()})


def _head_like(head: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A head of the same kind with other tensors, a row a class."""
    rows = next(iter(state.values()))
    made = cast(HeadRecord, head.record).model_copy(update={"outputs": len(rows)}).build()
    made.load_state_dict(state)
    return made.to(rows.device).eval().requires_grad_(False)

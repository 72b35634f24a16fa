"""PAINT from start to end: heads, fine-tuning, mixing with the base, and the choice of a mixture on held-out images.

    joint        one fine-tuning on all tasks' images together            theta = W + alpha delta
    sequential   one after another, each from the mixture chosen before   theta = (1 - alpha) theta_before + alpha theta_new
    parallel     one fine-tuning a task, mixed at the end                  theta = W + sum_i alpha_i delta_i

Ilharco et al. (NeurIPS 2022), section 2. Every mixture re-uses stored changes: nothing is trained again. With a closed
vocabulary a supported task is answered by the base's own classifier where it has its classes, else, like a patched task, by a
linear probe on the base's features; alpha 0 is then the linear probe itself. `naive` trains the head along, as the baseline
of Δ-Networks' tables does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.merging import change_of
from modelpatch.data.splits import Split, join_splits
from modelpatch.data.task import Task, check_classification, join_tasks, joint_task
from modelpatch.errors import DataError, MissingExtraError, TrainingError
from modelpatch.heads.base import HeadRecord
from modelpatch.heads.cosine import CosineHead
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.keeping import Keeper
from modelpatch.methods.paint import Paint, Start
from modelpatch.patch.contents import Patch
from modelpatch.recipes.scoring import Norms, ScoredTask, Scorer, mixed, with_statistics
from modelpatch.recipes.tradeoff import Point, Role, Rule, alphas, distance_to_optimal, linear_cka, weight_cosine
from modelpatch.tasks.classification import Classification
from modelpatch.train.evaluation import own_classes
from modelpatch.train.fitting import fit
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import check_settings

Mode = Literal["joint", "sequential", "parallel"]
Mixing = Literal["scalar", "search", "exhaustive"]
MAX_EXHAUSTIVE = 3
HeadMaker = Callable[[Sequence[str]], nn.Module]  # class names to a head that needs no training


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
        """Raises `TrainingError` for values that make no sense."""
        Rule.parse(self.rule)
        alphas(self.steps)
        known = {"mode": Mode, "mixing": Mixing, "norms": Norms}
        for name, kind in known.items():
            if getattr(self, name) not in kind.__args__:  # type: ignore[attr-defined]
                raise TrainingError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(kind.__args__)}.")  # type: ignore[attr-defined]
        if self.orders < 1 or self.trials < 1 or not 0 < self.validation < 1:
            raise TrainingError("orders and trials count from 1, validation is a share between 0 and 1.")
        if self.naive and self.refit:
            raise TrainingError(
                "naive keeps the fine-tuned head at every alpha, refit fits a new one. Give one of them."
            )


@dataclass(frozen=True)
class Order:
    """A sequence of tasks: the alpha chosen after each, and the last point with and without interpolation."""

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
        """Plain values for JSON."""
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
    painter = Painter(backbone, given, kept, method or Paint(), heads, chosen, progress, settings, checkpoint)
    painting: Painting = getattr(painter, chosen.mode)()
    backbone.verify()
    return painting


class Painter:
    """One run of `paint`, and what its baselines share with it."""

    def __init__(
        self,
        backbone: Backbone,
        data: Sequence[Task],
        supported: Sequence[Task],
        method: Paint,
        heads: HeadMaker | None,
        exploration: PaintSettings,
        progress: bool,
        settings: dict[str, Any],
        checkpoint: str | Path | None = None,
    ) -> None:
        if not data or not supported:
            raise DataError("PAINT needs a task to patch and one to support.")
        for one in (*data, *supported):
            check_classification(one, "paint")
        names = [one.task.name for one in (*data, *supported)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two tasks are named {sorted(twice)[0]!r}. Load one of them with another name.")
        self.backbone, self.method, self.heads, self.exploration = backbone, method, heads, exploration
        self.settings, self.progress = settings, progress
        self.checkpoint, self.trained = Path(checkpoint) if checkpoint else None, 0
        chosen = check_settings(settings)
        self.seed = chosen.seed
        preprocessing = chosen.seen(backbone.preprocessing, Classification.name)
        backbone.check_image_size(preprocessing.image_size)
        self.scorer = Scorer(backbone, preprocessing, exploration.refit, exploration.norms, chosen.seed)
        self.rule, self.grid = Rule.parse(exploration.rule), alphas(exploration.steps)
        self.patched = [self._scored(one, "patched") for one in data]
        self.supported = [self._scored(one, "supported") for one in supported]
        self.tasks = [*self.patched, *self.supported]

    def _scored(self, data: Task, role: Role) -> ScoredTask:
        held = data.with_validation(self.exploration.validation, self.seed)
        return ScoredTask(held, role, self._head(held, role))

    def _head(self, data: Task, role: Role) -> nn.Module:
        if self.heads is not None:
            return self.heads(data.classes)
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

    def fine_tune(
        self, tasks: Sequence[ScoredTask], body: dict[str, Tensor] | None = None, keeper: Keeper | None = None
    ) -> tuple[Patch, list[ScoredTask]]:
        """A patch of these tasks and the tasks with the heads they have now: the same ones, unless trained along (`naive`).

        A keeper may hold what it has seen so far, which no checkpoint has: its fine-tuning is trained as a whole.
        """
        data = join_tasks([task.data for task in tasks])
        head = None if self.exploration.naive else join_heads([task.head for task in tasks])
        method = replace(self.method, start=Start(head=head, body=body or {}, keeper=keeper))
        patch = fit(self.backbone, data, method, progress=self.progress, **self._place(keeper), **self.settings)
        if not self.exploration.naive:
            return patch, list(tasks)
        trained = patch.head.build()
        trained.load_state_dict({n.removeprefix("head."): t for n, t in patch.tensors.items() if n.startswith("head.")})
        heads = split_head(trained.eval().requires_grad_(False), [len(task.data.classes) for task in tasks])
        return patch, [replace(task, head=one.to(self.backbone.device)) for task, one in zip(tasks, heads, strict=True)]

    def _place(self, keeper: Keeper | None) -> dict[str, Any]:
        """Return the options of `fit` that name the next fine-tuning's file and training state."""
        if self.checkpoint is None or keeper is not None:
            return {}
        self.trained += 1
        file = self.checkpoint / f"{self.trained}.safetensors"
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        return {"out": file, "reuse": True, "checkpoint": file.with_suffix(".training")}

    def body_of(self, patch: Patch) -> dict[str, Tensor]:
        """The patched weights by the backbone's names."""
        frozen = {name: tensor for segment in self.backbone.chain for name, tensor in segment.named_tensors()}
        return {name: frozen[name].detach().cpu() + delta for name, delta in change_of(self.backbone, patch).items()}

    # mixing -------------------------------------------------------------------------------------------------

    def sweep(
        self, patches: Sequence[Patch], mixtures: Sequence[Sequence[float]], tasks: Sequence[ScoredTask]
    ) -> list[Point]:
        """The points of several mixtures of patches."""
        points = []
        bar = Progress("paint") if self.progress else quiet_progress()
        with bar, bar.task("mixtures", len(mixtures)) as advance:
            for weights in mixtures:
                points.append(self.scorer.point(mixed(self.backbone, patches, weights), tasks, weights))
                advance(1)
        return points

    def joint(self) -> Painting:
        """One fine-tuning on all tasks together."""
        return self._mix([self.fine_tune(self.patched)])

    def parallel(self) -> Painting:
        """One fine-tuning a task, and a mixture of them all."""
        return self._mix([self.fine_tune([task]) for task in self.patched], self.exploration.mixing)

    def _mix(self, results: Sequence[tuple[Patch, list[ScoredTask]]], mixing: Mixing = "scalar") -> Painting:
        """Choose among mixtures of fine-tuned patches."""
        patches, tuned = [patch for patch, _ in results], [task for _, tasks in results for task in tasks]
        tasks = [*tuned, *self.supported]
        base, count = self.base(tasks), len(patches)
        curve = self.sweep(patches, [(alpha / count,) * count for alpha in self.grid], tasks)
        farthest = curve[-1]
        if mixing == "exhaustive":
            if count > MAX_EXHAUSTIVE:
                raise TrainingError(
                    f"{count} tasks are too many for a grid of all alphas; at most {MAX_EXHAUSTIVE}. Use search."
                )
            curve += self.sweep(patches, list(itertools.product(self.grid, repeat=count)), tasks)
        elif mixing == "search":
            curve += self._search(patches, tasks, base, self.rule.choose(curve, base))
        plain = self.exploration.mode == "joint" and not self.exploration.interpolate
        chosen = farthest if plain else self.rule.choose(curve, base)
        return self._result(patches, tuned, base, curve, chosen, farthest.weights)

    def sequential(self) -> Painting:
        """The tasks one after another, in several orders; the first order's patch is kept."""
        outcomes = []
        for number in range(self.exploration.orders):
            places = np.random.default_rng(self.seed + number).permutation(len(self.patched))
            outcomes.append(self._one_after_another([self.patched[place] for place in places]))
        first = outcomes[0][0]
        return replace(first, orders=tuple(order for _, order in outcomes))

    def _one_after_another(self, tasks: Sequence[ScoredTask]) -> tuple[Painting, Order]:
        seen: list[ScoredTask] = []
        before: Patch | None = None
        taken = []
        for task in tasks:
            patch, tuned = self.fine_tune([task], body=None if before is None else self.body_of(before))
            seen += tuned
            scored = [*seen, *self.supported]
            patches = [patch] if before is None else [before, patch]
            mixtures = [(alpha,) if before is None else (1 - alpha, alpha) for alpha in self.grid]
            if not self.exploration.interpolate:
                mixtures = mixtures[-1:]
            curve = self.sweep(patches, mixtures, scored)
            chosen = self.rule.choose(curve[1:], curve[0])  # validation images of tasks seen so far only
            taken.append(chosen.weights[-1])
            before = mixed(self.backbone, patches, chosen.weights)
        base = self.base([*seen, *self.supported])
        painting = self._result(patches, seen, base, curve, chosen, curve[-1].weights)
        return painting, Order(tuple(task.name for task in tasks), tuple(taken), chosen)

    def _search(self, patches: Sequence[Patch], tasks: Sequence[ScoredTask], base: Point, start: Point) -> list[Point]:
        """Points that a tree-structured Parzen estimator tries, from the best equal weights on."""
        try:
            import optuna
        except ImportError:
            raise MissingExtraError("optuna", "search", "A search over all alphas") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        names = [f"alpha_{number}" for number in range(len(patches))]
        first = start.weights if len(start.weights) == len(names) else (0.0,) * len(names)
        study.enqueue_trial(dict(zip(names, first, strict=True)))
        points: list[Point] = []

        def objective(trial: Any) -> float:
            weights = tuple(trial.suggest_float(name, 0, 1) for name in names)
            points.extend(self.sweep(patches, [weights], tasks))
            score = self.rule.score(points[-1], base)
            return score if math.isfinite(score) else points[-1].mean("supported", "validation") - 1

        study.optimize(objective, n_trials=self.exploration.trials)
        return points

    def base(self, tasks: Sequence[ScoredTask] = ()) -> Point:
        """The base under the heads it had before any fine-tuning."""
        own = {task.name: task for task in self.tasks}
        chosen = [own[task.name] for task in tasks or self.tasks]
        return self.scorer.point(self._empty(chosen[0]), chosen, (0.0,), untouched=True)

    def _empty(self, task: ScoredTask) -> Patch:
        record = cast(HeadRecord, task.head.record)
        tensors = {f"head.{name}": tensor.cpu() for name, tensor in task.head.state_dict().items()}
        return Patch.of(
            self.backbone, task.data, record, tensors, preprocessing=self.scorer.preprocessing, method=Paint.name
        )

    # results ------------------------------------------------------------------------------------------------

    def _result(
        self,
        patches: Sequence[Patch],
        tuned: Sequence[ScoredTask],
        base: Point,
        curve: Sequence[Point],
        chosen: Point,
        most: Sequence[float],
    ) -> Painting:
        weights = chosen.weights if len(chosen.weights) == len(patches) else (0.0,) * len(patches)
        patch = mixed(self.backbone, patches, weights)
        farthest = mixed(self.backbone, patches, most)
        if self.exploration.norms != "kept":
            model = self.backbone.patched(patch)
            measured = self.tasks if self.exploration.norms == "shared" else self.patched[:1]
            self.scorer.measure_statistics(model, [task.data for task in measured])
            patch = with_statistics(self.backbone, patch, model)
        patch = with_head(patch, tuned).with_metrics(
            alpha=list(weights),
            test_top1=chosen.mean("patched"),
            base_test_top1=base.mean("patched"),
            supported_top1=chosen.mean("supported"),
            base_supported_top1=base.mean("supported"),
        )
        images = join_splits([cast(Split, task.data.validation) for task in self.tasks])
        before, after = self.scorer.base_features(images), self.scorer.features(self.backbone.patched(farthest), images)
        cka, cosine = linear_cka(before, after), weight_cosine(self.backbone, farthest)
        distance = distance_to_optimal([base, *curve])
        return Painting(self.exploration, base, tuple(curve), chosen, patch, distance, cka, cosine)


# heads together ---------------------------------------------------------------------------------------------


def join_heads(heads: Sequence[nn.Module]) -> nn.Module:
    """Heads of one kind as one over all their classes."""
    if len(heads) == 1:
        return heads[0]
    records = [cast(HeadRecord, head.record) for head in heads]
    joined = records[0].model_copy(update={"outputs": sum(record.outputs for record in records)}).build()
    states = [head.state_dict() for head in heads]
    joined.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return joined.eval().requires_grad_(False)


def split_head(head: nn.Module, outputs: Sequence[int]) -> Iterator[nn.Module]:
    """The parts of a joined head."""
    pieces = {name: tensor.split(list(outputs)) for name, tensor in head.state_dict().items()}
    for number, count in enumerate(outputs):
        part = cast(HeadRecord, head.record).model_copy(update={"outputs": count}).build()
        part.load_state_dict({name: parts[number] for name, parts in pieces.items()})
        yield part.eval().requires_grad_(False)


def with_head(patch: Patch, tasks: Sequence[ScoredTask]) -> Patch:
    """The patch with a head for all these tasks."""
    head = join_heads([task.head for task in tasks])
    assert isinstance(head, LinearHead | CosineHead)
    body = {name: tensor for name, tensor in patch.tensors.items() if not name.startswith("head.")}
    own = {f"head.{name}": tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
    task = joint_task([task.data.task for task in tasks])
    return replace(patch, task=task, head=head.record, tensors={**body, **own}, int8=patch.int8 & body.keys())

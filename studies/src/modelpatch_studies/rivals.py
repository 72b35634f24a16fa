"""PAINT's curve beside the ways that fix the trade-off while training: one task patched, others supported.

    paint            alpha from 0 to 1 over one fine-tuning
    early-stopping   the weights at several moments of the same fine-tuning
    ema              the exponential moving average of the weights in the same fine-tuning
    l2               strength / 2 |theta - theta_0|²                                Xuhong et al., L2-SP, 2018
    ewc              strength / 2 sum_i F_i (theta_i - theta_0,i)², F the Fisher    Kirkpatrick et al., 2017, equation 3
                     information of the supported tasks at theta_0
    lwf              strength KL(base's answers for supported tasks || the model's) Li and Hoiem, 2016, section 3
    mix              strength cross entropy on images of the supported tasks        mixing objectives; replay
    lr               several learning rates

Ilharco et al. (NeurIPS 2022), figure 5: the alpha-curve should match or dominate all of them. Its trade-off is chosen after
the training; `l2`, `ewc`, `lwf`, `mix` and `lr` train once for every point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch import Backbone, PatchedModel, Task, paint
from modelpatch.errors import TrainingError
from modelpatch.methods import L2, Hook, Keeper, LwF, Method, Paint, with_loss
from modelpatch.recipes import Accuracy, Painting, PaintSettings, Point
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import names
from modelpatch_studies.painting import MEAN, MOBILENET, PAPER, PATCHED, SUPPORTED, vocabulary
from modelpatch_studies.recipe import Figures, Job, Recipe
from modelpatch_studies.scoring import Reader, head_input

BASELINES = ("early-stopping", "ema", "l2", "ewc", "lwf", "mix", "lr")
STRENGTHS = {"l2": (1e-2, 1e-1, 1.0), "ewc": (1.0, 1e2, 1e4), "lwf": (0.1, 1.0, 10.0), "mix": (0.1, 1.0, 10.0)}
RATES = (0.01, 0.1, 3.0)  # times the method's learning rate
FISHER_IMAGES = 256  # of every supported task
Labelled = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # normalised images (B, C, H, W) and their classes (B,)


@dataclass
class Recorder(Hook):
    """Keeps the weights after each of `moments` even shares of all steps but the last, and their moving average."""

    moments: int = 8
    decay: float = 0.99
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.snapshots, self.average = [], _copy(model)

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        if step:
            for name, tensor in model.tensors().items():
                self.average[name].lerp_(tensor.cpu().float(), 1 - self.decay)
        if step in {round(total * number / self.moments) for number in range(1, self.moments)}:
            self.snapshots.append(_copy(model))


def _copy(model: PatchedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float().clone() for name, tensor in model.tensors().items()}


@dataclass
class EWC(Keeper):
    """Pulls back those weights that the supported tasks depend on: `heads` answer them, `supported` yields their images."""

    strength: float
    heads: Sequence[nn.Module]
    supported: Sequence[Labelled]
    start: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in _body(model)}
        self.fisher = {name: torch.zeros_like(value) for name, value in self.start.items()}
        seen = 0
        for head, labelled in zip(self.heads, self.supported, strict=True):
            for images, labels in labelled():
                for image, label in zip(images.split(1), labels.split(1), strict=True):
                    loss = F.cross_entropy(head(head_input(model, image)), label.to(image.device))
                    named = dict(_body(model))
                    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                    for name, gradient in zip(named, gradients, strict=True):
                        self.fisher[name] += 0 if gradient is None else gradient.square()
                    seen += 1
        self.fisher = {name: value / max(seen, 1) for name, value in self.fisher.items()}

    def penalty(self, model: PatchedModel) -> Tensor | float:
        parts = ((self.fisher[name] * (p - self.start[name]).square()).sum() for name, p in _body(model))
        return self.strength / 2 * sum(parts)


def _body(model: PatchedModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.trainable() if not name.startswith("head."))


@dataclass
class Mix(Keeper):
    """Trains on images of the supported tasks along."""

    strength: float
    heads: Sequence[nn.Module]
    supported: Sequence[Labelled]
    streams: list[Iterator[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.streams = [itertools.chain.from_iterable(iter(one, None)) for one in self.supported]

    def penalty(self, model: PatchedModel) -> Tensor | float:
        total: Tensor | float = 0.0
        for head, stream in zip(self.heads, self.streams, strict=True):
            images, labels = next(stream)
            total = total + F.cross_entropy(head(head_input(model, images)), labels.to(images.device))
        return self.strength * total


def frontier(
    backbone: Backbone,
    data: Task,
    supported: Sequence[Task],
    heads: Callable[[Sequence[str]], nn.Module],
    baselines: Sequence[str] = BASELINES,
    *,
    method: Paint | None = None,
    exploration: PaintSettings | None = None,
    moments: int = 8,
    decay: float = 0.99,
    **settings: Any,
) -> dict[str, tuple[Point, ...]]:
    """PAINT's curve and those of `baselines` with the same heads, images and steps. Raises `TrainingError`.

    `heads` makes the head of any class names, which nothing trains; the rest are as for `paint`.
    """
    if unknown := sorted(set(baselines) - set(BASELINES)):
        raise TrainingError(f"there is no baseline {unknown[0]!r}. Expected some of: {', '.join(BASELINES)}.")
    method, exploration = method or Paint(), exploration or PaintSettings()
    recorder, seed = Recorder(moments, decay), settings.get("seed", 0)
    fine_tune = partial(paint, backbone, data, supported, heads=heads, **settings)
    painting = fine_tune(method=cast(Paint, with_loss(method, recorder)), exploration=exploration)
    reader = Reader(backbone, painting.patch.preprocessing, seed)
    curves = {"paint": painting.curve}
    if "early-stopping" in baselines:
        moved = [*recorder.snapshots, dict(painting.patch.tensors)]
        curves["early-stopping"] = tuple(
            _measured(reader, painting, number / moments, tensors, [data, *supported], heads, exploration.validation)
            for number, tensors in enumerate(moved, 1)
        )
    if "ema" in baselines:
        tensors = recorder.average
        point = _measured(reader, painting, decay, tensors, [data, *supported], heads, exploration.validation)
        curves["ema"] = (point,)
    own = [heads(one.classes) for one in supported]
    held = [one.with_validation(exploration.validation, seed).train for one in supported]
    batch = settings.get("batch_size", 32)
    images: list[Labelled] = [partial(reader.images, split, batch, shuffle=True) for split in held]
    some: list[Labelled] = [partial(_first, one, -(-FISHER_IMAGES // batch)) for one in images]
    keepers: dict[str, Callable[[float], Keeper]] = {
        "l2": L2,
        "ewc": lambda strength: EWC(strength, own, some),
        "lwf": lambda strength: LwF(strength, own),
        "mix": lambda strength: Mix(strength, own, images),
    }
    trained: dict[str, list[tuple[float, Method]]]
    trained = {name: [(s, with_loss(method, keepers[name](s))) for s in STRENGTHS[name]] for name in keepers}
    trained["lr"] = [(method.lr * factor, replace(method, lr=method.lr * factor)) for factor in RATES]
    ends = replace(exploration, steps=2)
    for name in (one for one in baselines if one in trained):
        points = [(place, fine_tune(method=cast(Paint, one), exploration=ends)) for place, one in trained[name]]
        curves[name] = tuple(replace(one.curve[-1], weights=(place,)) for place, one in points)
    return curves


def _first(labelled: Labelled, batches: int) -> Iterable[tuple[Tensor, Tensor]]:
    return itertools.islice(labelled(), batches)


def _measured(
    reader: Reader,
    painting: Painting,
    place: float,
    tensors: dict[str, Tensor],
    tasks: Sequence[Task],
    heads: Callable[[Sequence[str]], nn.Module],
    validation: float,
) -> Point:
    """The point of a patch with other tensors, the first of the tasks being the patched one."""
    model = reader.backbone.patched(replace(painting.patch, tensors=tensors, strength=1.0))
    found = {}
    for number, data in enumerate(one.with_validation(validation, reader.seed) for one in tasks):
        head, shares = heads(data.classes).cpu(), []
        for split in (data.validation, data.test):
            assert split is not None
            right = head(reader.features(model, split)).argmax(1) == torch.from_numpy(split.labels)
            shares.append(float(right.double().mean()))
        found[data.task.name] = Accuracy("supported" if number else "patched", *shares)
    return Point((place,), found)


def rival_jobs(bench: Workbench) -> Iterator[Job]:
    """Each at the point that held-out images choose; means over the patched tasks."""
    for seed in bench.seeds:
        for row in ("paint", *BASELINES):
            yield Job(row, (SUPPORTED, PATCHED, MEAN), seed, partial(_rival, bench, row, seed))


def _rival(bench: Workbench, row: str, seed: int) -> Figures:
    frontiers = bench.latest("frontiers", seed, lambda: [_frontier(bench, name, seed) for name in names(bench)])
    best = [max(one[row], key=lambda point: point.combined("validation")) for one in frontiers]
    sums = {
        SUPPORTED: sum(point.mean("supported") for point in best),
        PATCHED: sum(point.mean("patched") for point in best),
        MEAN: sum(point.combined() for point in best),
    }
    return {column: 100 * value / len(best) for column, value in sums.items()}


def _frontier(bench: Workbench, name: str, seed: int) -> dict[str, tuple[Point, ...]]:
    data, kept = bench.task(name), bench.task(bench.scale.options["supported"])
    exploration = PaintSettings(steps=bench.scale.options["alphas"])
    options: dict[str, Any] = {"method": bench.method(PATCHED), "exploration": exploration}
    heads = vocabulary(bench).head
    return frontier(bench.backbone(), data, [kept], heads, **options, **bench.settings(data, seed))


RIVALS = Recipe(
    paper="paint",
    table="rivals",
    title="What else trades off",
    section="section 4: figure 5",
    notes="Each at the point that held-out images choose, of the strengths and learning rates in `rivals.py`.",
    scales={"mobilenet": MOBILENET, "paper": replace(PAPER, options={**PAPER.options, "heads": "words"})},
    claims=(),
    jobs=rival_jobs,
)

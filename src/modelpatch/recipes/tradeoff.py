"""The trade-off between the tasks a model is patched on and those it must still support, and the choice of a point on it.

    combined(alpha) = (S(alpha) + Q(alpha)) / 2      S mean accuracy of supported, Q of patched tasks
    distance to optimal (PAINT, equation 1) = (max S + max Q) / 2 - max (S + Q) / 2  >= 0

Points are chosen on held-out images, never on test images. Accuracies lie in [0, 1]. Images are decoded once, features
computed once a body, and every task is answered by its own head.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.convert.merging import change_of, merge
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.scale_bias import RecomputeStatistics
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.train.evaluation import MEMORY, harmonic_mean
from modelpatch.train.inputs import run_prefix

Role = Literal["patched", "supported"]
Part = Literal["validation", "test"]
Norms = Literal["kept", "shared", "task"]
BATCH = 64
STATISTICS_IMAGES = 512  # of every task, at most, when BatchNorm's statistics are measured again


@dataclass(frozen=True)
class Accuracy:
    """One task at one point: top-1 on held-out and on test images."""

    role: Role
    validation: float
    test: float


@dataclass(frozen=True)
class Point:
    """A model on the trade-off: the `weights` that mixed it (one alpha for a curve) and every task's accuracy by name."""

    weights: tuple[float, ...]
    tasks: Mapping[str, Accuracy]

    def mean(self, role: Role, split: Part = "test") -> float:
        """The mean accuracy of the patched or supported tasks. NaN where there are none."""
        values = [getattr(accuracy, split) for accuracy in self.tasks.values() if accuracy.role == role]
        return statistics.fmean(values) if values else math.nan

    def combined(self, split: Part = "test") -> float:
        """(mean supported + mean patched) / 2."""
        return (self.mean("supported", split) + self.mean("patched", split)) / 2

    def as_dict(self) -> dict[str, Any]:
        pairs = itertools.product(get_args(Role), get_args(Part))
        means = {f"{role}_{part}": self.mean(role, part) for role, part in pairs}
        tasks = {name: asdict(one) for name, one in self.tasks.items()}
        return {"weights": list(self.weights), **means, "tasks": tasks}


@dataclass(frozen=True)
class Rule:
    """Rule to choose a point: the highest `mean` or `harmonic` mean of supported and patched accuracy, or with `drop` the
    highest patched accuracy among points whose supported accuracy is at most `points` percent below the base's."""

    kind: Literal["mean", "harmonic", "drop"] = "mean"
    points: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`mean`, `harmonic` or `drop=POINTS`. Raises `TrainingError`."""
        kind, _, points = text.partition("=")
        try:
            if kind in ("mean", "harmonic") and not points:
                return cls(kind)  # type: ignore[arg-type]
            if kind == "drop" and float(points) >= 0:
                return cls("drop", float(points))
        except ValueError:
            pass
        raise TrainingError(f"{text!r} is no rule. Expected mean, harmonic, or drop=POINTS such as drop=1.")

    def __str__(self) -> str:
        return f"drop={self.points:g}" if self.kind == "drop" else self.kind

    def score(self, point: Point, base: Point) -> float:
        """Higher is better; minus infinity for a point that the rule excludes."""
        supported, patched = point.mean("supported", "validation"), point.mean("patched", "validation")
        if self.kind == "mean":
            return point.combined("validation")
        if self.kind == "harmonic":
            return harmonic_mean(supported, patched)
        allowed = base.mean("supported", "validation") - self.points / 100
        return patched if supported >= allowed - 1e-12 else -math.inf

    def choose(self, points: Sequence[Point], base: Point) -> Point:
        """The best of the points; of equal ones the first, so that the smaller alpha wins."""
        return max((base, *points), key=lambda point: self.score(point, base))


def distance_to_optimal(points: Sequence[Point]) -> float:
    """PAINT's equation 1 on test accuracies: what one model loses to the best of two, in [0, 1]."""
    supported, patched = (max(point.mean(role) for point in points) for role in ("supported", "patched"))
    return (supported + patched) / 2 - max(point.combined() for point in points)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """|Yᵀ X|² / (|Xᵀ X| |Yᵀ Y|) of column-centred features X (N, D) and Y (N, E), Frobenius norms; 1 for equal ones.

    Kornblith et al., *Similarity of Neural Network Representations Revisited* (2019), section 3.
    """
    x, y = (one.double().flatten(1) - one.double().flatten(1).mean(0) for one in (first, second))
    return float((y.T @ x).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm()))


def weight_cosine(backbone: Backbone, patch: Patch) -> float:
    """The cosine between the base's and the patched body's parameters, flattened; buffers do not count."""
    changes = change_of(backbone, patch)
    dot = base = other = 0.0
    for segment in backbone.chain:
        for local, parameter in segment.module.named_parameters():
            name = segment.tensor_names[local]
            before = parameter.detach().double().cpu().flatten()
            after = before + changes[name].double().flatten() if name in changes else before
            dot, base, other = dot + float(before @ after), base + float(before @ before), other + float(after @ after)
    return dot / math.sqrt(base * other)


def alphas(count: int) -> list[float]:
    """`count` even values from 0 to 1. Raises `TrainingError` below 2."""
    if count < 2:
        raise TrainingError(f"{count} values of alpha are no sweep; expected at least 2.")
    return [round(float(value), 6) for value in torch.linspace(0, 1, count)]


# measuring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredTask:
    """A task with held-out images and the head that answers it on the base's features."""

    data: Task
    role: Role
    head: nn.Module

    @property
    def name(self) -> str:
        return self.data.task.name


@dataclass
class Scorer:
    """Measures bodies on tasks.

    `refit` fits every linear head anew on each body's own training features (closed vocabularies only). `norms` says what
    BatchNorm's statistics are after weights were mixed: the mixed ones, measured again over all tasks' images together
    (`shared`), or over each task's own (`task`), always in random order.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    refit: bool = False
    norms: Norms = "kept"
    seed: int = 0
    _stores: dict[int, ImageStore] = field(default_factory=dict, init=False)

    def store(self, split: Split) -> ImageStore:
        """The split's images, decoded once."""
        if id(split) not in self._stores:
            self._stores[id(split)] = ImageStore(split, self.preprocessing, MEMORY)
        return self._stores[id(split)]

    @torch.no_grad()
    def features(self, split: Split, model: PatchedModel | None = None) -> Tensor:
        """Features (N, D) of a split's images on the CPU: those of a patched body, or of the frozen base."""
        store, parts = self.store(split), []
        for rows in torch.arange(len(store)).split(BATCH):
            images = store.plain(rows).to(self.backbone.device)
            parts.append(self.backbone.chain(images) if model is None else run_prefix(model, images, model.end))
        return torch.cat([features.cpu() for features in parts])

    def probe(self, data: Task, model: PatchedModel | None = None) -> LinearHead:
        """A linear head on the features of the task's training images."""
        labels = torch.from_numpy(data.train.labels)
        return fit_probe(self.features(data.train, model), labels, len(data.classes)).to(self.backbone.device)

    def base(self, tasks: Sequence[ScoredTask]) -> Point:
        return Point((0.0,), {task.name: self._accuracy(task, task.head) for task in tasks})

    def point(self, patch: Patch, tasks: Sequence[ScoredTask], weights: Sequence[float]) -> Point:
        """Every task's accuracy on the patched body."""
        model = self.backbone.patched(patch)
        if self.norms == "shared":
            self.measure_statistics(model, [task.data for task in tasks])
        accuracies = {}
        for task in tasks:
            if self.norms == "task":
                self.measure_statistics(model, [task.data])
            anew = self.refit and type(task.head) is LinearHead
            accuracies[task.name] = self._accuracy(task, self.probe(task.data, model) if anew else task.head, model)
        return Point(tuple(weights), accuracies)

    def _accuracy(self, task: ScoredTask, head: nn.Module, model: PatchedModel | None = None) -> Accuracy:
        assert task.data.validation is not None
        shares = []
        for split in (task.data.validation, task.data.test):
            with torch.no_grad():
                answers = head(self.features(split, model).to(self.backbone.device)).argmax(1).cpu()
            shares.append(float((answers == self.store(split).labels).double().mean()))
        return Accuracy(task.role, *shares)

    def measure_statistics(self, model: PatchedModel, tasks: Sequence[Task]) -> None:
        """BatchNorm's statistics over training images of all tasks, as many of each, shuffled together (REPAIR's reset)."""
        count = min(STATISTICS_IMAGES, *(len(task.train) for task in tasks))
        generator = np.random.default_rng(self.seed)
        pool = [(task.train, row) for task in tasks for row in generator.permutation(len(task.train))[:count]]
        order = generator.permutation(len(pool))

        def batches() -> Iterator[Tensor]:
            for numbers in torch.from_numpy(order).split(BATCH):
                rows = [pool[number] for number in numbers.tolist()]
                images = [self.store(split).plain(torch.tensor([row])) for split, row in rows]
                yield torch.cat(images).to(self.backbone.device)

        RecomputeStatistics().begin(model, batches)

    def mixed(self, patches: Sequence[Patch], weights: Sequence[float]) -> Patch:
        """W + sum of weights times the patches' changes. One patch keeps its tensors and is only turned."""
        if len(patches) == 1 and 0 <= weights[0] <= 1:
            return patches[0].at_strength(weights[0])
        return merge(self.backbone, patches, weights=weights)

    def with_statistics(self, patch: Patch, tasks: Sequence[Task]) -> Patch:
        """The patch as one of strength 1 that owns BatchNorm's statistics, measured over these tasks."""
        model, chain, owned = self.backbone.patched(patch), self.backbone.chain, {}
        self.measure_statistics(model, tasks)
        buffers = dict(model.named_buffers())
        for place, number in enumerate(model.starts):
            for local, name in chain[number].tensor_names.items():
                if local.endswith(("running_mean", "running_var")):
                    owned[f"replace/{name}"] = buffers[f"parts.{place}.{local}"].detach().cpu().float().clone()
        baked = merge(self.backbone, [patch], weights=[1.0]).tensors
        kept = {name: tensor for name, tensor in baked.items() if f"replace/{name.partition('/')[2]}" not in owned}
        return replace(patch, tensors={**kept, **owned}, strength=1.0, int8=frozenset())


def fit_probe(features: Tensor, labels: Tensor, classes: int, strength: float = 1e-3, steps: int = 100) -> LinearHead:
    """The head (D, K) for features (N, D) and classes (N,) int64; in eval mode, requires no gradients.

        min_W  mean cross entropy(f Wᵀ + b) + strength / 2 |W|²        features divided by their root mean square

    Convex, so that full-batch L-BFGS finds the one answer: no seed, no learning rate.
    """
    features, labels = features.float().flatten(1), labels.to(features.device)
    scale = features.square().mean().sqrt().clamp(min=1e-12)
    scaled = features / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(scaled, weight, bias), labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    head = LinearHead(features.shape[1], classes).to(features.device)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias)
    return head.eval().requires_grad_(False)

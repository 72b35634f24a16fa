"""The trade-off between the tasks a model is patched on and those it must still support, and the choice of a point on it.

    combined(alpha) = (S(alpha) + Q(alpha)) / 2      S mean accuracy of supported, Q of patched tasks
    distance to optimal (PAINT, equation 1) = (max S + max Q) / 2 - max (S + Q) / 2  >= 0

Points are chosen on held-out images, never on test images. Accuracies lie in [0, 1].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.merging import change_of
from modelpatch.errors import TrainingError
from modelpatch.patch.contents import Patch
from modelpatch.train.evaluation import harmonic_mean

Role = Literal["patched", "supported"]


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

    def mean(self, role: Role, split: Literal["validation", "test"] = "test") -> float:
        """The mean accuracy of the patched or supported tasks. NaN where there are none."""
        values = [getattr(accuracy, split) for accuracy in self.tasks.values() if accuracy.role == role]
        return statistics.fmean(values) if values else math.nan

    def combined(self, split: Literal["validation", "test"] = "test") -> float:
        """(mean supported + mean patched) / 2."""
        return (self.mean("supported", split) + self.mean("patched", split)) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        means = {
            f"{role}_{split}": self.mean(role, split)
            for role in ("patched", "supported")
            for split in ("validation", "test")
        }
        return {
            "weights": list(self.weights),
            **means,
            "tasks": {name: asdict(one) for name, one in self.tasks.items()},
        }


@dataclass(frozen=True)
class Rule:
    """Rule to choose a point: the highest `mean` or `harmonic` mean of supported and patched accuracy, or with `drop` the
    highest patched accuracy among points whose supported accuracy is at most `points` percent below the base's."""

    kind: Literal["mean", "harmonic", "drop"] = "mean"
    points: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Rule:
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
            return (supported + patched) / 2
        if self.kind == "harmonic":
            return harmonic_mean(supported, patched)
        allowed = base.mean("supported", "validation") - self.points / 100
        return patched if supported >= allowed - 1e-12 else -math.inf

    def choose(self, points: Sequence[Point], base: Point) -> Point:
        """The best of the points; of equal ones the first, so that the smaller alpha wins."""
        return max((base, *points), key=lambda point: self.score(point, base))


def distance_to_optimal(points: Sequence[Point]) -> float:
    """PAINT's equation 1 on test accuracies: what one model loses to the best of two, in [0, 1]."""
    supported = [point.mean("supported") for point in points]
    patched = [point.mean("patched") for point in points]
    return (max(supported) + max(patched)) / 2 - max(s + q for s, q in zip(supported, patched, strict=True)) / 2


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

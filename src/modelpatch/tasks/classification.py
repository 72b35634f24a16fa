"""Classification: one class an image.

answers   logits (B, K)                      loss      cross entropy
targets   classes (B,) int64,                metrics   top-1, top-5, macro F1, balanced accuracy
          of mixed images shares (B, K)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.tasks.kind import Facts, Kind, Result, TensorMeter, View, register_kind
from modelpatch.tasks.scores import Interval, auroc, mean_of_classes, wilson_interval

Best = list[tuple[int, float]]  # classes with their probabilities, the most probable first


@dataclass(frozen=True)
class Evaluation(Result):
    """Shares in [0, 1]. `confusion[i][j]` counts images of class i that were answered as class j.

    `macro_f1` and `balanced_accuracy` are means of F1 and of recall over the classes that some image has.
    """

    top1: float
    top5: float
    images: int
    per_class: dict[str, float]
    confusion: list[list[int]]
    interval: Interval | None = None

    @property
    def figures(self) -> dict[str, float]:
        macro_f1, balanced = mean_of_classes(self.confusion)
        return {**super().figures, "macro_f1": macro_f1, "balanced_accuracy": balanced}

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Self:
        """From logits (N, K) and labels (N,). Classes without an image have no entry in `per_class`."""
        answers, count = logits.argmax(1), len(classes)
        best = logits.topk(min(5, count), dim=1).indices
        confusion = torch.bincount(labels * count + answers, minlength=count * count).view(count, count)
        totals, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        top1 = float((answers == labels).double().mean())
        return cls(
            top1=top1,
            top5=float((best == labels[:, None]).any(1).double().mean()),
            images=len(labels),
            per_class={name: r / t for name, r, t in zip(classes, right, totals, strict=True) if t},
            confusion=confusion.tolist(),
            interval=wilson_interval(top1, len(labels)),
        )


class ClassMeter(TensorMeter):
    """Collects logits (B, K) and labels (B,)."""

    def result(self) -> Evaluation:
        return Evaluation.of(self.answers, self.targets, self.classes)


def class_auroc(logits: Tensor, labels: Tensor) -> float:
    """The mean area under the ROC curve of each class's probability against all others'."""
    wanted = F.one_hot(labels, logits.shape[1])
    return auroc(logits.float().softmax(1).numpy(), wanted.double().numpy())


@register_kind
class Classification(Kind):
    """One class an image; answers are logits (B, K)."""

    name: ClassVar[str] = "classification"
    metrics: ClassVar[Mapping[str, str]] = {
        "top1": "top-1",
        "top5": "top-5",
        "macro_f1": "macro F1",
        "balanced_accuracy": "balanced accuracy",
    }
    monitored: ClassVar[Mapping[str, Callable[[Tensor, Tensor], float]]] = {"auroc": class_auroc}
    meter_type = ClassMeter
    per_class = "top-1"
    fewest_classes = 2
    classifies = True

    def count_classes(self, targets: Tensor, classes: int) -> Tensor:
        return torch.bincount(targets, minlength=classes)

    def weigh_images(self, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
        if class_weights is None:
            return torch.ones(len(targets))
        return (
            class_weights[targets] if targets.ndim == 1 else targets @ class_weights
        )  # classes, or shares of mixed images

    def loss(
        self, output: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        return F.cross_entropy(output.float(), targets, class_weights, label_smoothing=label_smoothing)

    def reduce(self, answers: Tensor, top: int = 5) -> list[Best]:
        best = answers.softmax(1).topk(min(top, answers.shape[1]), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(indices, values, strict=True)) for indices, values in rows]

    def describe(self, answer: Best, view: View, top: int = 5) -> list[Facts]:
        return [{"label": view.name(index), "probability": value} for index, value in answer[:top]]

    def to_json(self, answer: Best, view: View, top: int = 5) -> Facts:
        best = answer[:top]
        return {"top": [{"class": view.name(i), "index": i, "probability": round(value, 6)} for i, value in best]}

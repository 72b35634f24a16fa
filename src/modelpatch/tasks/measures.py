"""Figures of every kind of task: what is measured, and the one that says which of two patches is better.

    classification   top-1, top-5                                    score: top-1
    segmentation     IoU_c = right / (answered or asked), pixels     score: mean IoU over classes that images or answers have
    detection        mean average precision, COCO's and at 0.5       score: mean over IoU 0.5, 0.55, ..., 0.95 and classes

Segmentation is counted by torchmetrics, detection by pycocotools behind it (extra `dense`).
"""

from __future__ import annotations

import importlib.util
import io
from abc import ABC, abstractmethod
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modelpatch.data.targets import IGNORED
from modelpatch.errors import MissingExtraError
from modelpatch.heads.detectors import unpack
from modelpatch.tasks.record import TaskRecord

EXTRA = "dense"


class Result(ABC):
    """Measured figures of one patch on one split."""

    @property
    @abstractmethod
    def score(self) -> float:
        """The task's metric, in [0, 1]."""

    @property
    @abstractmethod
    def figures(self) -> dict[str, float]:
        """What a patch keeps among its metrics, the score first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Evaluation(Result):
    """Accuracies in [0, 1]. `confusion[i][j]` counts images of class i that were answered as class j."""

    top1: float
    top5: float
    images: int
    per_class: dict[str, float]
    confusion: list[list[int]]

    @property
    def score(self) -> float:
        return self.top1

    @property
    def figures(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "images": self.images}

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Evaluation:
        """From logits (N, K) and labels (N,). Classes without an image have no entry in `per_class`."""
        answers, count = logits.argmax(1), len(classes)
        best = logits.topk(min(5, count), dim=1).indices
        confusion = torch.bincount(labels * count + answers, minlength=count * count).view(count, count)
        totals, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        return cls(
            top1=float((answers == labels).double().mean()),
            top5=float((best == labels[:, None]).any(1).double().mean()),
            images=len(labels),
            per_class={name: r / t for name, r, t in zip(classes, right, totals, strict=True) if t},
            confusion=confusion.tolist(),
        )


@dataclass(frozen=True)
class Segmentation(Result):
    """Shares of pixels in [0, 1]. `per_class` are intersections over unions of the classes that there are; `confusion[i][j]`
    counts pixels of class i that were answered as class j."""

    miou: float
    pixel_accuracy: float
    images: int
    per_class: dict[str, float]
    confusion: list[list[int]]

    @property
    def score(self) -> float:
        return self.miou

    @property
    def figures(self) -> dict[str, float]:
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "images": self.images}


@dataclass(frozen=True)
class Detection(Result):
    """Mean average precisions in [0, 1] over classes that some image has: COCO's, over IoU from 0.5 to 0.95, and at 0.5.

    `per_class` are COCO's.
    """

    map: float
    map50: float
    images: int
    per_class: dict[str, float]

    @property
    def score(self) -> float:
        return self.map

    @property
    def figures(self) -> dict[str, float]:
        return {"map": self.map, "map50": self.map50, "images": self.images}


class Meter(ABC):
    """Collects answers beside what was asked, batch by batch."""

    @abstractmethod
    def update(self, answers: Tensor, asked: Any) -> None:
        """A batch of a task's answers on the CPU (see `modelpatch.tasks.record`) and its labels or targets."""

    @abstractmethod
    def result(self) -> Result: ...


class ClassMeter(Meter):
    """Logits (B, K) and labels (B,)."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, answers: Tensor, asked: Tensor) -> None:
        self._logits.append(answers)
        self._labels.append(asked)

    def result(self) -> Evaluation:
        return Evaluation.of(torch.cat(self._logits), torch.cat(self._labels), self.classes)


class MaskMeter(Meter):
    """Logits (B, K, H, W) and masks (B, H, W), in which `IGNORED` counts for nothing. Raises `MissingExtraError`."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        check_metrics("segmentation")
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.classes, self.images = classes, 0
        self._matrix = MulticlassConfusionMatrix(max(len(classes), 2), ignore_index=IGNORED)

    def update(self, answers: Tensor, asked: Tensor) -> None:
        self._matrix.update(answers.argmax(1), asked)
        self.images += len(answers)

    def result(self) -> Segmentation:
        counts = self._matrix.compute().long()[: len(self.classes), : len(self.classes)]
        right, asked, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = asked + answered - right
        shares = {name: r / u for name, r, u in zip(self.classes, right.tolist(), union.tolist(), strict=True) if u}
        return Segmentation(
            miou=sum(shares.values()) / max(len(shares), 1),
            pixel_accuracy=float(right.sum()) / max(int(counts.sum()), 1),
            images=self.images,
            per_class=shares,
            confusion=counts.tolist(),
        )


class BoxMeter(Meter):
    """Boxes (B, N, 6) and what images have: a list of {"boxes", "labels", "difficult"}. Raises `MissingExtraError`.

    Intersections over unions are the same in the network's square as in the image, however it was stretched.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        check_metrics("detection")
        from torchmetrics.detection import MeanAveragePrecision

        self.classes, self.images = classes, 0
        self._precision = MeanAveragePrecision(class_metrics=True)
        self._precision.warn_on_many_detections = False

    def update(self, answers: Tensor, asked: list[dict[str, Tensor]]) -> None:
        wanted = [{"boxes": one["boxes"], "labels": one["labels"], "iscrowd": one["difficult"].long()} for one in asked]
        self._precision.update([unpack(answer) for answer in answers], wanted)
        self.images += len(answers)

    def result(self) -> Detection:
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            found = self._precision.compute()
        classes, own = found["classes"].reshape(-1).tolist(), found["map_per_class"].reshape(-1).tolist()
        return Detection(
            map=max(float(found["map"]), 0.0),
            map50=max(float(found["map_50"]), 0.0),
            images=self.images,
            per_class={self.classes[index]: value for index, value in zip(classes, own, strict=True) if value >= 0},
        )


def meter_for(task: TaskRecord) -> Meter:
    """What measures a task. Raises `MissingExtraError` where its library is not installed."""
    if task.kind == "segmentation":
        return MaskMeter(task.classes)
    if task.kind == "detection":
        return BoxMeter(task.classes)
    return ClassMeter(task.classes)


def check_metrics(kind: str) -> None:
    """Raises `MissingExtraError` without torchmetrics, for detection without pycocotools as well."""
    for library in ("torchmetrics", "pycocotools")[: 1 + (kind == "detection")]:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, EXTRA, f"Measuring {kind}")

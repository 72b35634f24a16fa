"""What each kind of task asks of a fit: a head, targets beside the images, a loss and figures.

    classification   cross entropy of logits (B, K)
    segmentation     cross entropy of logits (B, K, H, W), the mean over pixels that have a class
    detection        the losses of the detector: classes and places of proposals or of default boxes

`Fit` knows nothing else of a task's kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.targets import IGNORED
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.heads.base import Decoder
from modelpatch.heads.detectors import Detector
from modelpatch.patch.model import PatchedModel
from modelpatch.tasks.decoding import make_decoder
from modelpatch.tasks.measures import Meter, Result, meter_for
from modelpatch.train.cache import PlainInputs
from modelpatch.train.inputs import Inputs
from modelpatch.train.settings import FitSettings


class Objective(ABC):
    """The part of a fit that depends on the kind of its task. Raises `MissingExtraError` where it could not be measured."""

    def __init__(self, data: Task, settings: FitSettings) -> None:
        self.task, self.settings = data.task, settings
        self.meter()  # what is missing is said before the work

    def head(self, backbone: Backbone, preprocessing: Preprocessing) -> Decoder | None:
        """A fresh decoder; None where the method brings the head. Raises `TrainingError` for another kind's settings."""
        settings = self.settings
        return make_decoder(backbone, self.task, preprocessing.image_size, settings.decoder, settings.taps)

    def meter(self) -> Meter:
        """What measures a split."""
        return meter_for(self.task)

    def measure(self, batches: Iterable[tuple[Tensor, Any]]) -> Result:
        """Figures for batches of answers and what was asked."""
        meter = self.meter()
        for answers, asked in batches:
            meter.update(answers, asked)
        return meter.result()

    @abstractmethod
    def targets(self, inputs: Inputs, labels: Tensor, rows: Tensor, epoch: int, step: int) -> Any:
        """What is asked about the batch that `inputs.batch` gives for these arguments."""

    @abstractmethod
    def class_weights(self, inputs: Inputs, labels: Tensor) -> Tensor | None:
        """The weight (K,) of every class as the settings have it."""

    @abstractmethod
    def counts(self, targets: Any, weights: Tensor | None) -> Tensor:
        """How much (B,) every image of a batch counts in the batch's mean loss."""

    def move(self, targets: Any, device: torch.device) -> Any:
        """The targets on a device."""
        return targets.to(device)

    def forward(self, model: PatchedModel, inputs: Tensor, start: int, targets: Any) -> Any:
        """What the loss is made of, from the inputs of segment `start`."""
        return model.run_from(inputs, start)

    @abstractmethod
    def loss(self, answers: Any, targets: Any, weights: Tensor | None) -> Tensor:
        """The mean loss of a batch from what `forward` gave."""


class Classify(Objective):
    """One class an image."""

    def targets(self, inputs: Inputs, labels: Tensor, rows: Tensor, epoch: int, step: int) -> Tensor:
        return labels[rows]

    def class_weights(self, inputs: Inputs, labels: Tensor) -> Tensor | None:
        if self.settings.class_weights == "none":
            return None
        return _balanced(torch.bincount(labels, minlength=len(self.task.classes)), len(labels))

    def counts(self, targets: Tensor, weights: Tensor | None) -> Tensor:
        return torch.ones(len(targets)) if weights is None else weights[targets]

    def loss(self, answers: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        return F.cross_entropy(answers.float(), targets, weights, label_smoothing=self.settings.label_smoothing)


class Segment(Objective):
    """One class a pixel; pixels of the class `IGNORED` are left out."""

    def targets(self, inputs: Inputs, labels: Tensor, rows: Tensor, epoch: int, step: int) -> Tensor:
        return cast(Tensor, dense(inputs).targets(rows, epoch, step))

    def class_weights(self, inputs: Inputs, labels: Tensor) -> Tensor | None:
        if self.settings.class_weights == "none":
            return None
        counts = torch.zeros(256, dtype=torch.long)
        for rows in torch.arange(len(labels)).split(64):
            counts += torch.bincount(dense(inputs).plain_targets(rows).flatten(), minlength=256)
        counts = counts[: len(self.task.classes)]
        return _balanced(counts, int(counts.sum()))

    def counts(self, targets: Tensor, weights: Tensor | None) -> Tensor:
        seen = targets != IGNORED
        if weights is not None:
            return torch.where(seen, weights[targets.clamp(max=len(weights) - 1)], 0.0).sum((1, 2))
        return seen.sum((1, 2)).float()

    def loss(self, answers: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        total = F.cross_entropy(
            answers.float(),
            targets,
            weights,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.settings.label_smoothing,
        )
        return total / self.counts(targets, weights).sum().clamp(min=1e-12)


class Detect(Objective):
    """Boxes. Difficult ones are not learned. Every image counts alike, as torchvision's detectors have it."""

    def __init__(self, data: Task, settings: FitSettings) -> None:
        super().__init__(data, settings)
        for name in ("class_weights", "label_smoothing"):
            if getattr(settings, name) not in ("none", 0):
                raise TrainingError(f"detectors have losses of their own, without {name}. Leave it out.")

    def targets(self, inputs: Inputs, labels: Tensor, rows: Tensor, epoch: int, step: int) -> list[dict[str, Tensor]]:
        return cast(list[dict[str, Tensor]], dense(inputs).targets(rows, epoch, step))

    def class_weights(self, inputs: Inputs, labels: Tensor) -> None:
        return None

    def counts(self, targets: list[dict[str, Tensor]], weights: Tensor | None) -> Tensor:
        return torch.ones(len(targets))

    def move(self, targets: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """Those that are to be learned."""
        kept = [(target, ~target["difficult"]) for target in targets]
        return [{name: target[name][easy].to(device) for name in ("boxes", "labels")} for target, easy in kept]

    def forward(self, model: PatchedModel, inputs: Tensor, start: int, targets: list[dict[str, Tensor]]) -> Tensor:
        """The detector's loss, which it computes along with its answers."""
        maps, head = model.head_input(inputs, start), model.head
        assert isinstance(head, Detector) and isinstance(maps, tuple)  # noqa: PT018
        return head.losses(maps, targets)

    def loss(self, answers: Tensor, targets: Any, weights: Tensor | None) -> Tensor:
        return answers.float()


OBJECTIVES: dict[str, type[Objective]] = {
    "classification": Classify,
    "segmentation": Segment,
    "detection": Detect,
}


def objective_of(data: Task, settings: FitSettings) -> Objective:
    """The objective for a task's kind."""
    return OBJECTIVES[data.task.kind](data, settings)


def dense(inputs: Inputs) -> PlainInputs:
    """The inputs of a dense task, which are never cached: every view has targets of its own."""
    assert isinstance(inputs, PlainInputs), "dense tasks read images"
    return inputs


def _balanced(counts: Tensor, total: int) -> Tensor:
    """Weights that give every class the same sum."""
    return total / (len(counts) * counts.clamp(min=1).float())

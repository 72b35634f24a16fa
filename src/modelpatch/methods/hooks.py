"""Hooks: work that a method does while its model is trained, and losses that it adds.

L2       strength / 2 |theta - theta_0|² + head_strength / 2 |head|²      Xuhong et al., L2-SP, 2018
LwF      strength KL(base's answers for supported tasks || the model's),  Li and Hoiem, 2016, section 3
         on the new task's images
Custom   a function of the features, logits and classes of a batch
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.patch.model import PatchedModel

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Batch:
    """The inputs (B, ...) of segment `start` (0: normalised images) in one training step, logits (B, K) and classes (B,)."""

    inputs: Tensor
    start: int
    logits: Tensor
    labels: Tensor


class Hook:
    """Work of a method while its model is trained. `whole_images` says that it needs one class an image."""

    whole_images: bool = False

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        """Run before the first step; `batches()` yields normalised training images in random order."""

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        """Run before step `step` of `total`. What it does must depend on nothing else, so that a run can be resumed."""

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        """A loss to add to that of a batch."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """The class and hyperparameters as plain values, for the records of a patch."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return {"kind": type(self).__name__, **plain}


class Keeper(Hook):
    """A hook that sees a model while it is fine-tuned, and may add a penalty to its loss."""

    def penalty(self, model: PatchedModel) -> Tensor | float:
        """A loss that does not depend on the batch."""
        return 0.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return self.penalty(model)


@dataclass
class L2(Keeper):
    """Pulls the weights back to where they started, and those of the head, which started nowhere, to 0."""

    strength: float
    head_strength: float = 0.0
    start: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        named = model.trainable()
        self.start = {name: one.detach().clone() for name, one in named if not name.startswith("head.")}

    def penalty(self, model: PatchedModel) -> Tensor | float:
        body = sum((one - self.start[name]).square().sum() for name, one in model.trainable() if name in self.start)
        head = sum(one.square().sum() for name, one in model.trainable() if name.startswith("head."))
        return self.strength / 2 * body + self.head_strength / 2 * head


@dataclass
class LwF(Keeper):
    """Holds the answers for supported tasks, as `heads` give them, to the base's on images of the new task.

    Above 1 the `temperature` T softens both answers, and the divergence counts T² times (Hinton et al., 2015).
    """

    strength: float
    heads: Sequence[nn.Module]
    temperature: float = 1.0
    _held: Iterator[tuple[Tensor, list[Tensor]]] = field(default_factory=lambda: iter(()))

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        with torch.no_grad():
            held = [(images, [one.softmax(1) for one in self._answers(model, images)]) for images in batches()]
        self._held = itertools.cycle(held)

    def penalty(self, model: PatchedModel) -> Tensor | float:
        images, wanted = next(self._held)
        answers = zip(self._answers(model, images), wanted, strict=True)
        divergences = (F.kl_div(one.log_softmax(1), held, reduction="batchmean") for one, held in answers)
        return self.strength * self.temperature**2 * sum(divergences)

    def _answers(self, model: PatchedModel, images: Tensor) -> list[Tensor]:
        features = model.head_input(images, 0)
        return [head(features) / self.temperature for head in self.heads]


class FeatureLoss(Keeper):
    """A loss of the head's input: `features` (B, D) of the last batch, with gradients."""

    features: Tensor

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        model.head.register_forward_pre_hook(self._see)

    def _see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0].flatten(1)


@dataclass
class Custom(FeatureLoss):
    """`strength` times a function of yours of the features (B, D) and the batch, to a scalar."""

    loss: Callable[[Tensor, Batch], Tensor]
    strength: float = 1.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor:
        return self.strength * self.loss(self.features, batch)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__)}

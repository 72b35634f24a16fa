"""Losses that any method can add to its own.

    loss = the loss of the task's kind + the method's own + the added one

    L2       strength / 2 |theta - theta_0|² + head_strength / 2 |head|²      Xuhong et al., L2-SP, 2018
    LwF      strength KL(base's answers for supported tasks || the model's),  Li and Hoiem, 2016, section 3
             on the new task's images
    Custom   a function of the features, logits and classes of a batch

`with_loss(FullFinetune() + DeltaNetwork(), L2(0.001))` is a method like any other.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 7 and the hosts of its domain adaptation.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.errors import MethodError
from modelpatch.methods.hooks import Batch, Batches, Hook
from modelpatch.methods.method import Method
from modelpatch.patch.model import PatchedModel


def with_loss(method: Method, keeper: Hook) -> Method:
    """The method with another loss added to its own. A keeper serves one fit after the other, not two at once."""
    return replace(method, losses=(*method.losses, AddedLoss(keeper, method.name)))


@dataclass(eq=False)
class AddedLoss(Hook):
    """A keeper with a check that it has seen the model's first step.

    A keeper holds what it has seen so far, which no checkpoint has: such a fit cannot be resumed.
    """

    keeper: Hook
    method: str
    whole_images: bool = True
    _seen: weakref.ref[PatchedModel] | None = field(default=None, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return self.keeper.describe()

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        self.keeper.begin(model, batches)
        self._seen = weakref.ref(model)

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        """Run the keeper's step. Raises `MethodError` for a model whose first step it has not seen."""
        if self._seen is None or self._seen() is not model:
            raise MethodError(
                f"{self.method} with {type(self.keeper).__name__} cannot go on from a checkpoint, which does not hold what "
                "the added loss has seen. Start anew: give --restart, or remove the checkpoint."
            )
        self.keeper.step(model, step, total)

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return self.keeper.added_loss(model, batch)


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
        held = []
        with torch.no_grad():
            for images in batches():
                features = model.head_input(images, 0)
                held.append((images, [(head(features) / self.temperature).softmax(1) for head in self.heads]))
        self._held = itertools.cycle(held)

    def penalty(self, model: PatchedModel) -> Tensor | float:
        images, answers = next(self._held)
        features = model.head_input(images, 0)
        divergences = (
            F.kl_div((head(features) / self.temperature).log_softmax(1), answer, reduction="batchmean")
            for head, answer in zip(self.heads, answers, strict=True)
        )
        return self.strength * self.temperature**2 * sum(divergences)


class FeatureLoss(Keeper):
    """A loss of the head's input: `features` (B, D) of the last batch, with gradients."""

    features: Tensor

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        model.head.register_forward_pre_hook(self._see)

    def _see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0].flatten(1)


Loss = Callable[[Tensor, Batch], Tensor]  # features (B, D) and the batch to a scalar


@dataclass
class Custom(FeatureLoss):
    """`strength` times a function of yours."""

    loss: Loss
    strength: float = 1.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor:
        return self.strength * self.loss(self.features, batch)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__)}

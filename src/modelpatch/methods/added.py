"""Losses that any method can add to its own.

    loss = the loss of the task's kind + the method's own + the added one

`with_loss(FullFinetune() + DeltaNetwork(), L2(0.001))` is a method like any other. `keeping.py` holds such losses; a function
of the features, logits and classes of a batch is one as well: `with_loss(method, Custom(function))`.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 7 and the hosts of its domain adaptation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from modelpatch.errors import MethodError
from modelpatch.methods.hooks import Batch, Batches, Hook
from modelpatch.methods.keeping import Keeper
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

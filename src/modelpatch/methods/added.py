"""A loss that any method can add to its own: the hosts of Δ-Networks' transfer and domain adaptation tables, or yours.

    loss = cross entropy + the method's own + what a keeper adds

`with_loss(FullFinetune() + DeltaNetwork(), L2(0.001))` is a method like any other. `keeping.py` holds keepers; a function of
the features, logits and classes of a batch is one as well: `with_loss(method, Custom(function))`.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 7 and the hosts of its domain adaptation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.heads.base import Decoder
from modelpatch.methods.keeping import Keeper
from modelpatch.methods.method import Batch, Batches, Method
from modelpatch.methods.wrapped import Wrapped
from modelpatch.patch.model import PatchedModel


def with_loss(method: Method, keeper: Keeper) -> WithLoss:
    """The method with what the keeper adds to its loss. A keeper serves one fit after the other, not two at once."""
    return WithLoss(method=method, keeper=keeper, **WithLoss.common(method))


@dataclass(frozen=True, kw_only=True)
class WithLoss(Wrapped):
    """`method` with what `keeper` adds to the loss.

    A keeper holds what it has seen so far, which no checkpoint has: such a fit cannot go on from the middle.
    """

    keeper: Keeper

    def hyperparameters(self) -> dict[str, Any]:
        return {**self.method.hyperparameters(), "loss": self.keeper.describe()}

    def draft(self, backbone: Backbone, classes: int, decoder: Decoder | None = None) -> PatchedModel:
        """The method's own."""
        if decoder is not None:
            self.check_decoder()
        return self.method.draft(backbone, classes, decoder)

    def check_decoder(self) -> None:
        raise MethodError(
            f"{type(self.keeper).__name__} is a loss of classes of whole images. Train {self.name} without it."
        )

    def prepare(self, model: PatchedModel, batches: Batches) -> None:
        """Let the keeper look at the model before it moves."""
        super().prepare(model, batches)
        self.keeper.begin(model, batches)
        self.keeper.watched = weakref.ref(model)

    def before_step(self, model: PatchedModel, step: int, total: int) -> None:
        """Let the keeper look at the model between steps. Raises `MethodError` where its first look is missing."""
        if self.keeper.watched is None or self.keeper.watched() is not model:
            raise MethodError(
                f"{self.name} with {type(self.keeper).__name__} cannot go on from a checkpoint, which does not hold what the "
                "added loss has seen. Start anew: give --restart, or remove the checkpoint."
            )
        super().before_step(model, step, total)
        self.keeper.step(model, step, total)

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return super().added_loss(model, batch) + self.keeper.added_loss(model, batch)


class FeatureLoss(Keeper):
    """A loss that reads what the head reads: `features` (B, D) of the last batch, with gradients."""

    features: Tensor

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        model.head.register_forward_pre_hook(self._see)

    def _see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0].flatten(1)


Loss = Callable[[Tensor, Batch], Tensor]  # features (B, D) and the batch to a scalar


@dataclass
class Custom(FeatureLoss):
    """`strength` times what a function of yours gives."""

    loss: Loss
    strength: float = 1.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor:
        return self.strength * self.loss(self.features, batch)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__)}

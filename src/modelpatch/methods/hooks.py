"""Hooks: work that a method does while its model is trained, and losses that it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modelpatch.patch.model import PatchedModel

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Batch:
    """The data of one training step: the inputs (B, ...) of segment `start` (0: normalised images), logits (B, K) and classes
    (B,) int64."""

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

"""Heads turn the chain's features into a task's answer. A new kind of head is one class and its line in HEADS."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class HeadRecord(BaseModel):
    """What a patch file says about its head: kind, `features` (D) read and `outputs` (K) given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = "linear"
    features: int = Field(gt=0)
    outputs: int = Field(gt=0)

    def build(self) -> nn.Module:
        """A freshly initialised head of this kind."""
        return HEADS[self.kind](self.features, self.outputs)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of the head by its name in a patch file; nothing is allocated."""
        with torch.device("meta"):
            return {f"head.{name}": tensor.shape for name, tensor in self.build().state_dict().items()}


class LinearHead(nn.Linear):
    """Features (B, D) to logits (B, K): logits = features Wᵀ + b."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


HEADS: dict[str, type[LinearHead]] = {"linear": LinearHead}

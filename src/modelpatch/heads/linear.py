"""A linear head: logits = features Wᵀ + b."""

from __future__ import annotations

from torch import Tensor

from modelpatch.heads.base import DenseHead, register_head


@register_head("linear")
class LinearHead(DenseHead):
    """Features (B, D) to logits (B, K)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))

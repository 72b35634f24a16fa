"""A cosine head: logits = (f / |f|) Wᵀ, as CLIP compares an image with texts.

Radford et al., *Learning Transferable Visual Models From Natural Language Supervision* (2021).
"""

from __future__ import annotations

from torch import Tensor, nn

from modelpatch.heads.base import DenseHead, register_head


@register_head("cosine")
class CosineHead(DenseHead):
    """Features (B, D) to logits (B, K). The rows of W are directions times a scale."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(input.flatten(1), dim=1))

"""Heads of one linear layer: on features, on features at unit length, and on the patch's features beside the base's.

linear     logits = f Wᵀ + b
cosine     logits = (f / |f|) Wᵀ            CLIP's, for images against texts (Radford et al., 2021)
siamese    logits = [f, f_base] Wᵀ + b      Kaplun et al., *Less is More: ... SubTuning* (2023), section 4.1
"""

from __future__ import annotations

from torch import Tensor, nn

from modelpatch.heads.base import Head, HeadRecord, register_head
from modelpatch.heads.reading import Read


@register_head("linear")
class LinearHead(nn.Linear, Head):
    """Features (B, D) to logits (B, K)."""

    @classmethod
    def build(cls, record: HeadRecord) -> Head:
        return cls(record.features, record.outputs)

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind=self.kind, features=self.in_features, outputs=self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


@register_head("siamese")
class SiameseHead(LinearHead):
    """Logits (B, K) from the patch's features and then the base's (B, 2 D)."""

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return Read(), Read(of="base")


@register_head("cosine")
class CosineHead(LinearHead):
    """Features (B, D) to logits (B, K). The rows of W are directions times a scale."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(input.flatten(1), dim=1))

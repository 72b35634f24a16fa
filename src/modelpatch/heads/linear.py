"""A linear head: logits = features Wᵀ + b."""

from __future__ import annotations

from torch import Tensor, nn

from modelpatch.heads.base import Head, HeadRecord, register_head


@register_head("linear")
class LinearHead(nn.Linear, Head):
    """Features (B, D) to logits (B, K)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))

    @classmethod
    def build(cls, record: HeadRecord) -> LinearHead:
        return cls(record.features, record.outputs)

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(features=self.in_features, outputs=self.out_features)

"""A siamese head: a linear head on the patch's features beside the base's own.

Kaplun et al., *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 4.1.
"""

from __future__ import annotations

from torch import nn

from modelpatch.heads.base import Head, HeadRecord, register_head
from modelpatch.heads.reading import Read


@register_head("siamese")
class SiameseHead(nn.Linear, Head):
    """Logits (B, K) from the patch's features and then the base's (B, 2 D)."""

    @classmethod
    def build(cls, record: HeadRecord) -> SiameseHead:
        return cls(record.features, record.outputs)

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return Read(), Read(of="base")

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="siamese", features=self.in_features, outputs=self.out_features)

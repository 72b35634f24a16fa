"""A siamese head: a linear head on the patch's features beside the base's own.

Kaplun et al., *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 4.1.
"""

from __future__ import annotations

from modelpatch.heads.base import DenseHead, HeadRecord, register_head
from modelpatch.heads.reading import Read


@register_head("siamese")
class SiameseHead(DenseHead):
    """Logits (B, K) from the patch's features and then the base's (B, 2 D)."""

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return Read(), Read(of="base")

"""A head on features selected from the pooled outputs of several segments.

Evci et al., *Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning* (ICML 2022), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain
from modelpatch.errors import ForeignTensorError
from modelpatch.heads.base import Head, HeadRecord, register_head
from modelpatch.heads.reading import Read, pooled_width


@register_head("selected")
class SelectedHead(nn.Linear, Head):
    """Logits (B, K) from the `selected` ones of all pooled outputs (B, D) of the segments `taps`."""

    takes = frozenset({"taps"})
    selected: Tensor

    def __init__(self, features: int, outputs: int, taps: tuple[int, ...]) -> None:
        super().__init__(features, outputs)
        self.taps = taps
        self.register_buffer("selected", torch.zeros(features, dtype=torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.index_select(1, self.selected))

    @classmethod
    def build(cls, record: HeadRecord) -> SelectedHead:
        return cls(record.features, record.outputs, record.taps)

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return tuple(Read(tap, "pooled") for tap in record.taps)

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="selected", features=self.in_features, outputs=self.out_features, taps=self.taps)

    @classmethod
    def check_chain(cls, record: HeadRecord, chain: Chain, pixels: int) -> None:
        return

    @classmethod
    def check_tensors(cls, record: HeadRecord, tensors: Mapping[str, Tensor], chain: Chain) -> None:
        selected, count = tensors.get("head.selected"), sum(pooled_width(chain, tap) for tap in record.taps)
        if selected is not None and not bool(((selected >= 0) & (selected < count)).all()):
            raise ForeignTensorError(f"the head selects features up to {selected.max()}; the backbone gives {count}.")

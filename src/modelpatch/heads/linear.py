"""Heads of one linear layer.

linear     logits = f Wᵀ + b
cosine     logits = (f / |f|) Wᵀ            CLIP's, for images against texts (Radford et al., 2021)
siamese    logits = [f, f_base] Wᵀ + b      Kaplun et al., *Less is More: ... SubTuning* (2023), section 4.1
selected   logits = h_S Wᵀ + b          h pooled outputs of segments: Evci et al., *Head2Toe* (2022), section 3
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain
from modelpatch.errors import ForeignTensorError
from modelpatch.heads.base import Head, HeadRecord, register_head
from modelpatch.heads.reading import Read, pooled_width


@register_head("linear")
class LinearHead(nn.Linear, Head):
    """Features (B, D) to logits (B, K)."""

    taps: tuple[int, ...] = ()

    @classmethod
    def build(cls, record: HeadRecord) -> Head:
        return cls(record.features, record.outputs)

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind=self.kind, features=self.in_features, outputs=self.out_features, taps=self.taps)

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


@register_head("selected")
class SelectedHead(LinearHead):
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
    def build(cls, record: HeadRecord) -> Self:
        return cls(record.features, record.outputs, record.taps)

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return tuple(Read(tap, "pooled") for tap in record.taps)

    @classmethod
    def check_chain(cls, record: HeadRecord, chain: Chain, pixels: int, tensors: Mapping[str, Tensor]) -> None:
        selected, count = tensors.get("head.selected"), sum(pooled_width(chain, tap) for tap in record.taps)
        if selected is not None and not bool(((selected >= 0) & (selected < count)).all()):
            raise ForeignTensorError(f"the head selects features up to {selected.max()}; the backbone gives {count}.")

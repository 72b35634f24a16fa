"""Heads turn the chain's features, or outputs of inner segments, into a task's answer.

Decoders, which read outputs as maps and answer for every position, register themselves from `decoders.py` and `detectors.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain, channels_first

HeadInput = Tensor | tuple[Tensor, ...]  # features (B, D), or maps (B, C, H, W) of every tap
MOST_MAPS = 16
_HIDDEN = {"deeplab", "faster-rcnn", "ssdlite"}  # kinds with layers of their own width
Positive = Annotated[int, Field(gt=0, le=2**16)]


class HeadRecord(BaseModel):
    """What a patch file says about its head: kind, `features` (D) read and `outputs` (K) given.

    A `linear` head reads the chain's features, a `cosine` head only their direction, a `siamese` head the patch's and, beside
    them, the base's. A `selected` head reads some of the pooled outputs of the segments `taps`. Decoders (`fcn`,
    `deeplab`, `faster-rcnn`, `ssdlite`) read the outputs of `taps` as maps: `widths` are the channels of each, `strides` the
    pixels between two positions of it, `hidden` the channels of the decoder's own layers, where it has such.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "cosine", "siamese", "selected", "fcn", "deeplab", "faster-rcnn", "ssdlite"] = "linear"
    features: int = Field(gt=0, le=2**24)
    outputs: int = Field(gt=0, le=2**24)
    taps: tuple[int, ...] = ()
    widths: tuple[Positive, ...] = ()
    strides: tuple[Positive, ...] = ()
    hidden: int = Field(default=0, ge=0, le=2**12)

    @model_validator(mode="after")
    def _fitting_taps(self) -> HeadRecord:
        if bool(self.taps) != (self.kind == "selected" or self.reads_maps) or list(self.taps) != sorted(
            {tap for tap in self.taps if tap >= 0}
        ):
            raise ValueError(f"a {self.kind} head cannot read the outputs of the segments {self.taps}")
        count = len(self.taps) if self.reads_maps else 0
        if count > MOST_MAPS:
            raise ValueError(f"a {self.kind} head of {count} maps; expected at most {MOST_MAPS}")
        if (len(self.widths), len(self.strides)) != (count, count) or bool(self.hidden) != (self.kind in _HIDDEN):
            raise ValueError(
                f"a {self.kind} head of {count} maps cannot have widths {self.widths}, strides {self.strides}"
            )
        if self.reads_maps and (self.features != sum(self.widths) or list(self.strides) != sorted(self.strides)):
            raise ValueError(
                f"maps of {self.widths} channels at strides {self.strides} are not {self.features} features"
            )
        return self

    @property
    def reads_maps(self) -> bool:
        """Whether the head reads outputs of segments as maps."""
        return self.kind in _DECODERS

    def build(self) -> nn.Module:
        """A freshly initialised head of this kind."""
        if self.reads_maps:
            return _DECODERS[self.kind](self)
        if self.kind == "selected":
            return SelectedHead(self.features, self.outputs, self.taps)
        if self.kind == "cosine":
            return CosineHead(self.features, self.outputs)
        if self.kind == "siamese":
            return SiameseHead(self.features, self.outputs)
        return LinearHead(self.features, self.outputs)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of the head by its name in a patch file; nothing is allocated."""
        with torch.device("meta"):
            return {f"head.{name}": tensor.shape for name, tensor in self.build().state_dict().items()}


class Decoder(nn.Module, ABC):
    """A head that reads maps: the outputs of the segments `taps`, each (B, C, H, W), the finest first."""

    reads_maps = True

    def __init__(self, record: HeadRecord) -> None:
        super().__init__()
        self.record = record

    @property
    def taps(self) -> tuple[int, ...]:
        return self.record.taps

    @abstractmethod
    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The task's answer (see `task.py`) from the maps."""


_DECODERS: dict[str, Callable[[HeadRecord], Decoder]] = {}
D = TypeVar("D", bound=type[Decoder])


def register_decoder(kind: str) -> Callable[[D], D]:
    """Register a decoder under the kind that patch files name."""

    def register(decoder: D) -> D:
        _DECODERS[kind] = decoder
        return decoder

    return register


class LinearHead(nn.Linear):
    """Features (B, D) to logits (B, K): logits = features Wᵀ + b."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(features=self.in_features, outputs=self.out_features)


class CosineHead(nn.Linear):
    """Features (B, D) to logits (B, K): logits = (f / |f|) Wᵀ. The rows of W are directions times a scale, as in CLIP."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(input.flatten(1), dim=1))

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="cosine", features=self.in_features, outputs=self.out_features)


class SiameseHead(nn.Linear):
    """Logits (B, K) from the patch's features beside the base's (B, 2 D), in that order (SubTuning, section 4.1)."""

    reads_base = True

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="siamese", features=self.in_features, outputs=self.out_features)


class SelectedHead(nn.Linear):
    """Logits (B, K) from the `selected` ones of all pooled outputs (B, D) of the segments `taps`."""

    selected: Tensor

    def __init__(self, features: int, outputs: int, taps: tuple[int, ...]) -> None:
        super().__init__(features, outputs)
        self.taps = taps
        self.register_buffer("selected", torch.zeros(features, dtype=torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.index_select(1, self.selected))

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="selected", features=self.in_features, outputs=self.out_features, taps=self.taps)


class DraftHead(nn.Module, ABC):
    """A head that is stored as another than the one that is trained. `taps` are the segments whose outputs it reads."""

    taps: tuple[int, ...] = ()

    @property
    @abstractmethod
    def record(self) -> HeadRecord:
        """The stored head."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The stored head's tensors."""


def pool(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """An activation (B, ...) averaged over the axes `positions` and scaled to unit length: (B, C)."""
    return nn.functional.normalize(x.mean(positions) if positions else x, dim=1)


def as_map(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """An activation (B, ...) with channels first, (B, C, H, W): tokens in a square, without those that stand before it."""
    if positions == (1, 2):
        return x.permute(0, 3, 1, 2)
    if positions == (1,):
        side = math.isqrt(x.shape[1])
        return x[:, x.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    return x


def read_taps(head: nn.Module, outputs: Sequence[Tensor], positions: Sequence[tuple[int, ...]]) -> HeadInput:
    """What a head reads of the outputs of its taps: maps, or all of them pooled side by side."""
    pairs = zip(outputs, positions, strict=True)
    if reads_maps(head):
        return tuple(as_map(x, axes) for x, axes in pairs)
    return torch.cat([pool(x, axes) for x, axes in pairs], 1)


def reads_maps(head: nn.Module) -> bool:
    """Whether a head is a decoder."""
    return bool(getattr(head, "reads_maps", False))


def pooled_axes(chain: Chain, tap: int) -> tuple[int, ...]:
    """The axes of segment `tap`'s output, batch axis counted, that are positions and not channels."""
    shape = chain[tap].output_shape
    if len(shape) == 3:
        return (2, 3) if channels_first(shape, chain[0].input_shape) else (1, 2)
    return (1,) if len(shape) == 2 else ()


def pooled_width(chain: Chain, tap: int) -> int:
    """Channels of segment `tap`'s output."""
    shape = chain[tap].output_shape
    return shape[0] if pooled_axes(chain, tap) == (2, 3) else shape[-1]

"""The interface of heads, their registry and their record in a patch file.

A head turns what it reads of a chain (see `reading.py`) into a task's answer. It says how it is built from its record, which
fields of the record it fills and what it reads. Other distributions register theirs as entry points `modelpatch.heads`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain
from modelpatch.errors import ForeignTensorError, PatchError
from modelpatch.heads.reading import Read, pooled_axes, pooled_width
from modelpatch.registry import Registry
from modelpatch.text import Facts

MOST_MAPS = 16
MAPS = frozenset({"taps", "widths", "strides"})  # what every decoder's record says
Positive = Annotated[int, Field(gt=0, le=2**16)]


class HeadRecord(BaseModel, frozen=True, extra="forbid"):
    """A head in a patch file: its kind, the `features` (D) that it reads and the `outputs` (K) that it gives.

    Heads that read inner segments name them in `taps`. Decoders read them as maps: `widths` are the channels of each,
    `strides` the pixels between two positions of it, `hidden` the channels of the decoder's own layers. `options` are plain
    values for heads of other distributions.
    """

    kind: str = Field(default="linear", pattern=r"^[a-z][a-z0-9-]{0,63}$")
    features: int = Field(gt=0, le=2**24)
    outputs: int = Field(gt=0, le=2**24)
    taps: tuple[int, ...] = ()
    widths: tuple[Positive, ...] = ()
    strides: tuple[Positive, ...] = ()
    hidden: int = Field(default=0, ge=0, le=2**12)
    options: Facts = {}

    @model_validator(mode="after")
    def _known_and_complete(self) -> Self:
        try:
            head = self.head
        except PatchError as error:
            raise ValueError(str(error)) from error
        if list(self.taps) != sorted({tap for tap in self.taps if tap >= 0}):
            raise ValueError(f"a head reads segments in their order; the record has taps={self.taps}")
        head.check_record(self)
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def head(self) -> type["Head"]:
        """The class that is registered for the kind. Raises `PatchError` for a kind that is not."""
        return HEADS.find(self.kind)

    @property
    def reads(self) -> tuple[Read, ...]:
        """The inputs of the head."""
        return self.head.list_reads(self)

    def build(self) -> "Head":
        """A freshly initialised head of this kind."""
        return self.head.build(self)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of the head by its name in a patch file; nothing is allocated."""
        with torch.device("meta"):
            return {f"head.{name}": tensor.shape for name, tensor in self.build().state_dict().items()}


class Head(nn.Module, ABC):
    """A module from what it reads to a task's answer.

    `takes` names the fields of its record that it fills, of `taps`, `widths`, `strides`, `hidden` and `options`.
    """

    kind: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def record(self) -> HeadRecord:
        """The head as a patch file describes it. It may be stored as another kind than the one that is trained."""

    @classmethod
    def build(cls, record: HeadRecord) -> "Head":
        """A freshly initialised head of this kind."""
        return cls(record)

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        """The inputs of a head with this record: by default the features at the end of the chain."""
        return (Read(),)

    @property
    def reads(self) -> tuple[Read, ...]:
        """The inputs of the head."""
        return self.record.reads

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the head that `record` describes, by their names in it."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @classmethod
    def check_record(cls, record: HeadRecord) -> None:
        """Raises ValueError for a record that this kind does not have."""
        for field in ("taps", "widths", "strides", "hidden", "options"):
            value = getattr(record, field)
            if value and field not in cls.takes:
                raise ValueError(f"a {record.kind} head has no {field}; the record has {field}={value}")
            if not value and field in cls.takes and field != "options":
                raise ValueError(f"a {record.kind} head needs {field}; the record has none")

    @classmethod
    def check_chain(cls, record: HeadRecord, chain: Chain, pixels: int, tensors: Mapping[str, Tensor]) -> None:
        """Raises `ForeignTensorError` unless chain, side of images and `tensors` of a patch file give what the head reads."""
        given = sum(pooled_width(chain, read.segment) for read in cls.list_reads(record))
        if record.features != given:
            raise ForeignTensorError(
                f"the patch's {record.kind} head reads {record.features} features; the backbone gives {given}."
            )


class DraftHead(Head):
    """A head that is stored as another kind than the one that is trained."""

    @classmethod
    def build(cls, record: HeadRecord) -> Head:
        return record.build()


HEADS = Registry[type[Head]]("head", "modelpatch.heads", error=PatchError)
H = TypeVar("H", bound=type[Head])


def register_head(kind: str) -> Callable[[H], H]:
    """Register a head under the kind that patch files name."""

    def register(head: H) -> H:
        head.kind = kind
        return HEADS.register(kind)(head)

    return register


class Decoder(Head):
    """A head that reads maps: the outputs of the segments `taps`, each (B, C, H, W), the finest first."""

    takes = MAPS

    def __init__(self, record: HeadRecord) -> None:
        super().__init__()
        self._record = record

    @property
    def record(self) -> HeadRecord:
        return self._record

    @classmethod
    def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
        return tuple(Read(tap, "map") for tap in record.taps)

    @abstractmethod
    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The task's answer from the maps."""

    @classmethod
    def check_record(cls, record: HeadRecord) -> None:
        super().check_record(record)
        count = len(record.taps)
        if count > MOST_MAPS or (len(record.widths), len(record.strides)) != (count, count):
            raise ValueError(
                f"a {record.kind} head of {count} maps has widths {record.widths} and strides {record.strides}; expected "
                f"one of each for every map, and at most {MOST_MAPS} maps"
            )
        if record.features != sum(record.widths) or list(record.strides) != sorted(record.strides):
            raise ValueError(f"{record.widths} channels at strides {record.strides} are not {record.features} features")

    @classmethod
    def check_chain(cls, record: HeadRecord, chain: Chain, pixels: int, tensors: Mapping[str, Tensor]) -> None:
        widths = tuple(pooled_width(chain, tap) if pooled_axes(chain, tap) else 0 for tap in record.taps)
        if widths != record.widths:
            raise ForeignTensorError(
                f"the {record.kind} head reads maps of {record.widths} channels; the backbone gives {widths}."
            )
        if pixels % record.strides[0]:
            raise ForeignTensorError(f"images of {pixels} px are no multiple of the head's stride {record.strides[0]}.")


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation in up to 16 groups of channels, which needs no batch statistics."""
    return nn.GroupNorm(math.gcd(channels, 16), channels)

"""The structure of a patch: the tensors of the backbone that it owns and the modules that it adds.

A *span* `[i, j)` is a run of segments that the patch replaces by a variant; where a patch only owns tensors, every segment
that holds one is a span of length one.
"""

import itertools
from collections.abc import Callable
from typing import Self

from pydantic import BaseModel, Field, model_validator
from torch import nn

from modelpatch.backbone.chain import Chain
from modelpatch.errors import ForeignTensorError, UnknownGraftError
from modelpatch.registry import Registry
from modelpatch.text import Facts

Span = tuple[int, int]
GraftBuilder = Callable[..., nn.Module]
GRAFTS = Registry[GraftBuilder](
    "kind of added modules", "modelpatch.grafts", folder="modelpatch.methods", error=UnknownGraftError
)
_WHOLE: set[str] = set()  # kinds whose effect has no share


class Graft(BaseModel, frozen=True, extra="forbid"):
    """Modules added to the span `[start, end)` by the builder registered as `kind`, called with `arguments`."""

    kind: str = Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")
    start: int = Field(ge=0)
    end: int = Field(gt=0)
    arguments: Facts = {}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"the span [{self.start}, {self.end}) is empty")
        return self

    @property
    def interpolates(self) -> bool:
        """True if the added modules have an effect at a strength between 0 and 1. Raises `UnknownGraftError`."""
        GRAFTS.find(self.kind)
        return self.kind not in _WHOLE

    def apply(self, variant: nn.Module) -> nn.Module:
        """`variant` with the added modules. Raises `UnknownGraftError`, `ForeignTensorError` for arguments that do not fit."""
        builder = GRAFTS.find(self.kind)
        try:
            return builder(variant, **self.arguments)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ForeignTensorError(
                f"the modules of kind {self.kind!r} do not fit segments [{self.start}, {self.end}): {error}."
            ) from error


def register_graft(kind: str, *, interpolates: bool = True) -> Callable[[GraftBuilder], GraftBuilder]:
    """Register a builder `(variant, **arguments) -> module` under a name that patch files can hold.

    `interpolates=False` says that the modules work as trained only, at no lower strength. Other distributions also list
    their builders as entry points of the group `modelpatch.grafts`.
    """

    def register(builder: GraftBuilder) -> GraftBuilder:
        _WHOLE.update([] if interpolates else [kind])
        return GRAFTS.register(kind)(builder)

    return register


class Blueprint(BaseModel, frozen=True, extra="forbid"):
    """`owned` names the backbone's parameters and buffers that the patch has its own values for."""

    owned: tuple[str, ...] = ()
    grafts: tuple[Graft, ...] = ()

    def spans(self, chain: Chain) -> tuple[Span, ...]:
        """The spans in order. Raises `ForeignTensorError` for names or spans the chain does not have."""
        starts: dict[int, int] = {}
        for graft in self.grafts:
            if graft.end > len(chain):
                raise ForeignTensorError(f"the patch spans segments up to {graft.end}; the backbone has {len(chain)}.")
            starts[graft.start] = max(graft.end, starts.get(graft.start, 0))
        for name in self.owned:
            try:
                index = chain.segment_of(name).index
            except KeyError:
                raise ForeignTensorError(f"the patch replaces {name!r}, which no single segment holds.") from None
            if not any(start <= index < end for start, end in starts.items()):
                starts[index] = index + 1
        spans = tuple(sorted(starts.items()))
        for (start, end), (other, other_end) in itertools.pairwise(spans):
            if other < end:
                raise ForeignTensorError(f"the patch's spans [{start}, {end}) and [{other}, {other_end}) overlap.")
        return spans

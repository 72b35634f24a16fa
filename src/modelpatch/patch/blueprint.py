"""The structure of a patch: the tensors of the backbone that it owns and the modules that it adds.

A *span* `[i, j)` is a run of segments that the patch replaces by a variant; where a patch only owns tensors, every segment
that holds one is a span of length one.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from torch import nn

from modelpatch.backbone.chain import Chain
from modelpatch.errors import AddedModulesError, ForeignTensorError, UnknownGraftError
from modelpatch.registry import Registry
from modelpatch.text import MAX_LENGTH, Facts, first_line

Span = tuple[int, int]
MOST_GRAFTS = 16  # times that modules are added to one span: as many methods as can be joined
MOST_ITEMS, MOST_DEPTH, LARGEST = 2**14, 8, 2**40  # of a graft's arguments
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

    @field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Numbers, words and lists of a size that a module can have."""
        check_size(arguments)
        return arguments

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
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise AddedModulesError(
                f"the modules of kind {self.kind!r} do not fit segments [{self.start}, {self.end}): {first_line(error)[:300]}."
            ) from error


def check_size(value: Any, depth: int = 0) -> None:
    """Raise ValueError for numbers, words and collections that describe no module, before anything is built of them."""
    if isinstance(value, dict | list | tuple):
        if depth == MOST_DEPTH or len(value) > MOST_ITEMS:
            raise ValueError(
                f"{len(value):,} values at depth {depth}; at most {MOST_ITEMS:,} and {MOST_DEPTH} levels are read"
            )
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            check_size(item, depth + 1)
    elif isinstance(value, str) and len(value) > MAX_LENGTH:
        raise ValueError(f"a word of {len(value):,} characters; at most {MAX_LENGTH} are read")
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ValueError(f"a number larger than {LARGEST:,}, or none")


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
        counts = Counter(graft.start for graft in self.grafts)
        if self.grafts and max(counts.values()) > MOST_GRAFTS:
            (start, count), *_ = counts.most_common(1)
            raise ForeignTensorError(
                f"the patch adds modules {count:,} times to the span that begins at segment {start}; expected at most "
                f"{MOST_GRAFTS} times."
            )
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

"""Figures of a patch, for people and for scripts: its parts, bytes, hashes and metrics."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from modelpatch.backbone.chain import Chain
from modelpatch.patch.blueprint import Span
from modelpatch.patch.codec import SCALE, STREAM, WHERE, pack
from modelpatch.patch.entropy import entropy_bits
from modelpatch.tasks.kind import kind_of
from modelpatch.text import count_of

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A group of tensors: one module of the backbone, one graft, or the head.

    `bytes` are those in the file; of an entropy-coded stream every mask counts its share of the bound. `kept` is the share
    of weights that a mask keeps, `span` None for the head and where the backbone's chain is not known.
    """

    name: str
    kind: str
    tensors: int
    numbers: int
    bytes: int
    codecs: tuple[str, ...]
    kept: float | None = None
    span: Span | None = None


@dataclass(frozen=True)
class SpanFigures:
    """All parts of one span, the segments [i, j), by the backbone's name for them."""

    segments: Span
    name: str
    numbers: int
    bytes: int

    def __str__(self) -> str:
        first, last = self.segments[0], self.segments[1] - 1
        place = f"segment {first}" if first == last else f"segments {first} to {last}"
        return f"{place} {self.name}".strip()


@dataclass(frozen=True)
class MaskFigures:
    """All masks of a patch: `bits_per_weight` in the file, and `bound`, the entropy of the layers' shares of kept weights."""

    weights: int
    kept: float
    bits_per_weight: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{100 * (1 - self.kept):.1f} % of {self.weights:,} weights masked out, {self.bits_per_weight:.3f} bits a weight "
            f"(entropy bound {self.bound:.3f})"
        )


@dataclass(frozen=True)
class Inspection:
    """A patch in figures. `file_bytes` is the exact size of its file and `file_sha256` the hash of those bytes.

    The bytes of the parts and `header_bytes` add up to `file_bytes`; every span sums the parts that name it. `stored` says
    how many of the `numbers` each codec stores: `int8` leaves vectors to `float32`.
    """

    task: str
    kind: str
    classes: int
    method: str
    hyperparameters: dict[str, Any]
    backbone: str
    backbone_parameters: int
    backbone_bytes: int
    fingerprint: str
    image_size: int
    spans: tuple[SpanFigures, ...]
    parts: tuple[Part, ...]
    header_bytes: int
    masks: MaskFigures | None
    strength: float
    numbers: int
    stored: dict[str, int]
    tensor_bytes: int
    file_bytes: int
    file_sha256: str
    content_hash: str
    options: dict[str, Any]
    metrics: dict[str, Any]
    created: dict[str, Any]

    @classmethod
    def of(
        cls,
        data: bytes,
        tensors: Tensors,
        int8: Collection[str],
        spans: tuple[Span, ...],
        chain: Chain | None,
        **facts: Any,
    ) -> Self:
        """The figures of a file's bytes and of the tensors in it, beside the `facts` of its header."""
        sizes, codecs = _stored_bytes(tensors, int8)
        parts = _parts(tensors, spans, chain, sizes, codecs)
        counts: Counter[str] = Counter()
        for name, codec in codecs.items():
            counts[codec.partition(":")[0]] += tensors[name].numel()
        tensor_bytes = round(sum(sizes.values()))
        return cls(
            spans=_spans(parts, chain),
            parts=parts,
            header_bytes=len(data) - tensor_bytes,
            masks=_mask_figures(tensors, sizes),
            numbers=sum(part.numbers for part in parts),
            stored=dict(counts.most_common()),
            tensor_bytes=tensor_bytes,
            file_bytes=len(data),
            file_sha256=hashlib.sha256(data).hexdigest(),
            **facts,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = kind_of(self.kind)
        rows = [(f"{part.kind} {part.name}", part.numbers, part.bytes) for part in self.parts]
        return "\n".join(
            [
                f"{self.task}: {self.kind}, {count_of(self.classes, kind.noun, kind.nouns)}, made by {self.method} for "
                f"{self.backbone}",
                *(f"  {name:<48}{numbers:>12,} numbers{size:>14,} bytes" for name, numbers, size in rows),
                f"  {'header':<48}{'':>20}{self.header_bytes:>14,} bytes",
                f"  file {self.file_bytes:,} bytes, sha256 {self.file_sha256[:16]}, image size {self.image_size} px",
                *([f"  masks: {self.masks}"] if self.masks else []),
                *(f"  {name}: {value}" for name, value in self.metrics.items()),
            ]
        )


def _parts(
    tensors: Tensors, spans: tuple[Span, ...], chain: Chain | None, sizes: dict[str, float], codecs: dict[str, str]
) -> tuple[Part, ...]:
    """One part a module that holds tensors of the patch, in the order of spans, then of names, the head last."""
    groups: dict[tuple[str, str, Span | None], list[str]] = {}
    for name in sorted(tensors):  # a file that was read has them in no order
        groups.setdefault(_group(name, chain, spans), []).append(name)
    parts = []
    done, written = 0.0, 0
    order = sorted(groups, key=lambda key: (key[0] == "head", key[2] is None, key[2] or (0, 0), *key[:2]))
    for kind, name, span in order:
        members = groups[kind, name, span]
        done += sum(sizes[member] for member in members)
        parts.append(
            Part(
                name=name,
                kind=kind,
                tensors=len(members),
                numbers=sum(tensors[member].numel() for member in members),
                bytes=round(done) - written,  # shares of a stream are rounded so that they add up to it
                codecs=tuple(sorted({codecs[member].partition(":")[0] for member in members})),
                kept=_kept([tensors[member] for member in members]) if kind == "mask" else None,
                span=span,
            )
        )
        written = round(done)
    return tuple(parts)


def _group(name: str, chain: Chain | None, spans: tuple[Span, ...]) -> tuple[str, str, Span | None]:
    """(kind, the module that holds the tensor, the span it belongs to as far as that can be told)."""
    if name.startswith("head."):
        return "head", "head", None
    kind, _, rest = name.partition("/")
    span = None
    if kind == "graft":
        start, _, end = rest.partition("/")[0].partition("-")
        span = int(start), int(end)
    elif chain is not None:
        index = chain.segment_of(rest).index
        span = next(span for span in spans if span[0] <= index < span[1])
    return kind, rest.rpartition(".")[0], span


def _spans(parts: tuple[Part, ...], chain: Chain | None) -> tuple[SpanFigures, ...]:
    figures = []
    for span in dict.fromkeys(part.span for part in parts if part.span is not None):
        members = [part for part in parts if part.span == span]
        name = "" if chain is None else " to ".join(dict.fromkeys((chain[span[0]].name, chain[span[1] - 1].name)))
        figures.append(SpanFigures(span, name, sum(p.numbers for p in members), sum(p.bytes for p in members)))
    return tuple(figures)


def _stored_bytes(tensors: Tensors, int8: Collection[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Bytes and codec of every tensor in the file."""
    stored, codecs = pack({name: tensor.detach().cpu() for name, tensor in tensors.items()}, int8)
    sizes: dict[str, float] = {}
    for name in tensors:
        entries = (name, SCALE + name, WHERE + name)
        sizes[name] = sum(stored[entry].nbytes for entry in entries if entry in stored)
    if STREAM in stored:
        coded = [name for name, codec in codecs.items() if codec.startswith("entropy-")]
        bounds = {name: entropy_bound(tensors[name]) for name in coded}
        for name in coded:
            share = bounds[name] / sum(bounds.values()) if sum(bounds.values()) else 1 / len(coded)
            sizes[name] += stored[STREAM].nbytes * share
    return sizes, codecs


def entropy_bound(mask: Tensor) -> float:
    """The fewest bits for a mask whose weights are independent: n H(share kept), and a sign for each kept ternary one."""
    kept = int(mask.count_nonzero())
    signs = entropy_bits(int((mask > 0).sum()), kept) if mask.dtype == torch.int8 and kept else 0.0
    return entropy_bits(kept, mask.numel()) + signs


def _kept(masks: list[Tensor]) -> float:
    return sum(int(mask.count_nonzero()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)


def _mask_figures(tensors: Tensors, sizes: dict[str, float]) -> MaskFigures | None:
    masks = {name: tensor for name, tensor in tensors.items() if name.startswith("mask/")}
    weights = sum(mask.numel() for mask in masks.values())
    if not weights:
        return None
    return MaskFigures(
        weights=weights,
        kept=_kept(list(masks.values())),
        bits_per_weight=8 * sum(sizes[name] for name in masks) / weights,
        bound=sum(map(entropy_bound, masks.values())) / weights,
    )

"""What a patch holds, for people and for scripts."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelpatch.patch.codec import SCALE, STREAM, WHERE, pack
from modelpatch.patch.entropy import entropy_bits
from modelpatch.patch.file import encode_patch

if TYPE_CHECKING:
    from modelpatch.patch.patch import Patch


@dataclass(frozen=True)
class Part:
    """A group of tensors: one module of the backbone, one graft, or the head.

    `bytes` are those in the file; of an entropy-coded stream every mask counts its share of the bound. `kept` is the share
    of weights that a mask keeps.
    """

    name: str
    kind: str
    tensors: int
    numbers: int
    bytes: int
    codecs: tuple[str, ...]
    kept: float | None = None


@dataclass(frozen=True)
class MaskFigures:
    """All masks of a patch: `bits_per_weight` in the file, and `bound`, the entropy of the layers' shares of kept weights."""

    weights: int
    kept: float
    bits_per_weight: float
    bound: float

    @property
    def sparsity(self) -> float:
        """Percent of weights that are masked out."""
        return 100 * (1 - self.kept)

    def __str__(self) -> str:
        return (
            f"{self.sparsity:.1f} % of {self.weights:,} weights masked out, {self.bits_per_weight:.3f} bits a weight "
            f"(entropy bound {self.bound:.3f})"
        )


@dataclass(frozen=True)
class Inspection:
    """A patch in figures. `file_bytes` is the exact size of its file and `file_sha256` the hash of those bytes."""

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
    parts: tuple[Part, ...]
    masks: MaskFigures | None
    strength: float
    numbers: int
    tensor_bytes: int
    file_bytes: int
    file_sha256: str
    content_hash: str
    metrics: dict[str, Any]
    created: dict[str, Any]

    @classmethod
    def of(cls, patch: Patch) -> Inspection:
        sizes, codecs = _stored_bytes(patch)
        groups: dict[tuple[str, str], list[str]] = {}
        for name in sorted(patch.tensors):  # a file that was read has them in no order
            groups.setdefault(_group(name), []).append(name)
        parts = tuple(
            Part(
                name=name,
                kind=kind,
                tensors=len(members),
                numbers=sum(patch.tensors[member].numel() for member in members),
                bytes=round(sum(sizes[member] for member in members)),
                codecs=tuple(sorted({codecs[member].partition(":")[0] for member in members})),
                kept=_kept([patch.tensors[member] for member in members]) if kind == "mask" else None,
            )
            for (kind, name), members in groups.items()
        )
        data = encode_patch(patch)
        return cls(
            task=patch.task.name,
            kind=patch.task.kind,
            classes=len(patch.task.classes),
            method=patch.method.name,
            hyperparameters=dict(patch.method.hyperparameters),
            backbone=patch.backbone.spec,
            backbone_parameters=patch.backbone.parameters,
            backbone_bytes=patch.backbone.bytes,
            fingerprint=patch.backbone.fingerprint.whole,
            image_size=patch.preprocessing.image_size,
            parts=parts,
            masks=_mask_figures(patch, sizes),
            strength=patch.strength,
            numbers=sum(part.numbers for part in parts),
            tensor_bytes=round(sum(sizes.values())),
            file_bytes=len(data),
            file_sha256=hashlib.sha256(data).hexdigest(),
            content_hash=patch.content_hash,
            metrics=dict(patch.metrics),
            created=dict(patch.created),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(f"{part.kind} {part.name}", f"{part.numbers:,}", f"{part.bytes:,}") for part in self.parts]
        table = [f"  {name:<48}{numbers:>12} numbers{size:>14} bytes" for name, numbers, size in rows]
        return "\n".join(
            [
                f"{self.task}: {self.kind}, {self.classes} classes, made by {self.method} for {self.backbone}",
                *table,
                f"  file {self.file_bytes:,} bytes, sha256 {self.file_sha256[:16]}, image size {self.image_size} px",
                *([f"  masks: {self.masks}"] if self.masks else []),
                *(f"  {name}: {value}" for name, value in self.metrics.items()),
            ]
        )


def _stored_bytes(patch: Patch) -> tuple[dict[str, float], dict[str, str]]:
    """Bytes and codec of every tensor in the file."""
    stored, codecs = pack({name: tensor.detach().cpu() for name, tensor in patch.tensors.items()}, patch.int8)
    sizes: dict[str, float] = {}
    for name in patch.tensors:
        entries = (name, SCALE + name, WHERE + name)
        sizes[name] = sum(stored[entry].nbytes for entry in entries if entry in stored)
    if STREAM in stored:
        coded = [name for name, codec in codecs.items() if codec.startswith("entropy-")]
        bounds = {name: entropy_bound(patch.tensors[name]) for name in coded}
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


def _mask_figures(patch: Patch, sizes: dict[str, float]) -> MaskFigures | None:
    masks = {name: tensor for name, tensor in patch.tensors.items() if name.startswith("mask/")}
    weights = sum(mask.numel() for mask in masks.values())
    if not weights:
        return None
    return MaskFigures(
        weights=weights,
        kept=_kept(list(masks.values())),
        bits_per_weight=8 * sum(sizes[name] for name in masks) / weights,
        bound=sum(map(entropy_bound, masks.values())) / weights,
    )


def _group(name: str) -> tuple[str, str]:
    """(kind, the module that holds the tensor)."""
    if name.startswith("head."):
        return "head", "head"
    kind, _, rest = name.partition("/")
    return kind, rest.rpartition(".")[0]

"""What a patch holds, for people and for scripts."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from modelpatch.patch.file import encode_patch

if TYPE_CHECKING:
    from modelpatch.patch.patch import Patch


@dataclass(frozen=True)
class Part:
    """A group of tensors: one module of the backbone, one graft, or the head."""

    name: str
    kind: str
    tensors: int
    numbers: int
    bytes: int
    dtypes: tuple[str, ...]


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
    numbers: int
    tensor_bytes: int
    file_bytes: int
    file_sha256: str
    content_hash: str
    metrics: dict[str, Any]
    created: dict[str, Any]

    @classmethod
    def of(cls, patch: Patch) -> Inspection:
        groups: dict[tuple[str, str], list[Any]] = {}
        for name, tensor in sorted(patch.tensors.items()):  # a file that was read has them in no order
            groups.setdefault(_group(name), []).append(tensor)
        parts = tuple(
            Part(
                name=name,
                kind=kind,
                tensors=len(tensors),
                numbers=sum(tensor.numel() for tensor in tensors),
                bytes=sum(tensor.nbytes for tensor in tensors),
                dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
            )
            for (kind, name), tensors in groups.items()
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
            numbers=sum(part.numbers for part in parts),
            tensor_bytes=sum(part.bytes for part in parts),
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
                *(f"  {name}: {value}" for name, value in self.metrics.items()),
            ]
        )


def _group(name: str) -> tuple[str, str]:
    """(kind, the module that holds the tensor)."""
    if name.startswith("head."):
        return "head", "head"
    kind, _, rest = name.partition("/")
    return kind, rest.rpartition(".")[0]

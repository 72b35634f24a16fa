"""Compare two patches of one backbone: the distance between their changes of every weight.

    distance = |delta_a - delta_b|        cosine = delta_a . delta_b / (|delta_a| |delta_b|)

The change of a weight is W' - W, whether the patch stores a replaced weight, a mask, a difference or factors. Added modules
and heads are compared by their own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import PatchError
from modelpatch.patch.changes import resolve
from modelpatch.patch.contents import Patch


@dataclass(frozen=True)
class TensorDifference:
    """One tensor: `first` and `second` are the Euclidean norms of the two changes, `cosine` None where one is zero."""

    name: str
    numbers: int
    first: float
    second: float
    distance: float
    cosine: float | None

    @classmethod
    def of(cls, name: str, first: Tensor, second: Tensor) -> TensorDifference:
        """Of two changes of one shape."""
        a, b = first.double().flatten(), second.double().flatten()
        sizes = float(a.norm()), float(b.norm())
        cosine = float(a @ b) / (sizes[0] * sizes[1]) if all(sizes) else None
        return cls(name, a.numel(), *sizes, float((a - b).norm()), cosine)


@dataclass(frozen=True)
class Difference:
    """`facts` are what the two files say differently, as (what, first, second); `total` is over all changed weights."""

    facts: tuple[tuple[str, str, str], ...]
    rows: tuple[TensorDifference, ...]
    total: TensorDifference | None

    @property
    def same(self) -> bool:
        """True if the two patches compute the same."""
        return all(row.distance == 0 for row in self.rows) and not any(what == "head" for what, *_ in self.facts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "same": self.same}


def diff(backbone: Backbone, first: Patch, second: Patch) -> Difference:
    """Compare two patches. Raises `WrongBackboneError` unless both are of this backbone."""
    changes = [compute_changes(backbone, patch) for patch in (first, second)]
    rows = []
    for name in sorted(changes[0].keys() | changes[1].keys()):
        given = [change.get(name) for change in changes]
        present = [tensor for tensor in given if tensor is not None]
        if len({tensor.shape for tensor in present}) == 1:
            a, b = (torch.zeros_like(present[0]) if tensor is None else tensor for tensor in given)
            rows.append(TensorDifference.of(name, a, b))
    body = [row.name for row in rows if not row.name.startswith("head.")]
    total = _total(body, changes) if body else None
    return Difference(_facts(first, second), tuple(rows), total)


def compute_changes(backbone: Backbone, patch: Patch) -> dict[str, Tensor]:
    """W' - W at the patch's strength, float32 on the CPU, by the backbone's names; other tensors by theirs in the file."""
    patch.check_backbone(backbone)
    numbers = {}
    for name, tensor in resolve(patch.tensors, backbone.chain, patch.strength).items():
        base = name.removeprefix("replace/")
        change = tensor.float().cpu()
        numbers[base] = change - backbone.chain.tensor(base).detach().cpu() if base != name else change
    return numbers


def _total(names: list[str], changes: list[dict[str, Tensor]]) -> TensorDifference:
    def flat(change: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([change[n].flatten() if n in change else torch.zeros(other[n].numel()) for n in names])

    return TensorDifference.of("all", flat(changes[0], changes[1]), flat(changes[1], changes[0]))


def _facts(first: Patch, second: Patch) -> tuple[tuple[str, str, str], ...]:
    told = {
        "task": [patch.task.name for patch in (first, second)],
        "classes": [", ".join(patch.task.classes) for patch in (first, second)],
        "method": [patch.method.name for patch in (first, second)],
        "image size": [f"{patch.preprocessing.image_size} px" for patch in (first, second)],
        "strength": [f"{patch.strength:g}" for patch in (first, second)],
        "head": [f"{p.head.kind}, {p.head.outputs} of {p.head.features}" for p in (first, second)],
        "added modules": [", ".join(graft.kind for graft in patch.grafts) or "none" for patch in (first, second)],
    }
    return tuple((what, a, b) for what, (a, b) in told.items() if a != b)


def check_pair(first: Patch, second: Patch) -> None:
    """Raises `PatchError` for patches of two backbones, which have nothing to compare."""
    if first.backbone.fingerprint.chain != second.backbone.fingerprint.chain:
        raise PatchError(
            f"the patches belong to different backbones ({first.backbone.spec} and {second.backbone.spec}, by their content). "
            "Only patches of one backbone can be compared or merged."
        )

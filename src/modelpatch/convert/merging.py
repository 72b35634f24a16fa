"""Arithmetic on what patches of one backbone add to the frozen weights: two compared, several merged into one.

    distance = |delta_a - delta_b|        cosine = delta_a . delta_b / (|delta_a| |delta_b|)

The change of a weight is W' - W, whatever the patch stores; added modules and heads are compared by their own tensors.
Merging adds up changes by one of three rules, with delta_i = W_i - W, the change of patch i at its strength:

    sum     W + sum_i a_i delta_i                    model soups, task arithmetic, PAINT's parallel patching (section 2)
    ties    keep the `density` largest numbers of every a_i delta_i, choose the sign of their sum for every weight,
            then the mean of those that agree with it
    dare    drop each number of delta_i with probability `drop`, divide the others by 1 - drop; then `sum`

Ilharco et al., *Editing Models with Task Arithmetic* (2023); Yadav et al., *TIES-Merging* (2023), algorithm 1; Yu et al.,
*Language Models are Super Mario* (2024), equations 2 to 4. Heads are never averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import PatchError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.changes import resolve
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.provenance import describe_making
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord

RULES = ("sum", "ties", "dare")
Change = dict[str, Tensor]


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
    def of(cls, name: str, first: Tensor, second: Tensor) -> Self:
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
    pairs: dict[str, list[Tensor]] = {}
    for name in sorted(changes[0].keys() | changes[1].keys()):
        given = [change.get(name) for change in changes]
        present = [tensor for tensor in given if tensor is not None]
        if len({tensor.shape for tensor in present}) == 1:
            pairs[name] = [torch.zeros_like(present[0]) if tensor is None else tensor for tensor in given]
    rows = tuple(TensorDifference.of(name, *pair) for name, pair in pairs.items())
    body = [[tensor.flatten() for tensor in pair] for name, pair in pairs.items() if not name.startswith("head.")]
    total = TensorDifference.of("all", *map(torch.cat, zip(*body, strict=True))) if body else None
    told = {
        "task": [patch.task.name for patch in (first, second)],
        "kind": [patch.task.kind for patch in (first, second)],
        "classes": [", ".join(patch.task.classes) for patch in (first, second)],
        "method": [patch.method.name for patch in (first, second)],
        "image size": [f"{patch.preprocessing.image_size} px" for patch in (first, second)],
        "strength": [f"{patch.strength:g}" for patch in (first, second)],
        "head": [f"{p.head.kind}, {p.head.outputs} of {p.head.features}" for p in (first, second)],
        "added modules": [", ".join(graft.kind for graft in patch.grafts) or "none" for patch in (first, second)],
    }
    return Difference(tuple((what, a, b) for what, (a, b) in told.items() if a != b), rows, total)


def compute_changes(backbone: Backbone, patch: Patch) -> dict[str, Tensor]:
    """W' - W at the patch's strength, float32 on the CPU, by the backbone's names; other tensors by theirs in the file."""
    patch.check_backbone(backbone)
    numbers = {}
    for name, tensor in resolve(patch.tensors, backbone.chain, patch.strength).items():
        base = name.removeprefix("replace/")
        change = tensor.float().cpu()
        numbers[base] = change - backbone.chain.tensor(base).detach().cpu() if base != name else change
    return numbers


def check_pair(first: Patch, second: Patch) -> None:
    """Raises `PatchError` for patches of two backbones, which have nothing to compare."""
    if difference := first.backbone.difference(second.backbone):
        raise PatchError(
            f"the patches belong to different backbones: {difference}. Only patches of one backbone can be compared or merged."
        )


def change_of(backbone: Backbone, patch: Patch) -> Change:
    """Differences that a patch adds to the backbone's tensors at its strength, float32 on the CPU, by name.

    Raises `PatchError` for a patch that adds modules.
    """
    if patch.grafts:
        raise PatchError(
            f"the {patch.method.name} patch of {patch.task.name} adds modules ({patch.grafts[0].kind}). Expected "
            "patches of changed weights alone."
        )
    changes = compute_changes(backbone, patch)
    return {name: change for name, change in changes.items() if not name.startswith("head.")}


def merge(
    backbone: Backbone,
    patches: Sequence[Patch],
    *,
    weights: Sequence[float] | None = None,
    rule: str = "sum",
    density: float = 0.2,
    drop: float = 0.9,
    seed: int = 0,
    head: int | Literal["all"] = 0,
) -> Patch:
    """Merge the bodies of patches into one patch, by the `rule` (see the module's table).

    `weights` are the a_i, by default 1 / n each, and 1 each for `ties`, which takes a mean itself. `head` is the number of the
    patch whose head, task and preprocessing the merged one has, or `all`: the classes of all patches side by side, named
    `TASK: CLASS` where two tasks have a class of one name. `seed` is that of the random choice of `dare`.

    Raises `PatchError` for patches that cannot be added up and for options that make no sense, `WrongBackboneError`,
    `ForeignTensorError`.
    """
    if not patches:
        raise PatchError("no patches were given. Expected at least one.")
    count = len(patches)
    if rule not in RULES:
        raise PatchError(f"there is no rule {rule!r}. Expected one of: {', '.join(RULES)}.")
    if weights is not None and len(weights) != count:
        raise PatchError(f"{len(weights)} weights are given for {count} patches.")
    if not 0 < density <= 1:
        raise PatchError(f"the density is {density}; expected a share of the numbers above 0, at most 1.")
    if not 0 <= drop < 1:
        raise PatchError(f"the share to drop is {drop}; expected one from 0 to below 1.")
    if head != "all" and not (isinstance(head, int) and 0 <= head < count):
        raise PatchError(f"head is {head!r}; expected 'all', or the number of a patch from 0 to {count - 1}.")
    factors = [1.0 if rule == "ties" else 1 / count] * count if weights is None else list(weights)
    changes = [change_of(backbone, patch) for patch in patches]
    if rule == "dare":
        generator = torch.Generator().manual_seed(seed)
        for change in changes:
            for name, delta in change.items():
                dropped = torch.rand(delta.shape, generator=generator) < drop
                change[name] = torch.where(dropped, 0.0, delta / (1 - drop))
    scaled = [{name: a * delta for name, delta in one.items()} for a, one in zip(factors, changes, strict=True)]
    merged = elect(scaled, density) if rule == "ties" else add(scaled)
    start = patches[0] if head == "all" else patches[head]
    task, record, tensors = _join_heads(patches) if head == "all" else (start.task, start.head, _head(start))
    used: dict[str, Any] = {"rule": rule, "weights": factors, "tasks": [patch.task.name for patch in patches]}
    used |= {"ties": {"density": density}, "dare": {"drop": drop, "seed": seed}}.get(rule, {})
    method = MethodRecord(name="merge", hyperparameters=used)
    tensors |= {f"delta/{name}": delta for name, delta in merged.items() if delta.any()}
    made = replace(start, task=task, head=record, method=method, tensors=tensors)
    return replace(made, int8=frozenset(), strength=1.0, metrics={}, created=describe_making())


def add(changes: Sequence[Mapping[str, Tensor]]) -> Change:
    """The sum of changes, name by name; a tensor that one of them leaves alone counts as zero there."""
    total: Change = {}
    for change in changes:
        for name, delta in change.items():
            total[name] = total[name] + delta if name in total else delta
    return total


def elect(changes: Sequence[Mapping[str, Tensor]], density: float) -> Change:
    """TIES: trim every change to the share `density` of its numbers, elect a sign a weight, average what agrees with it."""
    trimmed = []
    for change in filter(None, changes):
        sizes = torch.cat([delta.abs().flatten() for delta in change.values()])
        keep = max(round(density * len(sizes)), 1)
        least = torch.kthvalue(sizes, len(sizes) - keep + 1).values
        trimmed.append({name: torch.where(delta.abs() >= least, delta, 0.0) for name, delta in change.items()})
    merged = {}
    for name in dict.fromkeys(name for change in trimmed for name in change):
        stack = torch.stack([change[name] for change in trimmed if name in change])
        agreeing = stack * (stack.sign() == stack.sum(0).sign())
        merged[name] = agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)
    return merged


def _head(patch: Patch) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in patch.tensors.items() if name.startswith("head.")}


def _join_heads(patches: Sequence[Patch]) -> tuple[TaskRecord, HeadRecord, dict[str, Tensor]]:
    first = patches[0]
    kinds = {(patch.head.kind, patch.head.features, patch.preprocessing) for patch in patches}
    if len({patch.task.kind for patch in patches}) > 1:
        told = ", ".join(f"{patch.task.name}: {patch.task.kind}" for patch in patches)
        raise PatchError(f"heads of tasks of several kinds cannot be joined ({told}). Name one with head.")
    if len(kinds) > 1 or first.head.taps:
        raise PatchError("heads of different kinds, widths or preprocessings cannot be joined. Name one with head.")
    names = [name for patch in patches for name in patch.task.classes]
    pairs = [(patch.task.name, name) for patch in patches for name in patch.task.classes]
    classes = [f"{task}: {name}" if names.count(name) > 1 else name for task, name in pairs]
    if len(set(classes)) < len(classes):
        raise PatchError("two of the patches answer the same classes of one task. Name one of their heads with head.")
    parts = {name: torch.cat([patch.tensors[name].float() for patch in patches]) for name in _head(first)}
    options = kind_of(first.task.kind).join_options([patch.task for patch in patches])
    task = TaskRecord(
        name="+".join(patch.task.name for patch in patches)[:256],
        kind=first.task.kind,
        classes=tuple(classes),
        options=options,
    )
    return task, first.head.model_copy(update={"outputs": len(classes)}), parts

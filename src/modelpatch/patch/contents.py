"""A patch: tensors, a head and a task that turn a frozen backbone into the model for the task."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain
from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import NotAPatchError, PatchError, WrongBackboneError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch import hub
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.changes import MADE
from modelpatch.patch.codec import FLOATS, STORAGE, snap_int8
from modelpatch.patch.entropy import MAX_BITS
from modelpatch.patch.file import BackboneRecord, MethodRecord, check_file, decode_file, encode_file
from modelpatch.patch.inspect import Inspection
from modelpatch.patch.signing import Signers, check_file_signer
from modelpatch.plain_files import read_plain
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

STATED = (
    "modelpatch",
    "commit",
    "torch",
    "timm",
    "date",
    "command",
    "data_sha256",
    "run",
)  # facts that signatures state
CHANGES = ("replace/", *MADE)
SHARED = ("backbone", "task", "preprocessing", "head", "method", "grafts", "strength", "metrics", "created")


class HasTask(Protocol):
    """Data of a task, such as `modelpatch.Task`."""

    @property
    def task(self) -> TaskRecord: ...


PatchTask = TaskRecord | HasTask | tuple[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Tensors over a backbone, a head, a task and where they come from.

    `tensors` are named as in the file: `replace/<base name>`, `mask/<base name>` (bool, or int8 for ternary masks),
    `delta/<base name>`, `left/<base name>` and `right/<base name>`, `graft/<i>-<j>/<name>`, `head.<name>`; `int8` names those
    that the file stores as integers.
    `strength` is the share of the change that is applied, 1 as trained. `preprocessing` is how the task's images are seen,
    `metrics` what was measured, `created` the facts of the run.
    """

    backbone: BackboneRecord
    task: TaskRecord
    preprocessing: Preprocessing
    head: HeadRecord
    method: MethodRecord
    tensors: Mapping[str, Tensor]
    grafts: tuple[Graft, ...] = ()
    int8: frozenset[str] = frozenset()
    strength: float = 1.0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    created: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        task: PatchTask,
        head: HeadRecord,
        tensors: Mapping[str, Tensor],
        *,
        grafts: Sequence[Graft] = (),
        int8: Iterable[str] = (),
        preprocessing: Preprocessing | None = None,
        method: Any = None,
        metrics: Mapping[str, Any] | None = None,
        created: Mapping[str, Any] | None = None,
    ) -> Self:
        """A patch of strength 1 for a backbone at hand. The arguments are those of `PatchedModel.to_patch`.

        Raises `PatchError` for a task or method that has no record and a head with another number of outputs than classes.
        """
        record = record_task(task)
        if head.outputs != len(record.classes):
            raise PatchError(
                f"the head has {head.outputs} outputs for {len(record.classes)} classes of {record.name!r}."
            )
        return cls(
            backbone=BackboneRecord.of(backbone),
            task=record,
            preprocessing=preprocessing or backbone.preprocessing,
            head=head,
            method=MethodRecord.of(method),
            tensors=tensors,
            grafts=tuple(grafts),
            int8=frozenset(int8),
            metrics=dict(metrics or {}),
            created=dict(created or {}),
        )

    @cached_property
    def blueprint(self) -> Blueprint:
        """The structure of the patched model: the names of the changed tensors and the grafts."""
        owned = {name.partition("/")[2] for name in self.tensors if name.startswith(CHANGES)}
        return Blueprint(owned=tuple(sorted(owned)), grafts=self.grafts)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the patch computes: its tensors, grafts and backbone, not its provenance or its file's coding."""
        grafts = json.dumps([[graft.model_dump() for graft in self.grafts], self.strength], sort_keys=True)
        frozen = self.backbone.fingerprint.chain + grafts
        return hash_tensors(self.tensors.items())[:32] + hash_tensors([(frozen, torch.zeros(0))])[:32]

    @property
    def provenance(self) -> dict[str, Any]:
        """The facts that a signature states beside the file's hash: the task, the base, and how the patch was made."""
        of = self.backbone.fingerprint
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "method": self.method.name,
            "backbone": {"spec": self.backbone.spec, "sha256": of.whole, "chain": of.chain},
            "created": {name: self.created[name] for name in STATED if name in self.created},
        }

    @classmethod
    def load(cls, path: str | Path, *, signers: Signers | None = None) -> "Patch":
        """Read a patch file. Raises a `PatchFileError` that names what can be seen to be wrong without the backbone.

        With `signers` one of them has to have signed the file, beside which the signature is looked for: `PATCH.sig`.
        """
        data = read_patch_file(path)
        if signers is not None:
            check_file_signer(path, data, signers)
        return decode_patch(data, str(path))

    def save(self, path: str | Path, *, compress: bool = True) -> Path:
        """Write the patch atomically and durably. Returns the path.

        Masks are entropy-coded where that is smaller and `constriction` is installed, unless `compress` is False.
        """
        write_bytes(Path(path), encode_patch(self, compress))
        return Path(path)

    def check_savable(self) -> int:
        """Check all that could stop the patch from being saved but its numbers and the disk; return its bytes, roughly.

        Raises `HostileNameError` for a tensor's name, other `PatchError`s for types and facts that no file could hold.
        """
        return check_file({name: getattr(self, name) for name in SHARED}, self.tensors, self.int8)

    def inspect(self, chain: Chain | None = None) -> Inspection:
        """Figures of the patch: per span, bytes, hashes and metrics. `print()` them.

        Without the backbone's `chain` only added modules have their span. Raises `ForeignTensorError` for another chain.
        """
        return Inspection.of(
            encode_patch(self),
            self.tensors,
            self.int8,
            () if chain is None else self.blueprint.spans(chain),
            chain,
            task=self.task.name,
            kind=self.task.kind,
            classes=len(self.task.classes),
            method=self.method.name,
            hyperparameters=dict(self.method.hyperparameters),
            backbone=self.backbone.spec,
            backbone_parameters=self.backbone.parameters,
            backbone_bytes=self.backbone.bytes,
            fingerprint=self.backbone.fingerprint.whole,
            image_size=self.preprocessing.image_size,
            strength=self.strength,
            content_hash=self.content_hash,
            options=dict(self.task.options),
            metrics=dict(self.metrics),
            created=dict(self.created),
        )

    def astype(self, dtype: str) -> Self:
        """The patch with its floating tensors stored as `float32`, `float16`, `bfloat16` or `int8`.

        `int8` stores matrices and convolutions with one scale per output channel, vectors as float32; what the kind of the
        task needs exact is float32 always. Models compute in float32 whatever the file stores. Raises `PatchError` for another
        name.
        """
        if dtype not in STORAGE:
            raise PatchError(f"cannot store tensors as {dtype!r}. Expected one of: {', '.join(STORAGE)}.")
        floating = {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        exact = kind_of(self.task.kind).exact
        changed = {
            name: tensor.to(torch.float32 if name in exact else FLOATS.get(dtype, torch.float32))
            for name, tensor in floating.items()
        }
        int8 = frozenset[str]()
        if dtype == "int8":
            int8 = frozenset(n for n, t in floating.items() if t.ndim > 1 and not n.startswith("delta/"))
            changed |= {name: snap_int8(floating[name]) for name in int8}
        return replace(self, tensors={**self.tensors, **changed}, int8=int8)

    @property
    def head_tensors(self) -> dict[str, Tensor]:
        """The head's tensors by its own names."""
        return {name.removeprefix("head."): tensor for name, tensor in self.tensors.items() if name.startswith("head.")}

    def with_head(self, head: Any, task: TaskRecord) -> Self:
        """The patch with another head, for another task."""
        body = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("head.")}
        own = {f"head.{name}": tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
        return replace(self, task=task, head=head.record, tensors={**body, **own}, int8=self.int8 & body.keys())

    def at_strength(self, strength: float) -> Self:
        """The patch with `strength` in [0, 1] of its change: 0 computes the base's features, 1 what was trained.

        Replaced tensors become W + strength (W' - W), as in PAINT's weight interpolation; added modules scale their effect.
        The head stays. Raises `PatchError` outside [0, 1] and for masks, which do not interpolate.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise PatchError(f"strength is {strength!r}; expected a number from 0 (the base) to 1 (as trained).")
        if strength != 1 and any(name.startswith("mask/") for name in self.tensors):
            raise PatchError("masks do not interpolate: this patch works at strength 1 only.")
        if strength != 1 and (whole := [graft.kind for graft in self.grafts if not graft.interpolates]):
            raise PatchError(f"{whole[0]} blocks do not interpolate: this patch works at strength 1 only.")
        return replace(self, strength=float(strength))

    def with_alpha(self, alpha: float) -> Self:
        """`at_strength` by PAINT's name for it: theta = (1 - alpha) theta_0 + alpha theta_1."""
        return self.at_strength(alpha)

    def on(self, backbone: Backbone) -> Self:
        """The patch with the record of a backbone at hand, which it fits: what it computes, for files that do not say it.

        Raises what `check_backbone` does.
        """
        self.check_backbone(backbone)
        return replace(self, backbone=BackboneRecord.of(backbone))

    def with_metrics(self, **metrics: Any) -> Self:
        """The patch with more measured figures."""
        return replace(self, metrics={**self.metrics, **metrics})

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises `WrongBackboneError` unless the chain has, byte for byte, the tensors that the patch was made for and
        computes the same with them. One warning tells of a file that does not say what was computed.

        The base's own classifier may differ: no patch reads it. Raises `BackboneError` for a patch whose images the
        backbone cannot take.
        """
        expected, given = self.backbone.fingerprint, backbone.fingerprints
        if expected.chain == given.chain:
            backbone.check_image_size(self.preprocessing.image_size)
            made = self.backbone
            backbone.check_computation(made.computation, "this patch", made.spec, made.arguments)
            return
        described = f"this patch was made for {self.backbone.spec} (chain {expected.chain[:12]})"
        if len(expected.segments) != len(given.segments):
            raise WrongBackboneError(
                f"{described}, which has {len(expected.segments)} segments; {backbone.spec} has {len(given.segments)}."
            )
        pairs = zip(backbone.chain, expected.segments, given.segments, strict=True)
        differing = [segment for segment, before, now in pairs if before != now]
        touched = {i for start, end in self.blueprint.spans(backbone.chain) for i in range(start, end)}
        hit = sum(segment.index in touched for segment in differing)
        raise WrongBackboneError(
            f"{described}; {backbone.spec} differs in {len(differing)} of {len(backbone.chain)} segments, {hit} of them "
            f"patched, first {differing[0].name!r}.",
            "Load the backbone with the weights the patch was made for.",
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the patch and a model card with its measured figures to the Hugging Face hub. Returns the commit's URL."""
        card = hub.model_card(self.inspect(), self.task.classes, repo_id)
        message = f"Add the patch {self.task.name} ({self.method.name})"
        return hub.upload(encode_patch(self), card, repo_id, message, private=private, token=token)

    @classmethod
    def from_pretrained(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> "Patch":
        """Download a patch from the Hugging Face hub and check it like any file."""
        return decode_patch(hub.download(repo_id, revision=revision, token=token), f"{repo_id}/{hub.FILE}")

    def __repr__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        return f"Patch({self.task.name!r}, {self.method.name}, {numbers:,} numbers, for {self.backbone.spec})"


def record_task(task: PatchTask) -> TaskRecord:
    """The record of a task given as data, record, or name and classes. Raises `PatchError` for anything else."""
    record: Any = getattr(task, "task", task)
    if isinstance(record, TaskRecord):
        return record
    try:
        name, classes = record
        return TaskRecord(name=name, classes=tuple(classes))
    except ValidationError as error:
        raise PatchError(f"{task!r:.200} is not a task: {first_problem(error)}.") from error
    except (TypeError, ValueError) as error:
        raise PatchError(f"{task!r:.200} is not a task. Expected a Task, a TaskRecord or (name, classes).") from error


def read_patch_file(path: str | PathLike[str]) -> bytes:
    """The bytes of a patch file, not looked at. Raises `NotAPatchError` where they cannot be read."""
    if not isinstance(path, str | PathLike):
        raise NotAPatchError(f"{path!r:.200} is no path. Expected that of a patch file.")
    try:
        return read_plain(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise NotAPatchError(f"{str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', error)}.") from error


def encode_patch(patch: Patch, compress: bool = True) -> bytes:
    """The bytes of a patch's file. Raises `PatchError` for a patch that no reader would accept."""
    return encode_file({name: getattr(patch, name) for name in SHARED}, patch.tensors, patch.int8, compress)


def decode_patch(data: bytes, name: str = "the patch", most: int = MAX_BITS) -> Patch:
    """A patch from a file's bytes; `name` stands for the file in error messages. Raises what `decode_file` does.

    Masks may unfold to thousands of times their bytes: readers of untrusted files give the backbone's numbers as `most`.
    """
    header, tensors = decode_file(data, name, most)
    int8 = frozenset(tensor_name for tensor_name, codec in header.codecs.items() if codec == "int8")
    return Patch(tensors=tensors, int8=int8, **{name: getattr(header, name) for name in SHARED})

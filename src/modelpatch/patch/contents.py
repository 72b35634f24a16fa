"""A patch: what turns a frozen backbone into the model for one task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.described import Arguments
from modelpatch.backbone.fingerprint import Fingerprint, hash_tensors
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.openclip import NAME as OPENCLIP
from modelpatch.errors import NotAPatchError, PatchError, WrongBackboneError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.codec import FLOATS, STORAGE, snap_int8
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import Facts, Text, first_problem

if TYPE_CHECKING:
    from modelpatch.patch.inspect import Inspection

CHANGES = ("replace/", "mask/", "delta/", "left/", "right/")
CUSTOM = "custom"  # the method of a patch whose maker named none
HUBS = ("hf-hub", "hf_hub")  # how timm spells a repository of the Hugging Face hub


class BackboneRecord(BaseModel):
    """Which frozen network a patch belongs to: how to load it, its content hashes, and its size to compare with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Text
    arguments: Arguments = {}
    fingerprint: Fingerprint
    parameters: int = Field(gt=0)
    bytes: int = Field(gt=0)

    @field_validator("spec")
    @classmethod
    def _no_path(cls, spec: str) -> str:
        """No folder of this machine: neither in a file's name nor where timm would look for a model."""
        kind, separator, name = spec.partition(":")
        source, _, repository = name.rpartition(":")
        if kind == "timm" and source:
            plain = source.lower() in HUBS and not repository.startswith((".", "/"))
        elif kind == "openclip":
            plain = OPENCLIP.fullmatch(name) is not None
        else:
            plain = Path(name).name == name
        if not separator or not plain:
            raise ValueError(f"{spec!r} is not KIND:NAME with a plain name")
        return spec

    @property
    def hub(self) -> str | None:
        """The repository that `spec` names if anybody may have put the network there, for a person to decide on."""
        source, _, repository = self.spec.removeprefix("timm:").partition(":")
        return repository if source.lower() in HUBS else None

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneRecord:
        """The record of a backbone at hand. Raises `PatchError` for one that no file could name."""
        parameters = list(backbone.module.parameters())
        try:
            return cls(
                spec=backbone.spec,
                arguments=backbone.arguments,
                fingerprint=backbone.fingerprints,
                parameters=sum(parameter.numel() for parameter in parameters),
                bytes=sum(tensor.nbytes for tensor in (*parameters, *backbone.module.buffers())),
            )
        except ValidationError as error:
            raise PatchError(
                f"no patch file could say how {backbone.spec} was loaded: {first_problem(error)}. Build the network "
                "yourself and give the module to load_backbone."
            ) from error


class MethodRecord(BaseModel):
    """The method that made a patch, with every hyperparameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    hyperparameters: Facts = {}

    @classmethod
    def of(cls, method: Any) -> MethodRecord:
        """The record of a method, of a name, or of training that no method of this library did (None).

        Raises `PatchError` for anything else.
        """
        if isinstance(method, MethodRecord):
            return method
        if method is None or isinstance(method, str):
            return cls(name=method or CUSTOM)
        try:
            return cls(name=method.name, hyperparameters=method.hyperparameters())
        except (AttributeError, TypeError) as error:
            raise PatchError(f"method is {method!r}; expected a method of modelpatch.methods or a name.") from error


class HasTask(Protocol):
    """Data of a task, such as `modelpatch.Task`."""

    @property
    def task(self) -> TaskRecord:
        """The task without its data."""


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
    ) -> Patch:
        """A patch of strength 1 for a backbone at hand. The arguments are those of `PatchedModel.to_patch`.

        Raises `PatchError` for a task or method that has no record.
        """
        return cls(
            backbone=BackboneRecord.of(backbone),
            task=record_task(task),
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
        """What the patched model is built from: the changed tensors' names and the grafts."""
        owned = {name.partition("/")[2] for name in self.tensors if name.startswith(CHANGES)}
        return Blueprint(owned=tuple(sorted(owned)), grafts=self.grafts)

    @property
    def structure(self) -> str:
        """Equal for two patches of one backbone whose models differ in numbers and number of classes only."""
        return f"{self.blueprint.model_dump_json()} {self.head.reads} {self.strength}"

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the patch computes: its tensors, grafts and backbone, not its provenance or its file's coding."""
        grafts = json.dumps([[graft.model_dump() for graft in self.grafts], self.strength], sort_keys=True)
        return (
            hash_tensors(self.tensors.items())[:32]
            + hash_tensors([(self.backbone.fingerprint.chain + grafts, torch.zeros(0))])[:32]
        )

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch file, checking everything that can be checked without the backbone.

        Raises a `PatchFileError` that names what is wrong with the file.
        """
        from modelpatch.patch.file import read_patch

        if not isinstance(path, str | PathLike):
            raise NotAPatchError(f"{path!r} is no path. Expected that of a patch file.")
        return read_patch(Path(path))

    def save(self, path: str | Path, *, compress: bool = True) -> Path:
        """Write the patch atomically and durably. Returns the path.

        Masks are entropy-coded where that is smaller and `constriction` is installed, unless `compress` is False.
        """
        from modelpatch.patch.file import write_patch

        return write_patch(self, Path(path), compress)

    def inspect(self) -> Inspection:
        """What the patch holds: per span, bytes, hashes and metrics. `print()` it."""
        from modelpatch.patch.inspect import Inspection

        return Inspection.of(self)

    def astype(self, dtype: str) -> Patch:
        """The patch with its floating tensors stored as `float32`, `float16`, `bfloat16` or `int8`.

        `int8` stores matrices and convolutions as 8-bit integers with one scale per output channel, vectors as float32.
        Models compute in float32 whatever the file stores. Raises `PatchError` for another name.
        """
        if dtype not in STORAGE:
            raise PatchError(f"cannot store tensors as {dtype!r}. Expected one of: {', '.join(STORAGE)}.")
        floating = {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        if dtype == "int8":
            matrices = frozenset(n for n, t in floating.items() if t.ndim > 1 and not n.startswith("delta/"))
            changed = {n: snap_int8(t) if n in matrices else t.float() for n, t in floating.items()}
            return replace(self, tensors={**self.tensors, **changed}, int8=matrices)
        changed = {name: tensor.to(FLOATS[dtype]) for name, tensor in floating.items()}
        return replace(self, tensors={**self.tensors, **changed}, int8=frozenset())

    def at_strength(self, strength: float) -> Patch:
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

    def with_alpha(self, alpha: float) -> Patch:
        """`at_strength` by PAINT's name for it: theta = (1 - alpha) theta_0 + alpha theta_1."""
        return self.at_strength(alpha)

    def with_metrics(self, **metrics: Any) -> Patch:
        """The patch with more measured figures."""
        return replace(self, metrics={**self.metrics, **metrics})

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises `WrongBackboneError` unless the chain is, byte for byte, the one the patch was made for.

        The base's own classifier may differ: no patch reads it. Raises `BackboneError` for a patch whose images the
        backbone cannot take.
        """
        expected, given = self.backbone.fingerprint, backbone.fingerprints
        if expected.chain == given.chain:
            backbone.check_image_size(self.preprocessing.image_size)
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
        """Upload the patch and a model card with its measured figures. Returns the commit's URL."""
        from modelpatch.store.hub import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> Patch:
        """Download a patch and check it like any file."""
        from modelpatch.store.hub import from_pretrained

        return from_pretrained(repo_id, revision=revision, token=token)

    def __repr__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        return f"Patch({self.task.name!r}, {self.method.name}, {numbers:,} numbers, for {self.backbone.spec})"


def record_task(task: PatchTask) -> TaskRecord:
    """The record of a task given as its data, as its record, or as a pair of a name and the names of the classes.

    Raises `PatchError` for anything else.
    """
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


class Header(BaseModel):
    """The canonical JSON in a patch file's metadata. `sha256` is over the whole file with this field as zeros."""

    model_config = ConfigDict(extra="forbid")

    version: int
    backbone: BackboneRecord
    task: TaskRecord
    preprocessing: Preprocessing
    head: HeadRecord
    method: MethodRecord
    grafts: tuple[Graft, ...]
    strength: float = Field(ge=0, le=1)
    codecs: dict[str, str]
    metrics: Facts
    created: Facts
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

"""The header of a patch file: everything about a patch but its tensors, as checked models of its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import Arguments
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import SOURCES
from modelpatch.errors import PatchError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.blueprint import Graft
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import Facts, Text, first_problem

MODULE = "module"  # the kind of a network that was given as a module
CUSTOM = "custom"  # the method of a patch whose maker named none


class BackboneRecord(BaseModel):
    """The frozen network of a patch: its specification and arguments, its content hashes and its size."""

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
        source = SOURCES.get(kind) if kind != MODULE else None
        plain = Path(name).name == name if source is None else source().is_portable(name)
        if not separator or not plain:
            raise ValueError(f"{spec!r} is not KIND:NAME with a plain name")
        return spec

    @property
    def hub(self) -> str | None:
        """The repository that `spec` names if anybody may have put the network there, for a person to decide on."""
        kind, _, name = self.spec.partition(":")
        source = SOURCES.get(kind) if kind != MODULE else None
        return None if source is None else source().find_repository(name)

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

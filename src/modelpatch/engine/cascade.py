"""Early-exit cascades: patches of one task in order, each answering the images it is sure of.

    image -> patch 1, sure? -> its answer
               no -> patch 2, sure? -> its answer
                       no -> ... -> the last patch answers all that are left

Streeter: *Approximation Algorithms for Cascading Prediction Models* (ICML 2018). On disk a cascade is a small JSON file beside
its patches.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from torch import Tensor

from modelpatch.atomic import write_bytes
from modelpatch.backbone.fingerprint import Hash
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import CascadeError, CascadeFileError
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import canonical
from modelpatch.plain_files import read_plain
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import Facts, Text, first_problem

MAX_BYTES = 2**20
MAX_STAGES = 32
SUFFIX = ".json"
Weights = tuple[float, float, float]


class Confidence(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The confidence of a patch: `weights` of the largest probability, the entropy and the gap between the two largest.

    The patch answers images whose sum reaches `threshold`; all that are left if that is None.
    """

    weights: Weights = (1.0, 0.0, 0.0)
    threshold: float | None = None

    def score(self, logits: Tensor) -> Tensor:
        """Confidences (B,), float64, for logits (B, K)."""
        return features(logits) @ torch.tensor(self.weights, dtype=torch.float64, device=logits.device)

    def sure(self, logits: Tensor) -> Tensor:
        """The rows (B,) of logits (B, K) that the patch answers, bool."""
        if self.threshold is None:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self.score(logits) >= self.threshold


def features(logits: Tensor) -> Tensor:
    """The terms of a confidence (B, 3), float64: the largest probability, the entropy in nats, the gap to the second."""
    shares = logits.double().softmax(1)
    best = shares.topk(min(2, shares.shape[1]), dim=1).values
    gap = best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0.0)
    return torch.stack([best[:, 0], torch.special.entr(shares).sum(1), gap], 1)


class StageRecord(BaseModel, frozen=True, extra="forbid"):
    """A stage in the file: the patch's file beside it and the hash of what the patch computes."""

    file: Text
    content: Hash
    preprocessing: Preprocessing
    confidence: Confidence

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not name or Path(name).name != name or name == ".." or "\\" in name:
            raise ValueError(f"{name!r} is no plain name of a file beside the cascade")
        return name


class CascadeRecord(BaseModel, frozen=True, extra="forbid"):
    """The whole file. `sha256` is that of the canonical JSON of everything else."""

    kind: Literal["modelpatch cascade"]
    version: Literal[1]
    task: TaskRecord
    stages: tuple[StageRecord, ...] = Field(min_length=1, max_length=MAX_STAGES)
    metrics: Facts
    created: Facts
    sha256: Hash

    def digest(self) -> str:
        """The value that `sha256` must have."""
        return hashlib.sha256(canonical(self.model_dump(mode="json", exclude={"sha256"})).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Patches of one task over one backbone in the order in which they are asked, with the confidence each needs to answer.

    `metrics` are measured figures, `created` the facts of its making. Raises `CascadeError` for patches that answer different
    questions or belong to different backbones, and for thresholds that leave images without an answer.
    """

    patches: tuple[Patch, ...]
    confidences: tuple[Confidence, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    created: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.patches) == len(self.confidences) <= MAX_STAGES:
            given = f"{len(self.patches)} patches with {len(self.confidences)} confidences"
            raise CascadeError(f"{given}; expected one each, 1 to {MAX_STAGES}.")
        check_one_task(self.patches)
        last = [confidence.threshold is None for confidence in self.confidences]
        if last != [False] * (len(last) - 1) + [True]:
            raise CascadeError(
                "every stage but the last needs a threshold, and the last, which answers the rest, none."
            )

    @property
    def task(self) -> TaskRecord:
        """The question that all patches answer."""
        return self.patches[0].task

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a cascade's file and the patches beside it.

        Raises `CascadeFileError` for a file that is none, damaged or beside other patches, and what `Patch.load` raises.
        """
        path = Path(path)
        record = _read(path)
        patches = []
        for stage in record.stages:
            patch = Patch.load(path.parent / stage.file)
            found = patch.content_hash, patch.preprocessing, patch.task.classes
            if found != (stage.content, stage.preprocessing, record.task.classes):
                said = f"{path}: {stage.file} is not the patch that the cascade was made of."
                raise CascadeFileError(said, "Put that one beside it, or make the cascade anew.")
            patches.append(patch)
        try:
            sure = tuple(stage.confidence for stage in record.stages)
            return cls(patches=tuple(patches), confidences=sure, metrics=record.metrics, created=record.created)
        except CascadeError as error:
            raise CascadeFileError(f"{path}: {error}") from error

    def save(self, path: str | Path, files: Sequence[str | Path] | None = None) -> Path:
        """Write the cascade, atomically. Returns the path, which ends in `.json`.

        `files` are those of the patches where they are written already, in the cascade's folder; else they are written there,
        named after the cascade. Raises `CascadeError` for files elsewhere.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            raise CascadeError(f"{path} cannot be a cascade's file: expected a name that ends in {SUFFIX}.")
        if files is None:
            files = [path.with_name(f"{path.stem}-stage{n + 1}.safetensors") for n in range(len(self.patches))]
            for patch, file in zip(self.patches, files, strict=True):
                patch.save(file)
        if away := [file for file in files if Path(file).resolve().parent != path.resolve().parent]:
            raise CascadeError(f"{away[0]} does not lie beside {path}.", "Write the cascade into its patches' folder.")
        names = [Path(file).name for file in files]
        stages = tuple(
            StageRecord(file=name, content=patch.content_hash, preprocessing=patch.preprocessing, confidence=confidence)
            for name, patch, confidence in zip(names, self.patches, self.confidences, strict=True)
        )
        facts = {"metrics": self.metrics, "created": self.created}
        try:
            canonical(facts)
            record = CascadeRecord(
                kind="modelpatch cascade", version=1, task=self.task, stages=stages, sha256="0" * 64, **facts
            )
            record = record.model_copy(update={"sha256": record.digest()})
            text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CascadeError(f"the cascade's metrics or facts cannot be written as JSON: {error}") from error
        write_bytes(path, f"{text}\n".encode())
        return path

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the cascade computes: its patches, how they see images, and what they are sure by."""
        stages = [
            [patch.content_hash, patch.preprocessing.model_dump(mode="json"), confidence.model_dump(mode="json")]
            for patch, confidence in zip(self.patches, self.confidences, strict=True)
        ]
        return hashlib.sha256(canonical(stages).encode()).hexdigest()

    def with_metrics(self, **metrics: Any) -> Self:
        """The cascade with more measured figures."""
        return replace(self, metrics={**self.metrics, **metrics})

    def __repr__(self) -> str:
        sizes = " -> ".join(f"{patch.method.name} {patch.preprocessing.image_size} px" for patch in self.patches)
        return f"Cascade({self.task.name!r}, {sizes})"


def check_one_task(patches: Sequence[Patch]) -> None:
    """Raises `CascadeError` unless all patches answer the same classes over the same frozen chain."""
    first, *others = patches
    if dense := [patch for patch in patches if not kind_of(patch.task.kind).classifies]:
        task = dense[0].task
        raise CascadeError(f"{task.name} is a {task.kind} task; only classes of whole images have a confidence.")
    for patch in others:
        if patch.task.classes != first.task.classes:
            both = [f"{one.task.name} with {len(one.task.classes)} classes" for one in (patch, first)]
            raise CascadeError(f"{' and '.join(both)} are different tasks; a cascade is of one.")
        if difference := patch.backbone.difference(first.backbone):
            raise CascadeError(f"the patches belong to different backbones: {difference}.")


def is_cascade(path: str | Path) -> bool:
    """Return True for the name of a cascade's file; patches end in `.safetensors`."""
    return Path(path).suffix == SUFFIX


def _read(path: Path) -> CascadeRecord:
    try:
        data = read_plain(path, MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise CascadeFileError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(data) > MAX_BYTES:
        raise CascadeFileError(f"{path} has more than {MAX_BYTES:,} bytes; no cascade is that large.")
    try:
        record = CascadeRecord.model_validate_json(data)
        digest = record.digest()
    except (ValueError, RecursionError) as error:  # no such JSON, invalid numbers, endless nesting
        said = first_problem(error) if isinstance(error, ValidationError) else str(error)[:200]
        raise CascadeFileError(f"{path} is no cascade: {said}.") from error
    if digest != record.sha256:
        raise CascadeFileError(f"{path} is damaged: its content is not what was written. Make the cascade anew.")
    return record

"""The patch file, version 1: one safetensors file whose metadata holds canonical JSON and a hash of the whole file.

docs/patch-format.md describes it. The JSON's `sha256` is that of every byte of the file, with the 64 digits of the hash itself
read as zeros: a flipped bit anywhere is found at load. safetensors alone accepts flipped payload bits, zeroed tails, NaN and
duplicate metadata keys.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.computation import Computation
from modelpatch.backbone.files import Arguments
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import SOURCES
from modelpatch.errors import (
    DamagedPatchError,
    HostileNameError,
    InvalidPatchError,
    NonFiniteTensorError,
    NotAPatchError,
    PatchError,
    PatchLengthError,
    UnknownPatchVersionError,
)
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.codec import Codec, most_numbers, pack, unpack
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import CODEC_PREFIX, MAX_LENGTH, STORED_NAME, TENSOR_NAME, Facts, Text, first_problem

VERSION = 1
KEY = "modelpatch"
MAX_HEADER = 64 * 2**20
MAX_SIDES = 2**48  # more than any tensor has numbers, less than what overflows where shapes are multiplied
ZEROS = "0" * 64
TABLE_BYTES = 128  # of an entry in the table of tensors, beside its name
Tensors = Mapping[str, Tensor]
NUMBER_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1}
FREE = {"arguments", "hyperparameters", "options", "metrics", "created"}  # fields that hold any plain values
MODULE = "module"  # the kind of a network that was given as a module


def _check_plain_name(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the plain name of a file")
    return name


FileName = Annotated[Text, AfterValidator(_check_plain_name)]


class BackboneRecord(BaseModel, frozen=True, extra="forbid"):
    """The frozen network of a patch: its specification and arguments, its content hashes, what it computes and its size.

    `weights` is the name of the checkpoint that was loaded into it, without its folder. `computation` is None in files that
    were written before it was recorded.
    """

    spec: Text
    arguments: Arguments = {}
    weights: FileName | None = None
    fingerprint: Fingerprint
    computation: Computation | None = None
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
    def is_local(self) -> bool:
        """True for a network of files of some machine, which no zoo has under its name."""
        kind, _, name = self.spec.partition(":")
        source = SOURCES.get(kind) if kind != MODULE else None
        return self.weights is not None or (source is not None and source().names_file(name))

    @property
    def hub(self) -> str | None:
        """The repository that `spec` names if anybody may have put the network there, for a person to decide on."""
        kind, _, name = self.spec.partition(":")
        source = SOURCES.get(kind) if kind != MODULE else None
        return None if source is None else source().find_repository(name)

    def difference(self, other: "BackboneRecord") -> str:
        """The difference of another record's network in words; empty for the same, as far as both say what it computes."""
        ours, theirs = self.fingerprint, other.fingerprint
        if ours.chain != theirs.chain:
            return f"{self.spec} (chain {ours.chain[:12]}) and {other.spec} (chain {theirs.chain[:12]})"
        if self.computation is None or other.computation is None:
            return ""
        found = self.computation.difference(other.computation)
        return found and f"{self.spec} with {self.arguments} and {other.spec} with {other.arguments}: {found}"

    @classmethod
    def of(cls, backbone: Backbone) -> Self:
        """The record of a backbone at hand. Raises `PatchError` for one that no file could name."""
        parameters, place = list(backbone.module.parameters()), backbone.place
        try:
            return cls(
                spec=backbone.spec,
                arguments=backbone.arguments,
                weights=Path(place.weights).name if place and place.weights else None,
                fingerprint=backbone.fingerprints,
                computation=backbone.computing.record,
                parameters=sum(parameter.numel() for parameter in parameters),
                bytes=sum(tensor.nbytes for tensor in (*parameters, *backbone.module.buffers())),
            )
        except ValidationError as error:
            raise PatchError(
                f"no patch file could say how {backbone.spec} was loaded: {first_problem(error)}. Build the network "
                "yourself and give the module to load_backbone."
            ) from error


class MethodRecord(BaseModel, frozen=True, extra="forbid"):
    """The method that made a patch, with every hyperparameter."""

    name: Text
    hyperparameters: Facts = {}

    @classmethod
    def of(cls, method: Any) -> "MethodRecord":
        """The record of a method, a name, or other training (None). Raises `PatchError` for anything else."""
        if isinstance(method, MethodRecord):
            return method
        if method is None or isinstance(method, str):
            return cls(name=method or "custom")
        try:
            return cls(name=method.name, hyperparameters=method.hyperparameters())
        except (AttributeError, TypeError) as error:
            raise PatchError(f"method is {method!r}; expected a method of modelpatch.methods or a name.") from error


class Header(BaseModel, extra="forbid"):
    """The canonical JSON in a patch file's metadata. `sha256` is over the whole file with this field as zeros."""

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


def encode_file(facts: Mapping[str, Any], tensors: Tensors, int8: Collection[str], compress: bool) -> bytes:
    """The bytes of a file with these tensors, and with these `facts` in its header beside codecs and hash.

    `int8` names the tensors that are stored as integers. Raises `PatchError` for what no reader would accept.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        _check_name(name, TENSOR_NAME)
        _check_finite(name, tensor)
    _check_head(facts["head"], len(facts["task"].classes), plain)
    try:
        stored, codecs = pack(plain, int8, compress)
    except ValueError as error:
        raise PatchError(f"the patch cannot be written: {error}.") from error
    data = bytearray(safetensors.torch.save(stored, {KEY: _header_text(facts, codecs)}))
    at = _hash_position(data, ZEROS)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def check_file(facts: Mapping[str, Any], tensors: Tensors, int8: Collection[str]) -> int:
    """Check names, types and facts of a file that will be written, whatever its numbers; return its bytes, roughly.

    Raises what `encode_file` does, but for numbers that are not finite.
    """
    for name in tensors:
        _check_name(name, TENSOR_NAME)
    _check_head(facts["head"], len(facts["task"].classes), tensors)
    try:
        codecs = {name: str(Codec.of(name, tensor.detach().cpu(), name in int8)) for name, tensor in tensors.items()}
    except ValueError as error:
        raise PatchError(f"the patch cannot be written: {error}.") from error
    text = _header_text(facts, codecs)
    return len(text) + sum(len(name) + TABLE_BYTES + tensor.nbytes for name, tensor in tensors.items())


def _header_text(facts: Mapping[str, Any], codecs: dict[str, str]) -> str:
    """The canonical JSON of a file. Raises `PatchError` for facts that no reader would accept."""
    try:
        described = Header(version=VERSION, codecs=codecs, sha256=ZEROS, **facts).model_dump()
        _leave_out(described["preprocessing"])
        for part in ("head", "task"):
            if not described[part]["options"]:
                del described[part]["options"]  # which earlier versions do not read
        for part in ("computation", "weights"):
            if described["backbone"][part] is None:
                del described["backbone"][part]  # likewise
        text = canonical(described)
    except ValidationError as error:
        raise PatchError(f"the patch cannot be written: {first_problem(error)}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PatchError(f"the patch's metrics or facts cannot be written as JSON: {error}") from error
    if 2 * len(text) > MAX_HEADER:  # as a string inside JSON, whose quotes are escaped
        raise PatchError(
            f"the patch's description has {len(text):,} characters; a file holds {MAX_HEADER // 2:,}. Shorten names of its "
            f"{len(facts['task'].classes):,} classes, its metrics or its facts."
        )
    return text


def decode_file(data: bytes, name: str, most: int) -> tuple[Header, dict[str, Tensor]]:
    """The header and the patch's tensors of a file's bytes; `name` stands for the file in error messages.

    `most` bounds how many numbers the masks may have. Raises a `PatchFileError` that names what is wrong, and
    `MissingExtraError` for entropy-coded masks without `constriction`.
    """
    text, table, payload = _read_outer(data, name)
    described = _read_json(text, name)
    version = described.get("version")
    if type(version) is not int or version != VERSION:
        raise UnknownPatchVersionError(
            f"{name} is a patch of format version {version!r}; this library reads version {VERSION}. Upgrade modelpatch."
        )
    try:
        _check_table(table, payload, name)
    except InvalidPatchError:
        _check_hash(data, described, text, name)  # a damaged table is damage first
        raise
    _check_hash(data, described, text, name)
    for tensor_name in table:
        _check_name(tensor_name, STORED_NAME, name)
    try:
        header = Header.model_validate(_with_tuples(_with_rounding(described)), strict=True)
    except ValidationError as error:
        kind = HostileNameError if "cannot be printed" in error.errors()[0]["msg"] else InvalidPatchError
        raise kind(f"{name}: the header's {first_problem(error)}.") from error
    except RecursionError as error:
        raise InvalidPatchError(f"{name}: the header is nested deeper than can be read.") from error
    for tensor_name in header.codecs:
        _check_name(tensor_name, TENSOR_NAME, name)
    try:
        stored = safetensors.torch.load(bytes(data))
    except safetensors.SafetensorError as error:
        raise InvalidPatchError(f"{name}: safetensors does not read its table of tensors: {error}.") from error
    for tensor_name, tensor in stored.items():
        _check_finite(tensor_name, tensor, name)
    try:
        tensors = unpack(stored, header.codecs, min(most, most_numbers(len(data))))
    except ValueError as error:
        raise InvalidPatchError(f"{name}: its codecs do not fit its tensors: {error}.") from error
    _check_head(header.head, len(header.task.classes), tensors, name)
    return header, tensors


def canonical(value: Any) -> str:
    """The one way to write a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _read_outer(data: bytes, name: str) -> tuple[str, dict[str, Any], int]:
    """The JSON in the safetensors header, its table of tensors, and the bytes of the payload."""
    if len(data) < 8:
        raise PatchLengthError(f"{name} has {len(data)} bytes; no patch file is that short.")
    length = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER or data[8:9] != b"{":
        hint = " A cascade's file is for eval, predict and serve --cascade." if data[:1] == b"{" else ""
        raise NotAPatchError(f"{name} is not a patch file: it does not start with a safetensors header.{hint}")
    if 8 + length > len(data):
        raise PatchLengthError(f"{name} is truncated: its header needs {8 + length} bytes, the file has {len(data)}.")
    outer = _read_json(data[8 : 8 + length], name)
    metadata = outer.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.keys() != {KEY} or not isinstance(metadata[KEY], str):
        raise NotAPatchError(f"{name} is a safetensors file but not a patch: its metadata has no single key {KEY!r}.")
    return metadata[KEY], outer, len(data) - 8 - length


def _read_json(text: str | bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise NotAPatchError(f"{name} is not a patch file: its header is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise NotAPatchError(f"{name} is not a patch file: its header is not a JSON object.")
    return value


def _leave_out(preprocessing: dict[str, Any]) -> None:
    """Remove what a file does not say where it has no meaning, so that the first edition's files keep their bytes."""
    for name, plain in (("fill", None), ("value_range", None), ("rounding", "first")):
        if preprocessing[name] == plain:
            del preprocessing[name]


def _with_rounding(described: dict[str, Any]) -> dict[str, Any]:
    """The header with the rounding of the first edition, whose files do not say it."""
    preprocessing = described.get("preprocessing")
    if not isinstance(preprocessing, dict):
        return described
    return {**described, "preprocessing": {"rounding": "first", **preprocessing}}


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples of the header's models; free fields keep theirs. Validating text would limit their depth."""
    if isinstance(value, dict):
        return {key: item if key in FREE else _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _check_table(table: dict[str, Any], payload: int, name: str) -> None:
    """Every tensor entry is well formed, and together they cover the payload exactly."""
    spans = []
    for tensor_name, entry in table.items():
        try:
            spans.append(_span(entry))
        except (KeyError, TypeError, ValueError) as error:
            entry = f"the entry of tensor {tensor_name[:80]!r}"
            raise InvalidPatchError(f"{name}: {entry} is malformed ({str(error)[:200]}).") from error
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise InvalidPatchError(f"{name}: the tensors' bytes overlap or leave a gap at {str(start)[:80]}.")
        at = end
    if at != payload:
        kind = "truncated" if payload < at else "padded"
        raise PatchLengthError(f"{name} is {kind}: its tensors need {at} payload bytes, the file has {payload}.")


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Start and end of a tensor's bytes. Raises ValueError, TypeError or KeyError for an entry that says nothing sensible."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(entry) != 3 or not isinstance(shape, list) or type(start) is not int or type(end) is not int:
        raise ValueError("expected a dtype, a shape and two offsets")
    if wrong := [side for side in shape if type(side) is not int or side < 0]:
        raise ValueError(f"a side of {str(wrong[0])[:80]!r}")
    if math.prod(max(side, 1) for side in shape) > MAX_SIDES:
        raise ValueError("sides whose product is larger than any tensor")
    if end - start != math.prod(shape) * NUMBER_BYTES[dtype]:
        raise ValueError("length and shape disagree")
    return start, end


def _check_hash(data: bytes, described: dict[str, Any], text: str, name: str) -> None:
    digest = described.get("sha256")
    try:
        intact = isinstance(digest, str) and len(digest) == 64 and canonical(described) == text
    except (ValueError, RecursionError):  # infinite numbers, or nested deeper than can be written
        intact = False
    at, blank = _hash_position(data, digest) if intact else -1, bytearray(data)
    blank[at : at + 64] = ZEROS.encode()
    if at < 0 or hashlib.sha256(blank).hexdigest() != digest:
        said = f"{name} is damaged: its bytes are not the ones that were written (SHA-256 mismatch)."
        raise DamagedPatchError(said, "Fetch it again.")


def _hash_position(data: bytes | bytearray, digest: Any) -> int:
    """The position of the 64 digits, or -1; the JSON is a string inside JSON, so its quotes are escaped.

    The last occurrence in the header is the file's own: what follows it in the canonical order holds free text only.
    """
    key = b'\\"sha256\\":\\"'
    at = data.rfind(key + digest.encode("ascii", "replace"), 0, 8 + struct.unpack("<Q", data[:8])[0])
    return at + len(key) if at >= 0 else -1


def _check_name(tensor_name: str, allowed: re.Pattern[str], name: str = "the patch") -> None:
    own = CODEC_PREFIX.sub("", tensor_name, count=1)  # what a codec adds does not count
    if len(own) > MAX_LENGTH or not allowed.fullmatch(tensor_name):
        raise HostileNameError(
            f"{name} holds a tensor named {tensor_name[:80]!r} ({len(tensor_name):,} characters). Expected head.NAME, "
            f"replace/NAME, mask/NAME, delta/NAME or graft/I-J/NAME of at most {MAX_LENGTH} characters: letters, digits, "
            "spaces and _ - + : @ = ~ , ( ) #, in parts joined by '.' or '/'. Rename the module that holds it."
        )


def _check_head(head: HeadRecord, classes: int, tensors: Tensors, name: str = "the patch") -> None:
    if head.outputs != classes:
        raise InvalidPatchError(f"{name}: the head has {head.outputs} outputs for {classes} classes.")
    own = {tensor_name: tensor.shape for tensor_name, tensor in tensors.items() if tensor_name.startswith("head.")}
    if own != head.shapes():
        raise InvalidPatchError(f"{name}: the head's tensors are not those of a {head.kind} head.")


def _check_finite(tensor_name: str, tensor: Tensor, name: str = "the patch") -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteTensorError(f"{name}: tensor {tensor_name} holds NaN or infinity. Train again with a lower lr.")

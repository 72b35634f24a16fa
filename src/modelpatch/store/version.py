"""A version of a patch in a store: its record, and references to it.

`flowers` is the version that the tag `latest` names, `flowers@prod` that of the tag `prod`, and `flowers@1f0c2a9b` the one
whose hash, the SHA-256 of its file, begins with these 8 digits or more.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from modelpatch.backbone.fingerprint import Hash
from modelpatch.errors import DamagedPatchError, InvalidReferenceError
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import canonical
from modelpatch.text import MAX_LENGTH, Text, first_problem

LATEST = "latest"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HASH = re.compile(r"[0-9a-f]{64}")
PREFIX = re.compile(r"[0-9a-f]{8,64}")
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a named patch.

    `hash` is the SHA-256 of the file's `nbytes` bytes; `created` when it was first published (ISO 8601, UTC). `backbone` is
    how the frozen network is loaded, `fingerprint` its hash and `chain` the part of it that the patch binds to. `metrics`
    are the measured figures, of which the patch itself may say more. `tags` are those that named the version when asked.
    `signers` are the ids of keys, or identities, that the signature beside the file claims.
    """

    name: Name
    hash: Hash
    nbytes: int
    created: Text
    method: Text
    task: Text
    backbone: Text
    fingerprint: Hash
    chain: Hash
    metrics: Mapping[Text, Annotated[float, Field(allow_inf_nan=False)]] = field(default_factory=dict, hash=False)
    tags: tuple[Name, ...] = ()
    signers: tuple[Text, ...] = ()

    @classmethod
    def of(cls, name: str, data: bytes, patch: Patch, signers: tuple[str, ...] = ()) -> Self:
        """The version that a patch file's bytes make, created now."""
        fingerprint = patch.backbone.fingerprint
        return cls(
            name=name,
            hash=hashlib.sha256(data).hexdigest(),
            nbytes=len(data),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            method=patch.method.name,
            task=patch.task.name,
            backbone=patch.backbone.spec,
            fingerprint=fingerprint.whole,
            chain=fingerprint.chain,
            metrics=dict(sorted((key, float(value)) for key, value in patch.metrics.items() if _is_figure(key, value))),
            signers=signers,
        )

    @property
    def reference(self) -> str:
        """`flowers@` and the whole hash: names this version for ever."""
        return f"{self.name}@{self.hash}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def record(self) -> bytes:
        """The JSON that a store keeps beside the patch file; tags are kept elsewhere, and nothing is said of no signers."""
        left_out = {"tags"} if self.signers else {"tags", "signers"}
        return canonical({name: value for name, value in self.as_dict().items() if name not in left_out}).encode()

    @classmethod
    def read(cls, record: bytes, name: str, hash: str) -> "Version":
        """The version that a record describes. Raises `DamagedPatchError` unless it is one of that name and hash."""
        where = f"the record of {name}@{hash[:12]}"
        try:
            version = _RECORD.validate_json(record)
        except ValidationError as error:
            raise DamagedPatchError(f"{where} is damaged: its {first_problem(error)}.") from error
        if (version.name, version.hash) != (name, hash):
            raise DamagedPatchError(f"{where} is that of {version}. Publish the patch again.")
        return version

    def __str__(self) -> str:
        return f"{self.name}@{self.hash[:12]}"


_RECORD: TypeAdapter[Version] = TypeAdapter(Version)


def check_name(text: str, kind: str = "patch") -> str:
    """The name of a patch or a tag. Raises `InvalidReferenceError` for any other text."""
    if not isinstance(text, str) or not NAME.fullmatch(text):
        expected = "Expected 1 to 64 characters of a-z, 0-9, '.', '_' and '-', the first a letter or digit."
        raise InvalidReferenceError(f"{str(text)[:80]!r} is no name of a {kind}.", expected)
    return text


def check_tag(text: str) -> str:
    """The name of a tag. Raises `InvalidReferenceError` for any other text, and for what would read as a hash."""
    if HASH.fullmatch(check_name(text, "tag")):
        raise InvalidReferenceError(f"a tag of 64 hexadecimal digits would read as a hash: {text}. Choose another.")
    return text


def parse_reference(reference: str) -> tuple[str, str]:
    """The name, and the tag or the beginning of a hash; `latest` where there is none. Raises `InvalidReferenceError`."""
    name, separator, rest = str(reference).partition("@")
    return check_name(name), check_name(rest, "tag") if separator else LATEST


def _is_figure(key: str, value: Any) -> bool:
    return len(key) <= MAX_LENGTH and type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)

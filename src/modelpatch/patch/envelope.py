"""A signature: a JSON file beside a patch, `flowers.safetensors.sig`, that says who signed which bytes.

It is a DSSE envelope around an in-toto statement with the patch file's SHA-256, signed with Ed25519 keys; or a sigstore bundle
around the same. Read here, it is a claim; `modelpatch.patch.signing` checks it. docs/signing.md shows both.
"""

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Base64Bytes, BaseModel, Field, StringConstraints, ValidationError

from modelpatch.errors import DamagedSignatureError, require
from modelpatch.patch.file import canonical
from modelpatch.plain_files import read_plain
from modelpatch.text import MAX_LENGTH, Facts, Text, check_printable, first_line, first_problem

SUFFIX = ".sig"
PAYLOAD = "application/vnd.in-toto+json"
ISSUER, OLD_ISSUER = ISSUERS = "1.3.6.1.4.1.57264.1.8", "1.3.6.1.4.1.57264.1.1"  # extensions of sigstore's certificates
UTF8 = 12  # the tag of a string in DER
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:modelpatch:provenance:1"
MOST_BYTES = 2**20  # of a signature or of a file of keys
MOST_SIGNATURES = 64
SHOWN = 16  # digits of a hash
AGAIN = "Sign the file again, or fetch its signature again."
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Subject(BaseModel):
    """A file by its name when it was signed, and its SHA-256."""

    name: Text
    digest: dict[Literal["sha256"], Digest] = Field(min_length=1)


class Statement(BaseModel):
    """The signed in-toto statement: the file that it is about, and the patch's provenance."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject] = Field(min_length=1, max_length=1)
    predicateType: Text  # noqa: N815 (in-toto's own spelling)
    predicate: Facts | None = None

    @property
    def sha256(self) -> str:
        """The hash of the file that was signed."""
        return self.subject[0].digest["sha256"]


class KeySignature(BaseModel):
    """One signature of an envelope; `keyid` is a hint that nobody has to believe."""

    keyid: Text = ""
    sig: Base64Bytes


class Envelope(BaseModel):
    """A DSSE envelope (https://github.com/secure-systems-lab/dsse)."""

    payload: Base64Bytes
    payloadType: Literal["application/vnd.in-toto+json"]  # noqa: N815
    signatures: list[KeySignature] = Field(min_length=1, max_length=MOST_SIGNATURES)


class BundleFile(BaseModel):
    """The part of a sigstore bundle that is read here: the envelope; `modelpatch.patch.bundles` checks the rest."""

    mediaType: Text  # noqa: N815
    dsseEnvelope: Envelope  # noqa: N815


@dataclass(frozen=True)
class Signature:
    """A signature file as it was read: nothing in it is to be believed before `Signers.check` returns.

    `claims` are the ids of the keys that it names, or the sigstore identity with its issuer. `name` stands for the file in
    messages.
    """

    name: str
    raw: bytes
    envelope: Envelope
    statement: Statement
    claims: tuple[str, ...]
    is_bundle: bool

    @classmethod
    def read(cls, raw: bytes, name: str) -> Self:
        """The signature in a file's bytes. Raises `DamagedSignatureError` for bytes that are none."""
        if len(raw) > MOST_BYTES:
            raise DamagedSignatureError(f"{name} has {len(raw):,} bytes; no signature has more than {MOST_BYTES:,}.")
        try:
            is_bundle = b'"dsseEnvelope"' in raw
            kind: type[Envelope | BundleFile] = BundleFile if is_bundle else Envelope
            read = kind.model_validate_json(raw)
            envelope = read if isinstance(read, Envelope) else read.dsseEnvelope
            statement = Statement.model_validate_json(envelope.payload)
        except ValidationError as error:
            raise DamagedSignatureError(f"{name} is no signature of a patch: {first_problem(error)}.", AGAIN) from error
        if is_bundle:
            return cls(name, raw, envelope, statement, (_claimed_identity(raw, name),), True)
        claims = tuple(dict.fromkeys(one.keyid for one in envelope.signatures if one.keyid))
        return cls(name, raw, envelope, statement, claims, False)

    def check_subject(self, sha256: str, name: str) -> None:
        """Raise `DamagedSignatureError` unless the statement is about the file of that hash."""
        if self.statement.sha256 != sha256:
            other = f"of a file {self.statement.subject[0].name} with SHA-256 {self.statement.sha256[:SHOWN]}"
            raise DamagedSignatureError(f"{self.name} is {other}, not of {name} ({sha256[:SHOWN]}).", AGAIN)


def make_statement(data: bytes, name: str, provenance: dict[str, Any]) -> bytes:
    """The in-toto statement about a file's bytes, as canonical JSON: the same for the same file."""
    subject = {"name": name, "digest": {"sha256": hashlib.sha256(data).hexdigest()}}
    facts = {"_type": STATEMENT, "subject": [subject], "predicateType": PREDICATE, "predicate": provenance}
    return canonical(facts).encode()


def dsse_bytes(payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's encoding of a payload with its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def short(claim: str) -> str:
    """A key's id as messages show it; an identity whole."""
    return claim[:SHOWN] if re.fullmatch("[0-9a-f]{64}", claim) else claim


def signature_path(path: str | os.PathLike[str]) -> Path:
    """The place of a file's signature, beside it."""
    path = Path(path)
    return path.with_name(path.name + SUFFIX)


def read_beside(path: str | os.PathLike[str]) -> bytes | None:
    """The bytes of the signature beside a file; None without one. Raises `DamagedSignatureError` if it cannot be read."""
    place = signature_path(path)
    try:
        return read_plain(place, MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedSignatureError(f"{place} cannot be read: {getattr(error, 'strerror', error)}.") from error


def _claimed_identity(raw: bytes, name: str) -> str:
    """The identity and its issuer in a bundle's certificate, unchecked. Raises `DamagedSignatureError` where it has none."""
    x509: Any = require("cryptography.x509", "sign", "a sigstore signature", "cryptography")
    try:
        material = json.loads(raw)["verificationMaterial"]
        encoded = material.get("certificate") or material["x509CertificateChain"]["certificates"][0]
        certificate = x509.load_der_x509_certificate(base64.b64decode(encoded["rawBytes"]))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [one.value for one in names if isinstance(one.value, str)]
        return check_printable(f"{found[0]},{_issuer(certificate)}")[:MAX_LENGTH]
    except Exception as error:
        raise DamagedSignatureError(
            f"{name} is a sigstore bundle without an identity: {first_line(error)}.", AGAIN
        ) from error


def _issuer(certificate: Any) -> str:
    """The service that vouches for a certificate's identity: a DER string of less than 128 bytes, or as older ones have it."""
    held = {
        one.oid.dotted_string: one.value.value for one in certificate.extensions if one.oid.dotted_string in ISSUERS
    }
    if (value := held.get(ISSUER)) is not None and value[0] == UTF8 and value[1] == len(value) - 2:
        return str(value[2:].decode())
    return str(held[OLD_ISSUER].decode())

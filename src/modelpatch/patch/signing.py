"""Signers: the keys and identities whose signatures are accepted, and the check of a file's signature."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from modelpatch.errors import DamagedSignatureError, KeyFileError, OtherSignerError, UnsignedPatchError
from modelpatch.patch.bundles import SIGSTORE, Identity
from modelpatch.patch.envelope import AGAIN, Signature, read_beside, short, signature_path
from modelpatch.patch.keys import PUBLIC, read_public_keys
from modelpatch.plain_files import read_plain

TRUST = "If you trust that signer, add the public key to those that are required."


class Signer(Protocol):
    """Somebody who may be trusted: `name` for messages, and the `id` that signatures claim."""

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str: ...

    def signed(self, signature: Signature) -> bool:
        """Return True if this signer made the signature. Raises `MissingExtraError` without the library for it."""
        ...


@dataclass(frozen=True)
class Signers:
    """Those whose signatures are accepted: `Signers.of("alice.pub", "keys/", "sigstore:me@example.org,ISSUER")`."""

    known: tuple[Signer, ...]

    @classmethod
    def of(cls, *sources: str | os.PathLike[str]) -> Self:
        """The keys in files or folders of public keys (PEM or OpenSSH), and identities `sigstore:IDENTITY,ISSUER`.

        Raises `KeyFileError` for a source that has none, and `MissingExtraError` without `cryptography`.
        """
        found = dict.fromkeys(signer for source in sources for signer in _signers_in(os.fspath(source)))
        if not found:
            raise KeyFileError(
                "no signer is named. Name a public key's file, a folder of them, or sigstore:WHO,ISSUER."
            )
        return cls(tuple(found))

    def check(self, sha256: str, signature: Signature | None, name: str) -> Signer:
        """The signer of the file of that name and hash.

        Raises `UnsignedPatchError` without a signature, `OtherSignerError` for one by nobody of these, and
        `DamagedSignatureError` for one that was altered or is of another file.
        """
        named = ", ".join(signer.name for signer in self.known)
        if signature is None:
            raise UnsignedPatchError(
                f"{name} has no signature; one by {named} is required.", "Sign it: modelpatch sign"
            )
        faults = []
        for signer in self.known:
            try:
                if signer.signed(signature):
                    signature.check_subject(sha256, name)
                    return signer
            except DamagedSignatureError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        if claimed := [one.name for one in self.known if one.id in signature.claims]:
            raise DamagedSignatureError(f"{signature.name} is not what {claimed[0]} signed: it was altered.", AGAIN)
        who = ", ".join(map(short, signature.claims)) or "a key without an id"
        raise OtherSignerError(f"{name} is signed by {who}; a signature by {named} is required.", TRUST)

    def names(self, claims: Sequence[str]) -> list[str]:
        """The names of claimed ids, where they are known; else the beginnings of the ids."""
        known = {signer.id: signer.name for signer in self.known}
        return [known.get(claim, short(claim)) for claim in claims]


def check_file_signer(path: str | os.PathLike[str], data: bytes, signers: Signers) -> Signer:
    """The signer of a file's bytes by the signature beside it. Raises what `Signers.check` does."""
    raw = read_beside(path)
    signature = None if raw is None else Signature.read(raw, str(signature_path(path)))
    return signers.check(hashlib.sha256(data).hexdigest(), signature, str(path))


def describe_signature(path: str | os.PathLike[str], signers: Signers | None) -> tuple[str, dict[str, Any]]:
    """A line about the signature beside a file, and its facts; `signers` have been checked where they are given."""
    facts: dict[str, Any] = {"signed_by": [], "checked": signers is not None, "statement": None, "problem": None}
    if (raw := read_beside(path)) is None:
        return "not signed", facts
    try:
        signature = Signature.read(raw, str(signature_path(path)))
        signature.check_subject(hashlib.sha256(read_plain(path)).hexdigest(), str(path))
    except DamagedSignatureError as error:
        return f"signature not valid: {error}", {**facts, "problem": str(error)}
    names = [short(one) for one in signature.claims] if signers is None else signers.names(signature.claims)
    facts |= {"signed_by": names, "statement": signature.statement.model_dump(by_alias=True)}
    checked = "checked" if signers else "as the signature says; --signer KEYS checks it"
    return f"signed by {', '.join(names) or 'a key without an id'} ({checked})", facts


def _signers_in(source: str) -> Iterator[Signer]:
    if source.startswith(SIGSTORE):
        yield Identity.of(source)
        return
    path = Path(source)
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in (PUBLIC, ".pem") and one.is_file())
        if not files:
            raise KeyFileError(f"the folder {path} has no files *.pub or *.pem. Put public keys there.")
    else:
        files = [path]
    for file in files:
        yield from read_public_keys(file)

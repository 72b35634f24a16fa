"""Ed25519 keys: private ones that sign, public ones that are trusted, in the files of OpenSSL and OpenSSH."""

import hashlib
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpatch.atomic import write_bytes
from modelpatch.errors import KeyFileError, LockedKeyError, require
from modelpatch.patch.envelope import MOST_BYTES, PAYLOAD, Signature, dsse_bytes
from modelpatch.patch.file import canonical
from modelpatch.plain_files import read_plain
from modelpatch.text import first_line

PUBLIC = ".pub"
BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----", re.DOTALL)
SSH = b"ssh-"  # of a line with a public key as OpenSSH writes it
EXPECTED = "Expected an Ed25519 key: modelpatch sign --new-key FILE, or openssl genpkey -algorithm ed25519."


@dataclass(frozen=True)
class Key:
    """A public Ed25519 key of 32 bytes; `id` is their SHA-256."""

    name: str
    raw: bytes

    @property
    def id(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()

    def signed(self, signature: Signature) -> bool:
        """Return True if any of the envelope's signatures is by this key."""
        if signature.is_bundle:
            return False
        public = _ed25519().Ed25519PublicKey.from_public_bytes(self.raw)
        from cryptography.exceptions import InvalidSignature

        for one in signature.envelope.signatures:
            try:
                public.verify(one.sig, dsse_bytes(signature.envelope.payload))
                return True
            except InvalidSignature:
                continue
        return False


def sign(statement: bytes, key: Any, earlier: bytes | None = None) -> bytes:
    """The signature file of a statement, signed with an Ed25519 private key.

    The signatures of other keys in an `earlier` file of the same statement are kept.
    """
    mine = Key("", key.public_key().public_bytes_raw())
    made = [(mine.id, key.sign(dsse_bytes(statement)))]
    if earlier is not None:
        before = Signature.read(earlier, "the earlier signature")
        if not before.is_bundle and before.envelope.payload == statement:
            made = [(one.keyid, one.sig) for one in before.envelope.signatures if one.keyid != mine.id] + made
    signatures = [{"keyid": name, "sig": b64encode(sig).decode()} for name, sig in made]
    facts = {"payload": b64encode(statement).decode(), "payloadType": PAYLOAD, "signatures": signatures}
    return canonical(facts).encode() + b"\n"


def make_key(path: Path, passphrase: str | None = None) -> Key:
    """Write a new private key (PKCS #8, readable by its owner alone) and, with `.pub` behind its name, the public one."""
    private, public = _ed25519().Ed25519PrivateKey.generate(), path.with_name(path.name + PUBLIC)
    for one in (path, public):
        if one.exists():
            raise KeyFileError(f"{one} exists already, and a lost key cannot be made again. Name another file.")
    written = require("cryptography.hazmat.primitives.serialization", "sign", "a signature", "cryptography")
    lock = written.BestAvailableEncryption(passphrase.encode()) if passphrase else written.NoEncryption()
    secret = private.private_bytes(written.Encoding.PEM, written.PrivateFormat.PKCS8, lock)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secret)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}.") from error
    pem = private.public_key().public_bytes(written.Encoding.PEM, written.PublicFormat.SubjectPublicKeyInfo)
    write_bytes(public, pem)
    return Key(path.stem, private.public_key().public_bytes_raw())


def read_private_key(path: str | os.PathLike[str], passphrase: str | None = None) -> Any:
    """The Ed25519 private key in a file (PEM, or as OpenSSH writes it).

    Raises `LockedKeyError` for one that needs another passphrase, `KeyFileError` for anything else.
    """
    expected = _ed25519().Ed25519PrivateKey
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as written

    data, secret = _read(Path(path)), passphrase.encode() if passphrase else None
    is_ssh = b"OPENSSH PRIVATE KEY" in data
    load = written.load_ssh_private_key if is_ssh else written.load_pem_private_key
    try:
        key = load(data, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if b"ENCRYPTED" in data or "password" in str(error).lower():
            given = "another" if secret else "no"
            raise LockedKeyError(
                f"{path} is locked, and {given} passphrase was given ({first_line(error)})."
            ) from error
        is_public = b"PUBLIC KEY" in data or data.startswith(SSH)
        what = "a public key; sign with the private one" if is_public else "no private key that can be read"
        raise KeyFileError(f"{path} is {what}. `modelpatch sign --new-key FILE` makes a pair.") from error
    if not isinstance(key, expected):
        raise KeyFileError(f"{path} is a {type(key).__name__.strip('_')}. {EXPECTED}")
    return key


def read_public_keys(path: Path) -> Iterator[Key]:
    """The public keys in a file: blocks of PEM, lines of OpenSSH. Raises `KeyFileError` if it has none or another."""
    expected = _ed25519().Ed25519PublicKey
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as written

    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise KeyFileError(f"{path} is a private key, which nobody else should have. Name its public half, *.pub.")
    lines = [line for line in data.splitlines() if line.startswith(SSH)]
    blocks = [(found[0], written.load_pem_public_key, "") for found in BLOCK.finditer(data)]
    blocks += [(line, written.load_ssh_public_key, _comment(line)) for line in lines]
    if not blocks:
        raise KeyFileError(f"{path} holds no public key. Expected PEM, or a line as OpenSSH writes it.")
    for number, (block, load, comment) in enumerate(blocks):
        try:
            key = load(block)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyFileError(f"{path} holds no public key that can be read: {first_line(error)}.") from error
        if not isinstance(key, expected):
            raise KeyFileError(f"{path} holds a {type(key).__name__.strip('_')}. {EXPECTED}")
        stem = path.name.removesuffix(PUBLIC).removesuffix(".pem").removesuffix(".key")
        plain = stem if len(blocks) == 1 else f"{stem} {number + 1}"
        yield Key(comment or plain, key.public_bytes_raw())


def _comment(line: bytes) -> str:
    parts = line.decode("utf-8", "replace").split(None, 2)
    text = parts[2].strip()[:80] if len(parts) > 2 else ""
    return text if text.isprintable() else ""


def _read(path: Path) -> bytes:
    try:
        data = read_plain(path, MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"the key {path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(data) > MOST_BYTES:
        raise KeyFileError(f"{path} has more than {MOST_BYTES:,} bytes; no file of keys is that large.")
    return data


def _ed25519() -> Any:
    return require("cryptography.hazmat.primitives.asymmetric.ed25519", "sign", "a signature", "cryptography")

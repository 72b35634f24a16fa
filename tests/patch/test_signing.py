"""Signatures: a patch says who made it, and everything that was changed is refused by name."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import draft_patch, make_tiny
from modelpatch.errors import (
    DamagedSignatureError,
    KeyFileError,
    LockedKeyError,
    MissingExtraError,
    OtherSignerError,
    SignatureError,
    UnsignedPatchError,
)
from modelpatch.patch import bundles
from modelpatch.patch.contents import Patch
from modelpatch.patch.envelope import ISSUERS, Signature, dsse_bytes, make_statement, read_beside, signature_path
from modelpatch.patch.keys import PUBLIC, make_key, read_private_key, sign
from modelpatch.patch.signing import Signers, check_file_signer, describe_signature

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization as written
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

PEM, PLAIN = written.Encoding.PEM, written.NoEncryption()
DATA = b"the bytes of some file"


def signed(data: bytes = DATA, key: Any = None, name: str = "flowers.safetensors") -> bytes:
    key = key or ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    return sign(make_statement(data, name, {"task": "flowers"}), key)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "alice.key")
    return tmp_path / "alice.key"


@pytest.fixture
def patch(tmp_path: Path, key: Path) -> Path:
    """A patch's file, signed by alice."""
    path = draft_patch(make_tiny()).save(tmp_path / "flowers.safetensors")
    statement = make_statement(path.read_bytes(), path.name, Patch.load(path).provenance)
    signature_path(path).write_bytes(sign(statement, read_private_key(key)))
    return path


def alice(tmp_path: Path) -> Signers:
    return Signers.of(tmp_path / "alice.key.pub")


def test_the_signed_bytes_are_those_of_the_specification_of_dsse() -> None:
    """Its example: the lengths count bytes, and stand before type and payload."""
    assert dsse_bytes(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"


def test_a_signed_patch_is_loaded_and_says_what_it_is_of(patch: Path, tmp_path: Path) -> None:
    loaded = Patch.load(patch, signers=alice(tmp_path))
    assert loaded.task == Patch.load(patch).task
    line, facts = describe_signature(patch, alice(tmp_path))
    assert line == "signed by alice (checked)"
    stated = facts["statement"]["predicate"]
    assert stated["backbone"]["sha256"] == loaded.backbone.fingerprint.whole
    assert (stated["task"], stated["method"]) == (loaded.task.name, loaded.method.name)
    assert "as the signature says" in describe_signature(patch, None)[0]


def test_openssl_verifies_the_signature(patch: Path, key: Path, tmp_path: Path) -> None:
    """The format is DSSE's, not this library's: another implementation of Ed25519 agrees."""
    envelope = json.loads(signature_path(patch).read_bytes())
    (tmp_path / "signed").write_bytes(dsse_bytes(base64.b64decode(envelope["payload"])))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", f"{key}.pub", "-rawin"]
    try:
        done = subprocess.run(
            [*command, "-in", tmp_path / "signed", "-sigfile", tmp_path / "sig"], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert "Signature Verified Successfully" in done.stdout, done.stderr


def test_no_signature_another_key_and_a_flipped_one_are_each_refused_by_name(patch: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "bob.key")
    with pytest.raises(OtherSignerError, match="a signature by bob is required"):
        Patch.load(patch, signers=Signers.of(tmp_path / "bob.key.pub"))
    envelope = json.loads(signature_path(patch).read_bytes())
    flipped = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    flipped[7] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(flipped).decode()
    signature_path(patch).write_text(json.dumps(envelope))
    with pytest.raises(DamagedSignatureError, match="not what alice signed"):
        Patch.load(patch, signers=alice(tmp_path))
    signature_path(patch).unlink()
    with pytest.raises(UnsignedPatchError, match=r"flowers\.safetensors has no signature"):
        Patch.load(patch, signers=alice(tmp_path))
    assert describe_signature(patch, None)[0] == "not signed"


def test_a_statement_that_was_rewritten_is_not_what_was_signed(patch: Path, tmp_path: Path) -> None:
    envelope = json.loads(signature_path(patch).read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["method"] = "another"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signature_path(patch).write_text(json.dumps(envelope))
    with pytest.raises(DamagedSignatureError, match="not what alice signed"):
        check_file_signer(patch, patch.read_bytes(), alice(tmp_path))


def test_the_signature_of_another_file_is_not_this_files(patch: Path, tmp_path: Path) -> None:
    other = draft_patch(make_tiny(), seed=3).save(tmp_path / "birds.safetensors")
    signature_path(other).write_bytes(signature_path(patch).read_bytes())
    with pytest.raises(DamagedSignatureError, match=r"of a file flowers\.safetensors .* not of .*birds"):
        Patch.load(other, signers=alice(tmp_path))
    assert "signature not valid" in describe_signature(other, None)[0]


def test_a_second_signer_signs_beside_the_first(patch: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "bob.key")
    statement, first = make_statement(patch.read_bytes(), patch.name, Patch.load(patch).provenance), read_beside(patch)
    both = sign(statement, read_private_key(tmp_path / "bob.key"), first)
    again = sign(statement, read_private_key(tmp_path / "bob.key"), both)
    assert again == both, "a key signs once"
    signature_path(patch).write_bytes(both)
    for name in ("alice", "bob"):
        assert check_file_signer(patch, patch.read_bytes(), Signers.of(tmp_path / f"{name}.key.pub")).name == name
    assert Signers.of(tmp_path).names(Signature.read(both, "both").claims) == ["alice", "bob"]


def test_a_claimed_id_is_not_believed_and_not_needed(key: Path, tmp_path: Path) -> None:
    envelope = json.loads(signed(key=read_private_key(key)))
    (signature,) = envelope["signatures"]
    check = Signature.read(json.dumps({**envelope, "signatures": [{"sig": signature["sig"]}]}).encode(), "it")
    (signer,) = alice(tmp_path).known
    assert signer.signed(check), "any of the keys may have signed"
    forged = json.loads(signed())
    forged["signatures"][0]["keyid"] = signer.id
    assert not signer.signed(Signature.read(json.dumps(forged).encode(), "it"))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_signature_are_named(raw: bytes) -> None:
    with pytest.raises(DamagedSignatureError, match=r"it is no signature|it is a sigstore bundle without"):
        Signature.read(raw, "it")


@given(st.integers(0, len(signed()) - 1), st.integers(1, 255))
def test_a_changed_byte_never_passes_as_another_statement(place: int, flip: int) -> None:
    """What still verifies says the same: the change hit the hint of the key or the space around."""
    raw = bytearray(signed())
    raw[place] ^= flip
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes(PEM, PUBLIC_FORMAT)
    try:
        signature = Signature.read(bytes(raw), "it")
        signers(key).check(Signature.read(signed(), "it").statement.sha256, signature, "the file")
    except SignatureError:
        return
    assert signature.statement == Signature.read(signed(), "it").statement


PUBLIC_FORMAT = written.PublicFormat.SubjectPublicKeyInfo


def signers(pem: bytes) -> Signers:
    from modelpatch.patch.keys import Key

    return Signers((Key("one", written.load_pem_public_key(pem).public_bytes_raw()),))


@pytest.mark.parametrize("deep", [b'{"payload":' * 5000, b"[" * 100_000, b'{"payload": "eyJ9"}', b"\xff\xfe", b"null"])
def test_hostile_signatures_are_named(deep: bytes) -> None:
    with pytest.raises(DamagedSignatureError):
        Signature.read(deep, "it")


def test_keys_as_openssh_and_openssl_write_them(tmp_path: Path) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    forms = {"ssh": written.PrivateFormat.OpenSSH, "pem": written.PrivateFormat.PKCS8}
    for name, form in forms.items():
        (tmp_path / name).write_bytes(private.private_bytes(PEM, form, PLAIN))
        assert read_private_key(tmp_path / name).private_bytes_raw() == private.private_bytes_raw()
    public = private.public_key()
    ssh = public.public_bytes(written.Encoding.OpenSSH, written.PublicFormat.OpenSSH)
    other = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(PEM, PUBLIC_FORMAT)
    (tmp_path / "team.pub").write_bytes(b"# the team\n" + ssh + b" alice@example.org\n" + other)
    found = Signers.of(tmp_path / "team.pub").known
    assert {signer.name for signer in found} == {"alice@example.org", "team 1"}
    assert found[1].signed(Signature.read(signed(key=private), "it"))
    assert Signers.of(tmp_path).known == found, "a folder is its files"


def test_new_keys_are_for_their_owner_and_are_never_replaced(key: Path) -> None:
    assert key.stat().st_mode & 0o077 == 0
    with pytest.raises(KeyFileError, match="exists already"):
        make_key(key)


def test_a_locked_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    made = make_key(tmp_path / "locked", "open sesame")
    for passphrase in (None, "wrong"):
        with pytest.raises(LockedKeyError, match="is locked"):
            read_private_key(tmp_path / "locked", passphrase)
    assert read_private_key(tmp_path / "locked", "open sesame").public_key().public_bytes_raw() == made.raw


def test_what_is_no_key_of_the_right_kind_is_named(key: Path, tmp_path: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "curve").write_bytes(curve.private_bytes(PEM, written.PrivateFormat.PKCS8, PLAIN))
    (tmp_path / "curve.pem").write_bytes(curve.public_key().public_bytes(PEM, PUBLIC_FORMAT))
    (tmp_path / "words.pem").write_text("no key")
    (tmp_path / "broken.pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    (tmp_path / "empty").mkdir()
    wrong = {
        "curve.pem": "ECPublicKey. Expected an Ed25519",
        "words.pem": "holds no public key",
        "broken.pem": "can be read",
        "alice.key": "is a private key",
        "nothing": "No such file",
        "empty": "no files",
    }
    for name, words in wrong.items():
        with pytest.raises(KeyFileError, match=words):
            Signers.of(tmp_path / name)
    for name, words in {
        "curve": "Expected an Ed25519",
        f"alice.key{PUBLIC}": "a public key",
        "nothing": "No such",
    }.items():
        with pytest.raises(KeyFileError, match=words):
            read_private_key(tmp_path / name)
    with pytest.raises(KeyFileError, match="no signer is named"):
        Signers.of()
    with pytest.raises(KeyFileError, match="sigstore:IDENTITY,ISSUER"):
        Signers.of("sigstore:me@example.org")


# sigstore -----------------------------------------------------------------------------------------------------


def bundle(
    identity: str = "me@example.org", issuer: str = "https://accounts.example.org", *, older: bool = False
) -> bytes:
    """A bundle whose certificate names an identity, and whose envelope is that of a key: only sigstore could tell."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.RFC822Name(identity)])
    made = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([])).serial_number(1)
    made = made.public_key(key.public_key()).not_valid_before(now).not_valid_after(now + timedelta(1))
    old = x509.UnrecognizedExtension(x509.ObjectIdentifier(ISSUERS[1]), issuer.encode())
    new = x509.UnrecognizedExtension(x509.ObjectIdentifier(ISSUERS[0]), bytes([12, len(issuer)]) + issuer.encode())
    made = made.add_extension(old if older else new, False)
    certificate = made.add_extension(names, True).sign(key, hashes.SHA256()).public_bytes(written.Encoding.DER)
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"certificate": {"rawBytes": base64.b64encode(certificate).decode()}},
            "dsseEnvelope": json.loads(signed()),
        }
    ).encode()


@pytest.fixture
def sigstore(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A sigstore that answers as it is told: its logs and certificates cannot be reached from a test."""
    told = SimpleNamespace(error=None, asked=[])

    def verify(given: bytes, policy: dict[str, str]) -> tuple[str, bytes]:
        told.asked.append(policy)
        if told.error:
            raise told.error
        return "type", Signature.read(given, "it").envelope.payload

    monkeypatch.setattr(bundles, "_verifier", lambda: SimpleNamespace(verify_dsse=verify))
    parts = SimpleNamespace(Bundle=SimpleNamespace(from_json=bytes), Identity=dict)
    monkeypatch.setattr(bundles, "require", lambda *names: parts)
    return told


WHO = "sigstore:me@example.org,https://accounts.example.org"


def test_an_identity_is_asked_of_sigstore_with_its_issuer(sigstore: SimpleNamespace) -> None:
    signature = Signature.read(bundle(), "it")
    assert signature.claims == ("me@example.org,https://accounts.example.org",)
    assert Signature.read(bundle(older=True), "it").claims == signature.claims
    assert Signers.of(WHO).check(signature.statement.sha256, signature, "the file").name == "me@example.org"
    assert sigstore.asked == [{"identity": "me@example.org", "issuer": "https://accounts.example.org"}]


def test_a_bundle_of_another_identity_or_that_sigstore_refuses_is_named(sigstore: SimpleNamespace, key: Path) -> None:
    other, sha256 = Signature.read(bundle("you@example.org"), "it"), Signature.read(signed(), "it").statement.sha256
    with pytest.raises(OtherSignerError, match=r"signed by you@example\.org"):
        Signers.of(WHO).check(sha256, other, "the file")
    elsewhere = Signature.read(bundle(issuer="https://anybody.example.org"), "it")
    with pytest.raises(OtherSignerError, match=r"signed by me@example\.org,https://anybody"):
        Signers.of(WHO).check(sha256, elsewhere, "the file")
    assert not sigstore.asked
    with pytest.raises(OtherSignerError, match="by alice is required"):
        Signers.of(f"{key}.pub").check(sha256, other, "the file")
    sigstore.error = ValueError("not in the log\nmore")
    with pytest.raises(DamagedSignatureError, match=r"does not verify: not in the log\."):
        Signers.of(WHO).check(sha256, Signature.read(bundle(), "it"), "the file")
    sigstore.error = None
    with pytest.raises(DamagedSignatureError, match="not of the file"):
        Signers.of(WHO).check("0" * 64, Signature.read(bundle(), "it"), "the file")


def test_without_sigstore_its_extra_is_named() -> None:
    try:
        import sigstore  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"modelpatch\[sigstore\]"):
            Signers.of(WHO)
        with pytest.raises(MissingExtraError, match=r"modelpatch\[sigstore\]"):
            bundles.sign_bundle(b"{}")
    else:
        assert Signers.of(WHO).known[0].name == "me@example.org"

"""A store of signed patches: signatures travel with the files, and a store that requires a signer refuses all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import draft_patch, make_tiny
from modelpatch.errors import DamagedSignatureError, OtherSignerError, UnsignedPatchError
from modelpatch.patch.contents import encode_patch
from modelpatch.patch.envelope import make_statement, read_beside, signature_path
from modelpatch.patch.keys import make_key, read_private_key, sign
from modelpatch.patch.signing import Signers
from modelpatch.store.store import Store
from modelpatch.store.version import Version

pytest.importorskip("cryptography")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A patch signed by alice, one signed by bob, one by nobody."""
    for seed, name in enumerate(("alice", "bob", "nobody")):
        path = draft_patch(make_tiny(), seed=seed).save(tmp_path / f"{name}.safetensors")
        if name != "nobody":
            make_key(tmp_path / name)
            statement = make_statement(path.read_bytes(), path.name, {})
            signature_path(path).write_bytes(sign(statement, read_private_key(tmp_path / name)))
    return tmp_path


def trusted(folder: Path, root: str = "store") -> Store:
    return Store(folder / root, signers=Signers.of(folder / "alice.pub"))


def test_only_what_the_signer_signed_is_published(folder: Path) -> None:
    store = trusted(folder)
    version = store.publish("flowers", folder / "alice.safetensors")
    assert version.signers == tuple(signer.id for signer in Signers.of(folder / "alice.pub").known)
    assert store.signature(version) == read_beside(folder / "alice.safetensors")
    with pytest.raises(OtherSignerError, match="a signature by alice is required"):
        store.publish("flowers", folder / "bob.safetensors")
    with pytest.raises(UnsignedPatchError, match="has no signature"):
        store.publish("flowers", folder / "nobody.safetensors")
    stolen = read_beside(folder / "alice.safetensors")
    with pytest.raises(DamagedSignatureError, match="is of a file alice"):
        store.publish("flowers", encode_patch(draft_patch(make_tiny(), seed=2)), signature=stolen)
    assert store.list() == [version], "and nothing else is there"


def test_a_signature_of_other_bytes_goes_into_no_store(folder: Path) -> None:
    stolen = read_beside(folder / "alice.safetensors")
    with pytest.raises(DamagedSignatureError, match="not of"):
        Store(folder / "store").publish("flowers", folder / "nobody.safetensors", signature=stolen)


def test_what_others_published_is_refused_when_it_is_read(folder: Path) -> None:
    Store(folder / "store").publish("flowers", folder / "nobody.safetensors", tags=("new",))
    Store(folder / "store").publish("flowers", folder / "bob.safetensors", tags=("latest",))
    store = trusted(folder)
    for read in (store.load, store.read):
        with pytest.raises(UnsignedPatchError, match="flowers@"):
            read("flowers@new")
        with pytest.raises(OtherSignerError, match="flowers@"):
            read("flowers")
    assert {"has no signature", "is signed by"} == {
        words for fault in store.verify() for words in ("has no signature", "is signed by") if words in fault.what
    }
    with pytest.raises(OtherSignerError):
        trusted(folder, "mine").pull(Store(folder / "store"), "flowers")
    assert not trusted(folder, "mine").exists()


def test_signatures_are_copied_with_their_files_and_removed_with_them(folder: Path) -> None:
    ours, theirs = Store(folder / "store"), trusted(folder, "other")
    ours.publish("flowers", folder / "alice.safetensors")
    (copied,) = theirs.pull(ours, "flowers")
    assert theirs.load("flowers").task == ours.load("flowers").task
    assert theirs.verify() == []
    assert theirs.list() == [copied]
    theirs.remove("flowers", force=True)
    assert [path for path in (folder / "other").rglob("*") if path.suffix in (".sig", ".safetensors")] == []


def test_a_version_is_signed_later_and_keeps_its_age(folder: Path) -> None:
    path = folder / "nobody.safetensors"
    store = Store(folder / "store")
    before = store.publish("flowers", path)
    assert b"signers" not in before.record(), "nothing is said of what is not there"
    signature_path(path).write_bytes(
        sign(make_statement(path.read_bytes(), path.name, {}), read_private_key(folder / "alice"))
    )
    after = store.publish("flowers", path)
    assert (after.hash, after.created, len(after.signers)) == (before.hash, before.created, 1)
    assert store.publish("flowers", path.read_bytes()) == after, "publishing without the signature leaves it there"
    assert [version.signers for version in store.list()] == [after.signers]
    assert Version.read(after.record(), "flowers", after.hash).signers == after.signers
    assert trusted(folder).load("flowers").task.name
    assert store.verify() == []
    (folder / "store" / "patches" / "flowers" / f"{after.hash}.sig").unlink()
    (fault,) = store.verify()
    assert "record is not that of the patch" in fault.what

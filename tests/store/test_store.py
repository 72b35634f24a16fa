"""A store of patches: what is published is what is loaded, and what is in the way is said."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import modelpatch as mp
from conftest import draft_patch, make_tiny
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import (
    DamagedPatchError,
    InvalidReferenceError,
    NotAPatchError,
    OtherBackboneError,
    PatchFileError,
    StoreError,
    TaggedVersionError,
    UnknownPatchError,
)
from modelpatch.patch.contents import encode_patch
from modelpatch.store.store import Store

TINY = make_tiny()
PATCHES = [draft_patch(TINY, seed=seed) for seed in range(4)]
FILES = [encode_patch(patch) for patch in PATCHES]
HASHES = [hashlib.sha256(data).hexdigest() for data in FILES]


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path}"


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def place(store: Store, end: str) -> Path:
    """The only file of a folder's store that ends so."""
    (found,) = (path for path in Path(store.url).rglob("*") if path.name.endswith(end))
    return found


# publish and load -------------------------------------------------------------------------------------------


def test_a_patch_of_another_backbone_is_refused_unless_said_twice(store: Store, tmp_path: Path) -> None:
    first = store.publish("flowers", PATCHES[0])
    store.publish("flowers", PATCHES[1], tags=("candidate",))
    stranger = draft_patch(make_tiny(1))
    other = make_tiny().module
    other.stage1[0].act = nn.SiLU(inplace=True)
    changed = draft_patch(load_backbone(other, preprocessing=TINY.preprocessing))
    far = Store(f"memory://{tmp_path}/far")
    far.publish("flowers", stranger)
    for refused in (
        lambda: store.publish("flowers", stranger),
        lambda: store.publish("flowers", stranger, tags=("candidate",)),
        lambda: far.push(store, "flowers"),
        lambda: store.pull(far, "flowers"),
    ):
        with pytest.raises(OtherBackboneError, match="different backbones"):
            refused()
    with pytest.raises(OtherBackboneError, match="relu against silu"):
        store.publish("flowers", changed)
    assert store.resolve("flowers") == first  # nothing was written, and no tag moved
    assert {one.hash for one in store.versions("flowers")} == set(HASHES[:2])
    meant = store.publish("flowers", stranger, tags=("next",), other_backbone=True)
    with pytest.raises(OtherBackboneError, match="different backbones"):
        store.tag("flowers", "latest", "flowers@next")
    assert store.tag("flowers", "latest", "flowers@next", other_backbone=True).hash == meant.hash
    assert store.tag("flowers", "prod", "flowers").hash == meant.hash  # of the backbone that `latest` has by now
    assert store.pull(far, "flowers") == [store.resolve("flowers")]
    with pytest.raises(OtherBackboneError, match="different backbones"):
        store.push(far, "flowers@candidate")
    assert [one.hash for one in store.push(far, "flowers@candidate", other_backbone=True)] == [HASHES[1]]


def test_what_is_published_is_what_is_loaded(store: Store, tmp_path: Path) -> None:
    assert mp.Store is Store
    assert store.list() == []
    version = store.publish("flowers", PATCHES[0])
    assert (version.name, version.hash, version.nbytes) == ("flowers", HASHES[0], len(FILES[0]))
    assert version.tags == ("latest",)
    assert store.list() == store.versions("flowers") == [version] == [store.resolve("flowers")]
    assert store.load("flowers").content_hash == store.load(version).content_hash == PATCHES[0].content_hash
    assert store.read(version) == store.read("flowers@latest") == FILES[0]
    assert store.verify() == []
    path = PATCHES[1].save(tmp_path / "other.safetensors")
    assert store.publish("birds", path) == store.publish("birds", str(path)) == store.publish("birds", FILES[1])
    assert [one.name for one in store.list()] == ["birds", "flowers"]
    assert repr(store) == f"Store({store.url!r})"


def test_versions_are_kept_and_tags_move(store: Store) -> None:
    first = store.publish("flowers", PATCHES[0], tags=("latest", "prod"))
    second = store.publish("flowers", PATCHES[1])
    assert store.resolve("flowers").hash == second.hash
    assert store.resolve("flowers@prod").hash == first.hash
    assert {one.hash: one.tags for one in store.list()} == {first.hash: ("prod",), second.hash: ("latest",)}
    assert store.tag("flowers", "prod", second).tags == ("latest", "prod")
    assert store.tag("flowers", "old", f"flowers@{first.hash[:8]}").tags == ("old",)
    assert store.load("flowers@prod").content_hash == PATCHES[1].content_hash
    store.untag("flowers", "old")
    for missing in ("old", first.hash[:8]):
        with pytest.raises(UnknownPatchError):
            store.untag("flowers", missing)
    with pytest.raises(UnknownPatchError, match=r"has flowers, but no flowers@old; its tags: latest, prod"):
        store.resolve("flowers@old")
    assert Store(store.url).list() == store.list()


def test_the_same_bytes_are_the_same_version(store: Store) -> None:
    first = store.publish("flowers", PATCHES[0], tags="prod")
    again = store.publish("flowers", PATCHES[0], tags=("latest", "latest"))
    assert again == replace(first, tags=("latest", "prod"))
    assert store.versions("flowers") == [again]
    elsewhere = store.publish("birds", PATCHES[0])
    assert (elsewhere.hash, elsewhere.name) == (first.hash, "birds")


def test_a_version_without_a_tag_is_named_by_its_hash(store: Store) -> None:
    version = store.publish("flowers", PATCHES[0], tags=())
    assert version.tags == ()
    assert store.resolve(version.reference) == store.resolve(f"flowers@{version.hash[:8]}") == version
    with pytest.raises(UnknownPatchError, match="no flowers@latest; its tags: none; its versions: 1"):
        store.load("flowers")
    with pytest.raises(UnknownPatchError):
        store.resolve(f"flowers@{version.hash[:7]}")
    store.tag("flowers", version.hash[:8], version)
    other = store.publish("flowers", PATCHES[1], tags=())
    store.tag("flowers", version.hash[:8], other)
    assert store.resolve(f"flowers@{version.hash[:8]}") == store.resolve(other.reference)  # a tag comes first


def test_a_hash_that_begins_two_versions_names_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish("flowers", PATCHES[0])
    for hash in ("0" * 64, "0" * 8 + "1" * 56):  # records of files that nobody could find
        (tmp_path / "patches" / "flowers" / f"{hash}.json").write_bytes(b"{}")
    with pytest.raises(UnknownPatchError, match="no single version: 0000000000000000, 0000000011111111 begin so"):
        store.resolve("flowers@00000000")


def test_unknown_names_are_answered_by_those_that_are_near(store: Store) -> None:
    store.publish("flowers", PATCHES[0])
    with pytest.raises(UnknownPatchError, match=r"no patch 'flower' in .*Did you mean flowers\?"):
        store.load("flower")
    with pytest.raises(UnknownPatchError, match="no patch 'zebra'"):
        store.versions("zebra")
    with pytest.raises(UnknownPatchError, match=r"no patch 'birds'"):
        store.resolve(f"birds@{HASHES[0]}")
    with pytest.raises(UnknownPatchError, match=r"no flowers@1111"):
        store.resolve(f"flowers@{'1' * 64}")


# what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [b"", FILES[0][:-1], FILES[0] + b"\0", FILES[0].replace(b"draft", b"graft"), b"\x80" * 100], ids=range(5)
)
def test_nothing_is_visible_of_what_is_no_intact_patch(store: Store, bad: bytes) -> None:
    with pytest.raises(PatchFileError):
        store.publish("flowers", bad)
    assert store.list() == []
    assert store._storage.walk("patches") == []


def test_what_is_no_patch_at_all(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotAPatchError, match=r"missing.safetensors' cannot be read: No such file"):
        store.publish("flowers", tmp_path / "missing.safetensors")
    with pytest.raises(NotAPatchError, match="int is no patch"):
        store.publish("flowers", 3)  # type: ignore[arg-type]
    with pytest.raises(NotAPatchError):
        store.publish("flowers", "a\0b")


CALLS: dict[str, Callable[[Store, str], object]] = {
    "publish": lambda store, name: store.publish(name, FILES[0]),
    "tags": lambda store, name: store.publish("flowers", FILES[0], tags=(name,)),
    "resolve": lambda store, name: store.resolve(name),
    "resolve tag": lambda store, name: store.resolve(f"flowers@{name}"),
    "load": lambda store, name: store.load(name),
    "versions": lambda store, name: store.versions(name),
    "tag": lambda store, name: store.tag(name, "prod", "flowers"),
    "tag tag": lambda store, name: store.tag("flowers", name, "flowers"),
    "untag": lambda store, name: store.untag("flowers", name),
    "remove": lambda store, name: store.remove(name),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name", ["../flowers", "..", "/etc/passwd", "a/b", "Flowers", "ﬂowers", "a\0b", ".x", "a\n", "a" * 65]
)
def test_no_name_leads_anywhere_else(call: str, name: str, store: Store) -> None:
    store.publish("flowers", FILES[0])
    before = store._storage.walk("patches")
    with pytest.raises(InvalidReferenceError):
        CALLS[call](store, name)
    assert store._storage.walk("patches") == before


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's here")
def test_links_in_the_folder_do_not_lead_out_of_it(folder_store: Store, tmp_path: Path) -> None:
    outside = Store(tmp_path / "outside")
    outside.publish("flowers", FILES[0])
    folder_store.publish("birds", FILES[1])
    root = Path(folder_store.url) / "patches"
    (root / "flowers").symlink_to(Path(outside.url) / "patches" / "flowers")
    secret = tmp_path / "secret"
    secret.write_text(HASHES[1])
    (root / "birds" / "prod.tag").symlink_to(secret)
    for call in (
        lambda: folder_store.load("flowers"),
        lambda: folder_store.publish("flowers", FILES[2]),
        lambda: folder_store.remove("flowers", force=True),
        lambda: folder_store.resolve("birds@prod"),
    ):
        with pytest.raises(StoreError, match="leads out of the store"):
            call()
    assert outside.read("flowers") == FILES[0]
    assert len(outside.list()) == 1
    folder_store.publish("birds", FILES[1], tags=("prod",))  # takes the link's place
    assert secret.read_text() == HASHES[1]


# remove and collect -------------------------------------------------------------------------------------------


def test_what_a_tag_names_is_removed_by_force_only(store: Store) -> None:
    first = store.publish("flowers", PATCHES[0], tags=("latest", "prod"))
    with pytest.raises(TaggedVersionError, match=r"is tagged latest, prod. Remove the tag first"):
        store.remove("flowers")
    assert store.list() == [first]
    assert store.remove(first, force=True) == first
    assert store.list() == []
    assert store._storage.walk("patches") == []
    with pytest.raises(UnknownPatchError):
        store.remove(first)
    second = store.publish("flowers", PATCHES[1], tags=())
    assert store.remove(second.reference) == second


def test_collect_removes_what_no_tag_names(store: Store) -> None:
    versions = [store.publish("flowers", patch) for patch in PATCHES[:3]]
    store.publish("birds", PATCHES[0], tags=("prod",))
    store.tag("flowers", "keep", versions[0])
    expected = [replace(versions[1], tags=())]
    assert store.collect(dry_run=True) == expected
    assert len(store.list()) == 4
    assert store.collect() == expected
    assert store.collect() == []
    assert {one.reference for one in store.list()} == {
        versions[0].reference,
        versions[2].reference,
        f"birds@{HASHES[0]}",
    }
    assert len(store._storage.walk("patches")) == 2 * 3 + 3  # file and record each, and three tags
    assert store.verify() == []


def test_a_tag_that_cannot_be_read_stops_the_collection(folder_store: Store) -> None:
    first = folder_store.publish("flowers", PATCHES[0], tags=("prod",))
    folder_store.publish("flowers", PATCHES[1])
    place(folder_store, "prod.tag").write_bytes(b"garbage")
    with pytest.raises(DamagedPatchError, match="the tag prod of flowers is damaged"):
        folder_store.collect()
    assert folder_store.read(first) == folder_store.read(first.reference) == FILES[0]
    assert folder_store.load("flowers").content_hash == PATCHES[1].content_hash  # the other tag still serves
    assert [one.tags for one in folder_store.list()] == [(), ("latest",)]
    folder_store.untag("flowers", "prod")
    assert folder_store.collect() == [replace(first, tags=())]


def test_collect_removes_what_dead_writers_left(folder_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_store.publish("flowers", PATCHES[0])
    patches = Path(folder_store.url) / "patches" / "flowers"
    left = [patches / f"{HASHES[1]}.safetensors", patches / ".latest.tag.0123456789ab.tmp"]
    left.append(Path(folder_store.url) / "index" / ".x.done.0123456789ab.tmp")
    for path in left:
        path.write_bytes(b"half")
    assert folder_store.verify() == []
    folder_store.collect()
    assert all(path.exists() for path in left)  # their writer may still live
    for path in left:
        os.utime(path, (0, 0))
    folder_store.collect()
    assert not any(path.exists() for path in left)
    assert folder_store.read("flowers") == FILES[0]


# damage -------------------------------------------------------------------------------------------------------


def test_every_damage_is_refused_and_found(folder_store: Store) -> None:
    store = folder_store
    version = store.publish("flowers", PATCHES[0])
    store.publish("birds", PATCHES[1])
    file, record = place(store, f"{HASHES[0]}.safetensors"), place(store, f"{HASHES[0]}.json")
    tag = record.with_name("latest.tag")

    def problems() -> list[str]:
        return [str(problem) for problem in store.verify()]

    def mend() -> None:
        store.publish("flowers", PATCHES[0])
        assert problems() == []

    file.write_bytes(FILES[2])  # an intact patch, but another
    with pytest.raises(DamagedPatchError, match="are not those that were published"):
        store.load("flowers")
    assert "are not those that were published" in problems()[0]
    mend()
    file.unlink()
    with pytest.raises(DamagedPatchError, match=r"the file of flowers@.* is missing"):
        store.load("flowers")
    assert "is missing" in problems()[0]
    mend()
    record.write_bytes(b"{}")
    with pytest.raises(DamagedPatchError, match="the record of flowers"):
        store.resolve("flowers")
    assert "the record of flowers" in problems()[0]
    assert store.load("birds").content_hash == PATCHES[1].content_hash
    assert [one.name for one in store.rebuild()] == ["birds"]  # the others are still listed
    mend()
    record.write_bytes(b"{}")
    store.publish("flowers", PATCHES[2], tags=())
    assert [one.hash for one in store.versions("flowers")] == [HASHES[2]]
    store.remove(f"flowers@{HASHES[2]}")
    with pytest.raises(DamagedPatchError, match="records of all versions of flowers are damaged"):
        store.versions("flowers")
    mend()
    record.write_bytes(replace(version, nbytes=7).record())
    assert "the record is not that of the patch" in problems()[0]
    record.unlink()
    with pytest.raises(DamagedPatchError, match=r"names the version .* which is not there"):
        store.load("flowers")
    assert any("which is not there" in problem for problem in problems())
    mend()
    tag.write_bytes(b"\xff")
    with pytest.raises(DamagedPatchError, match="the tag latest of flowers is damaged"):
        store.load("flowers")
    assert len(problems()) == 1
    mend()


def test_a_wrong_index_is_found_and_made_anew(store: Store) -> None:
    version = store.publish("flowers", PATCHES[0])
    assert store.list() == [version]
    for mark in store._storage.names("index"):
        if mark.endswith(".done"):
            store._storage.delete(f"index/{mark}")
    store._storage.write("patches/flowers/prod.tag", version.hash.encode())  # past the store
    assert [problem.where for problem in store.verify()] == ["index"]
    assert store.rebuild() == store.list() == [replace(version, tags=("latest", "prod"))]
    assert store.verify() == []


# between stores -----------------------------------------------------------------------------------------------


def test_versions_are_copied_with_the_tag_that_names_them(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    first = store.publish("flowers", PATCHES[0], tags=("latest", "prod"))
    second = store.publish("flowers", PATCHES[1])
    assert [one.tags for one in store.push(other, ["flowers@prod", "flowers", first.reference])] == [
        ("prod",),
        ("latest",),
        ("prod",),
    ]
    assert {one.hash: one.tags for one in other.list()} == {first.hash: ("prod",), second.hash: ("latest",)}
    assert other.resolve("flowers").created == second.created
    third = Store(tmp_path / "third")
    (copied,) = third.pull(other, f"flowers@{second.hash[:8]}")
    assert (copied.hash, copied.tags) == (second.hash, ())
    assert other.verify() == third.verify() == []


def test_a_damaged_version_is_not_copied(folder_store: Store, tmp_path: Path) -> None:
    folder_store.publish("flowers", PATCHES[0])
    place(folder_store, ".safetensors").write_bytes(FILES[1])
    other = Store(tmp_path / "other")
    with pytest.raises(DamagedPatchError):
        folder_store.push(other, "flowers")
    assert other.list() == []


def test_a_version_belongs_to_its_name(store: Store) -> None:
    flowers, _ = store.publish("flowers", PATCHES[0]), store.publish("birds", PATCHES[1])
    with pytest.raises(StoreError, match="is no version of birds"):
        store.tag("birds", "prod", flowers)
    store.remove(flowers, force=True)
    with pytest.raises(UnknownPatchError):
        store.tag("flowers", "prod", flowers)

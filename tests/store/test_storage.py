"""Places for files: the same behaviour for folders and object stores, and no way out of a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from modelpatch.errors import MissingExtraError, StoreError
from modelpatch.store.storage import Folder, Storage, open_storage


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "made" / "store", {})
    return open_storage(f"memory://{tmp_path.name}/store", {})


def test_files_are_written_replaced_listed_and_deleted(storage: Storage) -> None:
    assert storage.names("a") == set()
    assert storage.walk("a") == []
    storage.write("a/b/one", b"1")
    storage.write("a/b/one", b"2")
    storage.write("a/two", b"")
    assert (storage.read("a/b/one"), storage.read("a/two")) == (b"2", b"")
    assert storage.names("a") == {"b", "two"}
    assert sorted(storage.walk("a")) == ["a/b/one", "a/two"]
    assert 0 <= storage.age("a/two") < 60
    storage.delete("a/two")
    storage.delete("a/two")
    assert storage.names("a") == {"b"}
    assert storage.age("a/two") == 0
    assert storage.map(lambda number: 2 * number, range(5)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("path", ["missing", "no/folder"])
def test_a_missing_file_is_a_missing_file(storage: Storage, path: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read(path)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_storage(tmp_path, {}), Folder)
    assert isinstance(open_storage(f"file://{tmp_path}", {}), Folder)
    assert type(open_storage("memory://x", {})) is Storage
    for url, message in (
        ("", "names no store"),
        ("nowhere://x", "cannot be reached: .*nowhere"),
        ("simplecache::memory://x", "names no store"),
        ("a\0b", "names no store"),
    ):
        with pytest.raises(StoreError, match=message):
            open_storage(url, {})
    with pytest.raises(StoreError, match="takes no storage options; given: key"):
        open_storage(tmp_path, {"key": "x"})
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"s3://.* needs `s3fs`.*modelpatch\[s3\]"):
        open_storage("s3://bucket/x", {})


def test_what_a_place_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied\nrequest 17")

    storage = open_storage("memory://refused", {})
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(StoreError, match=r"cannot write memory://refused/a: Access Denied$"):
        storage.write("a", b"")
    with pytest.raises(StoreError, match="cannot read memory://refused/a"):
        storage.read("a")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        open_storage(tmp_path / "file", {}).write("a/b", b"")


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's here")
def test_no_link_leads_out_of_a_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "store-beside").mkdir()
    root = tmp_path / "store"
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "beside").symlink_to(tmp_path / "store-beside")  # the same beginning is not the same folder
    (root / "file").symlink_to(outside / "secret")
    storage = open_storage(root, {})
    attempts = (
        lambda: storage.read("folder/secret"),
        lambda: storage.read("file"),
        lambda: storage.write("folder/new", b"x"),
        lambda: storage.write("beside/new", b"x"),
        lambda: storage.write("folder/deep/er/new", b"x"),
        lambda: storage.delete("folder/secret"),
        lambda: storage.names("folder"),
        lambda: storage.walk("folder"),
        lambda: storage.read("../outside/secret"),
    )
    for attempt in attempts:
        with pytest.raises(StoreError, match="leads out of the store"):
            attempt()
    storage.write("file", b"mine")  # takes the link's place
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert list((tmp_path / "store-beside").iterdir()) == []
    assert storage.walk("") == ["./file"]


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's here")
def test_the_store_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    open_storage(tmp_path / "link", {}).write("a/b", b"x")
    assert open_storage(tmp_path / "real", {}).read("a/b") == b"x"

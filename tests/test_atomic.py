"""A write leaves the old file or the new file, and nothing else in the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpatch import atomic
from modelpatch.atomic import write_bytes
from modelpatch.errors import ModelpatchError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is there already."""
    (tmp_path / "file.bin").write_bytes(b"old")
    return tmp_path / "file.bin"


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_write_makes_or_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path, path: Path) -> None:
    write_bytes(path, b"new")
    write_bytes(tmp_path / "other.bin", b"")
    assert path.read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.bin", "other.bin"]


@pytest.mark.parametrize("crash", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_crash_before_the_rename_leaves_the_old_file_alone(
    step: str, crash: type[BaseException], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert len(list(path.parent.iterdir())) == 2  # the temporary file stands beside the old one
        raise crash(5, "crashed")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ModelpatchError if crash is OSError else crash):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_the_files_mode_follows_the_umask(umask: int, tmp_path: Path) -> None:
    write_bytes(tmp_path / "file.bin", b"new")
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.name != "posix", reason="only POSIX opens folders")
def test_the_file_and_its_folder_are_synced_in_that_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def record(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda *_: synced.append("rename"))
    write_bytes(path, b"new")
    assert synced == ["file", "rename", "folder"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "file.bin"
    with pytest.raises(ModelpatchError, match=r"cannot write .*missing.file\.bin: No such file.*folder exists"):
        write_bytes(target, b"new")


def test_a_folder_in_the_files_place_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelpatchError, match="folder"):
        write_bytes(tmp_path / "folder", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "link.bin"
    link.symlink_to(path)
    write_bytes(link, b"new")
    assert path.read_bytes() == b"old"
    assert link.read_bytes() == b"new"


def test_systems_without_folder_descriptors_are_served_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "os", _WithoutPosix())
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


class _WithoutPosix:
    name = "nt"

    def __getattr__(self, attribute: str) -> object:
        return getattr(os, attribute)

"""The index is a cache: whatever happens to it, a listing says what the files say."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from modelpatch.errors import StoreError
from modelpatch.store.files import DONE, FOLD, INDEX, RECORD, TAG, Index, pack, path_of, unpack
from modelpatch.store.storage import Storage, open_storage
from modelpatch.store.version import Version


def make_version(name: str, number: int = 0) -> Version:
    return Version(
        name=name,
        hash=f"{number:064x}",
        nbytes=1000 + number,
        created=f"2026-01-01T00:00:{number % 60:02}+00:00",
        method="scale-bias",
        task=f"task {number % 7}",
        backbone="bundled:tiny",
        fingerprint="a" * 64,
        chain="b" * 64,
        metrics={"top1": number / 1000},
    )


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "folder" else f"memory://index-{tmp_path}", {})


def put(index: Index, version: Version, tag: str = "latest") -> None:
    with index.changing(version.name):
        index.storage.write(path_of(version.name, version.hash + RECORD), version.record())
        index.storage.write(path_of(version.name, tag + TAG), version.hash.encode())


def tables(storage: Storage) -> list[str]:
    return sorted(name for name in storage.names(INDEX) if name.endswith(".table"))


def marks(storage: Storage) -> list[str]:
    return sorted(name for name in storage.names(INDEX) if not name.endswith(".table"))


def test_a_table_is_read_back_whole() -> None:
    versions = [make_version(f"patch-{number}", number) for number in range(50)]
    assert unpack(pack(versions)) == versions
    assert unpack(pack([])) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"name":["patch"', b'"name":["../etc"'),
        (b'"hash":["0', b'"hash":["/'),
        (b"1001", b'"many"'),
        (b"scale-bias", b"\\u001b[31m"),
        (b"top1", b"\\u202e"),
        (b"0.001", b"{}"),
        (b'"numbers":[0]', b'"numbers":[7]'),
        (b'"numbers":[0]', b'"numbers":[]'),
        (b'"created"', b'"made"'),
        (b"{", b""),
    ],
)
def test_a_damaged_table_is_no_table(old: bytes, new: bytes) -> None:
    data = pack([make_version("patch", 1)])
    assert old in data
    with pytest.raises(ValueError):  # noqa: PT011 (any of them)
        unpack(data.replace(old, new, 1))


def test_a_listing_is_right_before_and_after_every_new_table(storage: Storage) -> None:
    index = Index(storage)
    expected = []
    for number in range(2 * FOLD + 3):
        version = make_version(f"patch-{number:03}", number)
        put(index, version)
        expected.append(version.reference)
        if number % 5 == 0:
            assert [one.reference for one in index.listing()] == expected
            assert len(marks(storage)) <= FOLD
    assert [one.reference for one in Index(storage).listing()] == expected
    assert len(tables(storage)) == 1


def test_a_listing_reads_the_table_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(storage)
    put(index, make_version("patch"))
    made, read = index.listing(), index.listing()
    monkeypatch.setattr("modelpatch.store.files.unpack", lambda data: pytest.fail("read again"))
    assert index.listing() == read == made


@pytest.mark.parametrize("damage", ["lost", "torn", "doubled", "marks lost too"])
def test_a_broken_index_is_made_anew(storage: Storage, damage: str) -> None:
    index = Index(storage)
    for number in range(3):
        put(index, make_version("patch", number))
    expected = index.listing()
    (table,) = tables(storage)
    if damage in ("lost", "marks lost too"):
        storage.delete(f"{INDEX}/{table}")
    if damage == "marks lost too":
        for mark in marks(storage):
            storage.delete(f"{INDEX}/{mark}")
    if damage == "torn":
        storage.write(f"{INDEX}/{table}", storage.read(f"{INDEX}/{table}")[:-9])
    if damage == "doubled":  # by somebody who did not know of the first, nor of its versions
        storage.write(f"{INDEX}/{7:012}-{0:024x}.table", pack([]))
    assert Index(storage).listing() == expected
    assert len(tables(storage)) == 1


def test_a_writer_that_dies_at_any_step_leaves_a_right_listing(storage: Storage) -> None:
    index = Index(storage)
    put(index, make_version("patch", 1))
    index.listing()
    # the process ends with the record written: neither the tag nor the mark's end are there
    storage.write(f"{INDEX}/patch@{5:024x}.begun", b"")
    index.storage.write(path_of("patch", make_version("patch", 2).hash + RECORD), make_version("patch", 2).record())
    assert [one.nbytes for one in Index(storage).listing()] == [1001, 1002]
    for number in range(FOLD):
        put(index, make_version(f"other-{number}", number))
    assert len(index.listing()) == FOLD + 2
    assert marks(storage) == [f"patch@{5:024x}.begun"]  # nobody knows whether that writer still lives
    index.storage.write(path_of("patch", "prod" + TAG), make_version("patch", 2).hash.encode())  # it does
    assert [one.tags for one in index.listing() if one.name == "patch"] == [("latest",), ("prod",)]


def test_a_change_that_began_long_ago_is_cleared_away(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(storage)
    for number in range(FOLD):
        storage.write(f"{INDEX}/patch@{number:024x}.begun", b"")
    monkeypatch.setattr(type(storage), "age", lambda *_: 4000.0)
    index.listing()
    index.listing()
    assert marks(storage) == []


def test_readers_that_may_not_write_still_list(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(storage)
    put(index, make_version("patch", 1))

    def refuse(*_: object) -> None:
        raise StoreError("no")

    monkeypatch.setattr(type(storage), "write", refuse)
    monkeypatch.setattr(type(storage), "delete", refuse)
    assert [one.name for one in Index(storage).listing()] == ["patch"]


class Interleaved:
    """Two indexes over one storage; before any of one's steps, the other may do its whole work."""

    def __init__(self, storage: Storage, chance: random.Random, other: Index) -> None:
        self._storage, self._chance, self._other, self._busy = storage, chance, other, False
        self._count = 100

    def __getattr__(self, name: str) -> object:
        method = getattr(self._storage, name)
        if not callable(method) or name == "map":
            return method

        def step(*arguments: object) -> object:
            if not self._busy and self._chance.random() < 0.3:
                self._busy = True
                if self._chance.random() < 0.5:
                    self._count += 1
                    put(self._other, make_version(f"patch-{self._count}", self._count))
                else:
                    self._other.listing() if self._chance.random() < 0.7 else self._other.rebuild()
                self._busy = False
            return method(*arguments)

        return step


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_no_change_is_lost_whatever_order_writers_and_readers_come_in(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpatch.store.files.FOLD", 2)
    storage = open_storage(f"memory://interleaved-{tmp_path}", {})
    chance = random.Random(seed)
    second = Index(storage)
    first = Index(Interleaved(storage, chance, second))  # type: ignore[arg-type]
    for number in range(12):
        put(first, make_version(f"patch-{number}", number))
        published = {one.reference for one in Index(storage).scan()}
        seen = {one.reference for one in first.listing()}
        assert published <= seen
    truth = Index(storage).scan()
    assert Index(storage).listing() == truth
    assert second.listing() == truth


@pytest.mark.slow
def test_100_000_versions_are_listed_in_little_more_than_it_takes_to_parse_their_json(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, {})
    versions = [make_version(f"patch-{number:06}", number) for number in range(100_000)]
    table = f"{INDEX}/{1:012}-{0:024x}.table"
    storage.write(table, pack(versions))
    parsing, listing = [], []
    for _ in range(3):
        begin = time.process_time()  # other processes may hold the machine
        json.loads(storage.read(table))
        parsed = time.process_time()
        listed = Index(storage).listing()
        listing.append(time.process_time() - parsed)
        parsing.append(parsed - begin)
    assert listed == versions
    assert min(listing) < 10 * min(parsing)


def test_marks_end_with_their_change(storage: Storage) -> None:
    index = Index(storage)
    seen = []

    def fail() -> None:
        with index.changing("patch"):
            seen.extend(mark.rpartition(".")[2] for mark in marks(storage))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == ["begun"]
    assert [mark.endswith(DONE) for mark in marks(storage)] == [True]

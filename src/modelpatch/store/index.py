"""The index of a store: one table of all versions, so that a listing reads a few files and not all of them.

    index/GENERATION-TOKEN.table    all versions as they were when the table was made; never changed
    index/NAME@TOKEN.begun          a writer is changing the files of NAME
    index/NAME@TOKEN.done           a writer has changed them since

It is a cache: the files of the names are the truth, and a damaged index costs time, never a version. A
listing takes the table, reads the files of the names that are marked, and now and then makes a new table of both.

Why many writers need no lock. A mark stands before the first file changes and stays until a table that was made after the
change is there; `.begun` becomes `.done`, and only `.done` is cleared away. A new table is written before the old one is
deleted, and the old one before the marks; so a reader of a table, which finds after reading it that it is still the only one,
has also seen every mark that it lacks. Two tables at once are two that were made without knowledge of each other; none, that
the index is lost. In both cases a table is made from all files.
"""

from __future__ import annotations

import gc
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from pydantic_core import from_json

from modelpatch.errors import StoreError
from modelpatch.patch.file import canonical
from modelpatch.store.records import Records, is_temporary
from modelpatch.store.version import HASH, NAME, Version
from modelpatch.text import check_printable

INDEX = "index"
BEGUN, DONE = ".begun", ".done"
TABLE = re.compile(r"([0-9]{12})-[0-9a-f]{24}\.table")
MARK = re.compile(rf"({NAME.pattern})@([0-9a-f]{{24}})\.(begun|done)")
FOLD = 32  # marks from which on a new table is made
ABANDONED = 3600.0  # seconds after which a change that has begun is taken for one whose writer died
TRIES = 10
SHARED = ("method", "task", "backbone", "fingerprint", "chain", "tags")  # columns whose values repeat


class Index:
    """The index of the names that `records` reads."""

    def __init__(self, records: Records) -> None:
        self.records, self.storage = records, records.storage
        self._read: dict[str, list[Version]] = {}  # the last table, which never changes

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Around every change of the files of a name."""
        mark = f"{INDEX}/{name}@{_token()}"
        self.storage.write(mark + BEGUN, b"")
        try:
            yield
        finally:
            self.storage.write(mark + DONE, b"")
            self.storage.delete(mark + BEGUN)

    def versions(self) -> list[Version]:
        """All versions of all names, by name and age."""
        for _ in range(TRIES):
            before = self.storage.names(INDEX)
            tables = _tables(before)
            if len(tables) != 1:
                return self.rebuild()
            try:
                versions = self._table(tables[0])
            except FileNotFoundError:  # a writer made a new table
                continue
            except ValueError:
                return self.rebuild()
            after = self.storage.names(INDEX)
            if _tables(after) != tables:
                continue
            marks = [mark for mark in before | after if MARK.fullmatch(mark)]
            if not marks:
                return list(versions)
            names = {mark.partition("@")[0] for mark in marks}
            mended = [version for version in versions if version.name not in names] + self.records.scan(names)
            mended.sort(key=lambda version: (version.name, version.created, version.hash))
            if len(marks) >= FOLD:
                self._replace(tables, mended, marks)
            return mended
        return self.records.scan()

    def rebuild(self) -> list[Version]:
        """Make the table from all files, independent of what the index holds, and return its versions."""
        entries = self.storage.names(INDEX)
        versions = self.records.scan()
        self._replace(_tables(entries), versions, [entry for entry in entries if MARK.fullmatch(entry)])
        return versions

    def sweep(self) -> None:
        """Remove the temporary files of writers that died."""
        self._delete(
            [entry for entry in self.storage.names(INDEX) if is_temporary(entry) and self._is_abandoned(entry)]
        )

    def _replace(self, tables: list[str], versions: list[Version], marks: list[str]) -> None:
        """A new table in the place of those that were read before `versions` were, which hold what `marks` announce.

        Readers may be forbidden to write: the listing is right without it, and the next one tries again.
        """
        generation = max((int(table.partition("-")[0]) for table in tables), default=0) + 1
        try:
            self.storage.write(f"{INDEX}/{generation:012}-{_token()}.table", pack(versions))
            for table in tables:
                self.storage.delete(f"{INDEX}/{table}")
            self._delete([mark for mark in marks if mark.endswith(DONE) or self._is_abandoned(mark)])
        except StoreError:
            return

    def _delete(self, entries: Sequence[str]) -> None:
        self.storage.map(lambda entry: self.storage.delete(f"{INDEX}/{entry}"), entries)

    def _is_abandoned(self, mark: str) -> bool:
        return self.storage.age(f"{INDEX}/{mark}") > ABANDONED

    def _table(self, table: str) -> list[Version]:
        """A table's versions. Raises FileNotFoundError for one that was replaced meanwhile, ValueError for a damaged one."""
        versions = self._read.get(table)
        if versions is None:
            versions = unpack(self.storage.read(f"{INDEX}/{table}"))
            self._read = {table: versions}
        return versions


def pack(versions: Sequence[Version]) -> bytes:
    """A table: one column a field; repeating values stand once and are numbered."""
    columns: dict[str, Any] = {}
    for name in _FIELDS:
        values = [getattr(version, name) for version in versions]
        if name in SHARED:
            numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
            columns[name] = {"values": list(numbers), "numbers": [numbers[value] for value in values]}
        else:
            columns[name] = values
    return canonical(columns).encode()


def unpack(data: bytes) -> list[Version]:
    """The versions of a table. Raises ValueError for bytes that are none."""
    collects = gc.isenabled()
    gc.disable()  # nothing here is garbage, and looking for it while 100,000 objects are made takes as long as making them
    try:
        columns = from_json(data, cache_strings=False)
        texts: set[str] = set()
        for name in SHARED:
            values = [tuple(value) if name == "tags" else value for value in columns[name]["values"]]
            texts.update(str(text) for value in values for text in (value if name == "tags" else [value]))
            columns[name] = [values[number] for number in columns[name]["numbers"]]
        for name, pattern in (("name", NAME), ("hash", HASH)):
            if not all(map(pattern.fullmatch, columns[name])):
                raise ValueError(f"a {name} that is none")
        metrics = columns["metrics"]
        texts.update(columns["created"], *metrics)
        for text in texts:
            check_printable(text)
        figures = {type(value) for figures in metrics for value in figures.values()}
        if not figures <= {int, float} or set(map(type, columns["nbytes"])) - {int}:
            raise ValueError("metrics that are not numbers")
        rows = zip(*(columns[name] for name in _FIELDS), strict=True)
        return [Version(*row) for row in rows]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"no table of versions: {error}") from error
    finally:
        if collects:
            gc.enable()


def _tables(entries: set[str]) -> list[str]:
    return sorted(entry for entry in entries if TABLE.fullmatch(entry))


def _token() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


_FIELDS: tuple[str, ...] = tuple(column.name for column in fields(Version))

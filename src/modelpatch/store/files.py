"""The files of a store.

    patches/NAME/HASH.safetensors   a patch file, as it was published; HASH is its SHA-256
    patches/NAME/HASH.json          its record: with it the version exists
    patches/NAME/HASH.sig           its signature, where it has one: written before the record
    patches/NAME/TAG.tag            the hash of the version that the tag names
    index/GENERATION-TOKEN.table    all versions as they were when the table was made
    index/NAME@TOKEN.begun          a writer is changing the files of NAME
    index/NAME@TOKEN.done           a writer has changed them since

Tags are replaced whole, and so are a signature and its record when a version is signed anew; all other files never change. The
index is a cache of what the files of the names say (docs/store.md). A mark stands before the first file changes; only `.done`
ones are cleared away. A new table is written before the old one is deleted, and that before the marks: a reader that finds its
table still the only one after reading it has seen all marks that the table lacks.
"""

import gc
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import GenericAlias
from typing import Any, get_type_hints

from pydantic import create_model

from modelpatch.errors import DamagedPatchError, StoreError
from modelpatch.patch.file import canonical
from modelpatch.store.storage import Storage
from modelpatch.store.version import HASH, NAME, Version

PATCHES, INDEX = "patches", "index"
FILE, RECORD, TAG = ".safetensors", ".json", ".tag"
SIGNATURE = ".sig"
BEGUN, DONE = ".begun", ".done"
TABLE = re.compile(rf"{INDEX}/([0-9]{{12}})-[0-9a-f]{{24}}\.table")
MARK = re.compile(rf"{INDEX}/({NAME.pattern})@[0-9a-f]{{24}}\.(begun|done)")
FOLD = 32  # marks from which on a new table is made
TRIES = 10
SHARED = ("method", "task", "backbone", "fingerprint", "chain", "tags", "signers")  # columns whose values repeat


class Index:
    """The files of names, and the index over them. Names, tags and hashes are checked before they come here."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._read: dict[str, list[Version]] = {}  # the last table, which never changes

    def files(self, name: str) -> set[str]:
        """The files of a name."""
        return self.storage.names(path_of(name))

    def tag(self, name: str, tag: str) -> str:
        """The hash that a tag names. Raises `FileNotFoundError` or `DamagedPatchError`."""
        hash = self.storage.read(path_of(name, tag + TAG)).decode("ascii", "replace").strip()
        if not HASH.fullmatch(hash):
            said = f"the tag {tag} of {name} is damaged: it holds no hash."
            raise DamagedPatchError(said, "Set it again, or remove it.")
        return hash

    def tags(self, name: str, files: Iterable[str] | None = None, strict: bool = False) -> dict[str, str]:
        """The hash that every tag of a name names. Damaged ones are left out; if `strict`, `DamagedPatchError`."""
        passed = (FileNotFoundError, *(() if strict else (DamagedPatchError,)))  # removed since it was listed
        found = {}
        for tag in self._stems(name, TAG, NAME, files):
            with suppress(*passed):
                found[tag] = self.tag(name, tag)
        return found

    def hashes(self, name: str, files: Iterable[str] | None = None) -> set[str]:
        """The hashes that have a record."""
        return set(self._stems(name, RECORD, HASH, files))

    def _stems(self, name: str, end: str, kind: re.Pattern[str], files: Iterable[str] | None) -> list[str]:
        files = self.files(name) if files is None else files
        return sorted(stem for file in files if file.endswith(end) and kind.fullmatch(stem := file.removesuffix(end)))

    def version(self, name: str, hash: str, tags: Mapping[str, str]) -> Version:
        """A version with those of the `tags` that name it. Raises `FileNotFoundError`, or `DamagedPatchError`."""
        return with_tags(Version.read(self.storage.read(path_of(name, hash + RECORD)), name, hash), tags)

    def versions(self, name: str, files: Iterable[str] | None = None) -> list[Version]:
        """All versions of a name, the oldest first; one damaged record, which `Store.verify` finds, hides no others."""
        files = self.files(name) if files is None else files
        tags, found = self.tags(name, files), []
        for hash in self.hashes(name, files):
            with suppress(FileNotFoundError, DamagedPatchError):
                found.append(self.version(name, hash, tags))
        return sorted(found, key=lambda version: (version.created, version.hash))

    def all_files(self) -> dict[str, list[str]]:
        """The names of all files by patch, but for those that no store writes."""
        found: dict[str, list[str]] = {}
        for path in self.storage.walk(PATCHES):
            parts = path.split("/")
            if len(parts) == 3 and NAME.fullmatch(parts[1]):
                found.setdefault(parts[1], []).append(parts[2])
        return found

    def scan(self, names: Iterable[str] | None = None) -> list[Version]:
        """The versions of some names, or of all, by name and age."""
        files = self.all_files() if names is None else dict.fromkeys(names)
        found = self.storage.map(lambda item: self.versions(*item), sorted(files.items()))
        return [version for versions in found for version in versions]

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

    def listing(self) -> list[Version]:
        """All versions of all names, by name and age."""
        for _ in range(TRIES):
            before = self._entries()
            tables = _tables(before)
            if len(tables) != 1:
                return self.rebuild()
            try:
                versions = self._read.get(tables[0]) or unpack(self.storage.read(tables[0]))
            except FileNotFoundError:  # a writer made a new table
                continue
            except ValueError:
                return self.rebuild()
            self._read = {tables[0]: versions}
            after = self._entries()
            if _tables(after) != tables:
                continue
            marks = {found[0]: found[1] for entry in before | after if (found := MARK.fullmatch(entry))}
            if not marks:
                return list(versions)
            names = set(marks.values())
            mended = [version for version in versions if version.name not in names] + self.scan(names)
            mended.sort(key=lambda version: (version.name, version.created, version.hash))
            if len(marks) >= FOLD:
                self._replace(tables, mended, marks)
            return mended
        return self.scan()

    def rebuild(self) -> list[Version]:
        """Make the table from all files, independent of what the index holds, and return its versions."""
        entries = self._entries()
        versions = self.scan()
        self._replace(_tables(entries), versions, [entry for entry in entries if MARK.fullmatch(entry)])
        return versions

    def _replace(self, tables: list[str], versions: list[Version], marks: Iterable[str]) -> None:
        """A new table in the place of those that were read before `versions` were, which hold what `marks` announce."""
        generation = 1 + max((int(table.removeprefix(f"{INDEX}/").partition("-")[0]) for table in tables), default=0)
        with suppress(StoreError):  # readers may be forbidden to write; the next listing tries again
            self.storage.write(f"{INDEX}/{generation:012}-{_token()}.table", pack(versions))
            for table in tables:
                self.storage.delete(table)
            self.storage.map(self.storage.delete, (mark for mark in marks if mark.endswith(DONE)))
            self.storage.sweep(mark for mark in marks if mark.endswith(BEGUN))

    def _entries(self) -> set[str]:
        return {f"{INDEX}/{name}" for name in self.storage.names(INDEX)}


def path_of(name: str, file: str = "") -> str:
    return f"{PATCHES}/{name}/{file}".rstrip("/")


def with_tags(version: Version, tags: Mapping[str, str]) -> Version:
    """The version with those of the `tags` that name its hash."""
    return replace(version, tags=tuple(sorted(tag for tag, hash in tags.items() if hash == version.hash)))


def is_whole(hash: str, files: set[str]) -> bool:
    """Return True if both files of a version are among those of its name."""
    return {hash + RECORD, hash + FILE} <= files


def is_temporary(file: str) -> bool:
    """Return True for a file that `modelpatch.atomic` writes before it renames it."""
    return file.startswith(".") and file.endswith(".tmp")


def pack(versions: Sequence[Version]) -> bytes:
    """A table: one column a field; repeating values stand once and are numbered."""
    columns: dict[str, Any] = {name: [getattr(version, name) for version in versions] for name in _COLUMNS}
    for name in SHARED:
        numbers = {value: number for number, value in enumerate(dict.fromkeys(columns[name]))}
        columns[name] = {"values": list(numbers), "numbers": [numbers[value] for value in columns[name]]}
    return canonical(columns).encode()


def unpack(data: bytes) -> list[Version]:
    """The versions of a table. Raises ValueError for bytes that are none."""
    collects = gc.isenabled()
    gc.disable()  # nothing here is garbage, and looking for it while 100,000 objects are made takes as long as making them
    try:
        table = vars(_Table.model_validate_json(data))
        columns = [
            [column.values[number] for number in column.numbers] if name in SHARED else column
            for name, column in table.items()
        ]
        return [Version(*row) for row in zip(*columns, strict=True)]
    except IndexError as error:
        raise ValueError(f"no table of versions: {error}") from error
    finally:
        if collects:
            gc.enable()


def _tables(entries: set[str]) -> list[str]:
    return sorted(entry for entry in entries if TABLE.fullmatch(entry))


def _token() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


_TYPES = get_type_hints(Version, include_extras=True)
_LISTS: dict[str, Any] = {name: GenericAlias(list, (kind,)) for name, kind in _TYPES.items()}
_COLUMNS: dict[str, Any] = {
    name: create_model(name, values=kind, numbers=list[int]) if name in SHARED else kind
    for name, kind in _LISTS.items()
}
_Table = create_model("_Table", **_COLUMNS)

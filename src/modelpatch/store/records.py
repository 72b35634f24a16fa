"""The files of a store, which alone define its content.

    patches/NAME/HASH.safetensors   a patch file, as it was published; HASH is its SHA-256
    patches/NAME/HASH.json          its record: with it the version exists
    patches/NAME/TAG.tag            the hash of the version that the tag names

The first two never change once they are there; the third is replaced whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from modelpatch.errors import DamagedPatchError
from modelpatch.store.storage import Storage
from modelpatch.store.version import HASH, NAME, Version

PATCHES = "patches"
FILE, RECORD, TAG = ".safetensors", ".json", ".tag"


class Records:
    """Reads and writes the files of names. Names, tags and hashes are checked before they come here."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def names(self) -> set[str]:
        """The names that have a folder, even an empty one."""
        return {name for name in self.storage.names(PATCHES) if NAME.fullmatch(name)}

    def tag(self, name: str, tag: str) -> str:
        """The hash that a tag names. Raises `FileNotFoundError`, or `DamagedPatchError` for a file without a hash."""
        data = self.storage.read(self.path(name, tag + TAG))
        hash = data.decode("ascii", "replace").strip()
        if not HASH.fullmatch(hash):
            said = f"the tag {tag} of {name} is damaged: it holds no hash."
            raise DamagedPatchError(said, "Set it again, or remove it.")
        return hash

    def tags(self, name: str, files: Iterable[str] | None = None) -> dict[str, str]:
        """The hash that every tag of a name names, without tags that are damaged."""
        found = {}
        for tag in self._tag_names(name, files):
            with suppress(FileNotFoundError, DamagedPatchError):  # removed since it was listed
                found[tag] = self.tag(name, tag)
        return found

    def tagged(self, name: str) -> set[str]:
        """The hashes that tags name. Raises `DamagedPatchError` for a tag that cannot be read."""
        found = set()
        for tag in self._tag_names(name):
            with suppress(FileNotFoundError):
                found.add(self.tag(name, tag))
        return found

    def _tag_names(self, name: str, files: Iterable[str] | None = None) -> list[str]:
        files = self.storage.names(self.path(name)) if files is None else files
        return sorted(tag for file in files if file.endswith(TAG) and NAME.fullmatch(tag := file.removesuffix(TAG)))

    def version(self, name: str, hash: str, tags: dict[str, str]) -> Version:
        """A version with those of the `tags` that name it. Raises `FileNotFoundError`, or `DamagedPatchError`."""
        version = Version.read(self.storage.read(self.path(name, hash + RECORD)), name, hash)
        return replace(version, tags=tuple(sorted(tag for tag, other in tags.items() if other == hash)))

    def hashes(self, name: str, suffix: str = RECORD) -> set[str]:
        """The hashes that have a file of that kind."""
        return _hashes(self.storage.names(self.path(name)), suffix)

    def versions(self, name: str, files: Iterable[str] | None = None) -> list[Version]:
        """All versions of a name, the oldest first, without those whose record is damaged.

        One damaged file must not hide the others: `Store.verify` finds it, and asking for that version names it.
        """
        files = self.storage.names(self.path(name)) if files is None else files
        tags = self.tags(name, files)
        found = []
        for hash in _hashes(files, RECORD):
            with suppress(FileNotFoundError, DamagedPatchError):
                found.append(self.version(name, hash, tags))
        return sorted(found, key=lambda version: (version.created, version.hash))

    def content(self, name: str, hash: str) -> bytes:
        """The patch file as it lies there, unchecked. Raises `FileNotFoundError`."""
        return self.storage.read(self.path(name, hash + FILE))

    def files(self) -> dict[str, list[str]]:
        """The names of all files by patch, but for those that no store writes."""
        found: dict[str, list[str]] = {}
        for path in self.storage.walk(PATCHES):
            parts = path.split("/")
            if len(parts) == 3 and NAME.fullmatch(parts[1]):
                found.setdefault(parts[1], []).append(parts[2])
        return found

    def scan(self, names: Iterable[str] | None = None) -> list[Version]:
        """The versions of some names, or of all, by name and age."""
        files = self.files() if names is None else dict.fromkeys(names)
        found = self.storage.map(lambda item: self.versions(*item), sorted(files.items()))
        return [version for versions in found for version in versions]

    def write(self, name: str, file: str, data: bytes) -> None:
        self.storage.write(self.path(name, file), data)

    def delete(self, name: str, file: str) -> None:
        self.storage.delete(self.path(name, file))

    def is_whole(self, name: str, hash: str) -> bool:
        """Return True if both files of a version are there."""
        return all(self.storage.exists(self.path(name, hash + suffix)) for suffix in (RECORD, FILE))

    def path(self, name: str, file: str = "") -> str:
        return f"{PATCHES}/{name}/{file}".rstrip("/")


def _hashes(files: Iterable[str], suffix: str) -> set[str]:
    return {hash for file in files if file.endswith(suffix) and HASH.fullmatch(hash := file.removesuffix(suffix))}


def is_temporary(file: str) -> bool:
    """Return True for a file that `modelpatch.atomic` writes before it renames it."""
    return file.startswith(".") and file.endswith(".tmp")

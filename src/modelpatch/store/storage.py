"""Files under one place: a folder, or a place that `fsspec` reaches (memory, s3, gs, hf).

Only what object stores have as well: a file is written whole or not at all and can be read at once, files are listed by folder
and deleted. No rename, no lock, no append, no "create unless it exists".
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from modelpatch.atomic import sync_folder, write_bytes
from modelpatch.errors import MissingExtraError, ModelpatchError, StoreError
from modelpatch.plain_files import read_plain

Item = TypeVar("Item")
Result = TypeVar("Result")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}  # of this package, and the library each brings
REQUESTS = 32  # at a time, where every file is a request over the network
TRIES = 10
ABANDONED = 3600.0  # seconds after which a file that has to go by then was left by a writer that died


def open_storage(url: str | os.PathLike[str], options: dict[str, Any]) -> "Storage":
    """The place that a folder or URL names, with `fsspec`'s options for it. Nothing is made or read yet.

    Raises `StoreError` for a URL that nothing here can reach, `MissingExtraError` where a library is missing.
    """
    text = os.fspath(url)
    if not text or "::" in text or "\0" in text:
        raise StoreError(f"{text!r} names no store. Expected a folder, or a URL such as s3://bucket/patches.")
    try:
        system, root = url_to_fs(text, **options)
    except (ImportError, ValueError, TypeError) as error:
        scheme = text.partition("://")[0]
        if isinstance(error, ImportError) and scheme in EXTRAS:
            raise MissingExtraError(EXTRAS[scheme], scheme, f"a store at {scheme}://") from error
        raise StoreError(f"{text} cannot be reached: {error}. Expected a folder, or s3://, gs:// or hf://.") from error
    if not isinstance(system, LocalFileSystem):
        return Storage(text, system, root)
    if options:
        raise StoreError(f"the folder {text} takes no storage options; given: {', '.join(sorted(options))}.")
    return Folder(str(Path(root)), system, root)


class Storage:
    """Files by paths such as `patches/flowers/latest.tag`, in a place that `fsspec` reaches; one request writes a file.

    Failures raise `StoreError` with the place and the reason. Paths are made of checked names.
    """

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self.system, self.root = url, system, root.rstrip("/")

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises `FileNotFoundError` where there is none."""
        with self._errors("read", path):
            return bytes(self.system.cat_file(self._place(path)))

    def write(self, path: str, data: bytes) -> None:
        """Put a file there, whole or not at all, in the place of any other."""
        with self._errors("write", path):
            self.system.pipe_file(self._place(path), data)

    def delete(self, path: str) -> None:
        """Delete a file; nothing happens where there is none."""
        with self._errors("delete", path), suppress(FileNotFoundError):
            self.system.rm_file(self._place(path))

    def is_there(self) -> bool:
        """Return True if the place is there: a folder, even an empty one; in an object store any file below the prefix."""
        with self._errors("find", ""):
            self.system.invalidate_cache()
            return bool(self.system.isdir(self.root))

    def names(self, folder: str) -> set[str]:
        """The names of the files and folders in a folder; none where there is no such folder."""
        with self._errors("list", folder), suppress(FileNotFoundError):
            found = self._list(lambda: self.system.ls(self._place(folder), detail=False))
            return {name for path in found if (name := path.rstrip("/").rpartition("/")[2])}
        return set()

    def walk(self, folder: str) -> list[str]:
        """The paths of all files below a folder."""
        place = self._place(folder)
        with self._errors("list", folder):
            return [f"{folder}/{path[len(place) + 1 :]}" for path in self._list(lambda: self.system.find(place))]

    def age(self, path: str) -> float:
        """Seconds since the file was written; 0 where that is not known, and where there is no such file."""
        with self._errors("look at", path):
            try:
                written = self.system.modified(self._place(path))
            except (FileNotFoundError, NotImplementedError):
                return 0.0
        aware = written if written.tzinfo else written.replace(tzinfo=UTC)
        return max(0.0, (datetime.now(UTC) - aware).total_seconds())

    def sweep(self, paths: Iterable[str]) -> None:
        """Delete those of the files that are old, as their writers died."""
        self.map(self.delete, [path for path in paths if self.age(path) > ABANDONED])

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of `function` in the order of the items, several at a time where files are requests."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(function, items))

    def _list(self, listing: Callable[[], Iterable[str]]) -> list[str]:
        self.system.invalidate_cache()  # listings are kept by some systems, and others write too
        for _ in range(TRIES):
            with suppress(RuntimeError, KeyError):  # a dictionary in memory that another thread changes meanwhile
                return list(listing())
        return list(listing())

    def _place(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _errors(self, action: str, path: str) -> Iterator[None]:
        """Turn the errors of a file system into a `StoreError`, but for files that are not there."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except ModelpatchError as error:
            raise StoreError(str(error)) from error
        except Exception as error:
            said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
            where = f"{self.url.rstrip('/')}/{path}".rstrip("/")
            raise StoreError(f"cannot {action} {where}: {said.splitlines()[0][:300]}") from error


class Folder(Storage):
    """A folder of this machine. Writes are durable; links inside it may not lead out of it."""

    def read(self, path: str) -> bytes:
        with self._errors("read", path):
            return read_plain(self._place(path))

    def write(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            self._place(os.path.dirname(path))  # of a link in the file's own place the link is replaced
            place = Path(self.url, path)
            self._make(place.parent)
            write_bytes(place, data)

    def delete(self, path: str) -> None:
        with self._errors("delete", path):
            self._place(os.path.dirname(path))
            Path(self.url, path).unlink(missing_ok=True)

    def names(self, folder: str) -> set[str]:
        with self._errors("list", folder), suppress(FileNotFoundError):
            return set(os.listdir(self._place(folder)))
        return set()

    def walk(self, folder: str) -> list[str]:
        found, whole = [], self._place("")
        for parent, _, files in os.walk(self._place(folder)):
            relative = os.path.relpath(parent, whole).replace(os.sep, "/")
            found += [f"{relative}/{file}" for file in files]
        return found

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return [function(item) for item in items]

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():  # each step survives a power cut
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)

    def _place(self, path: str) -> str:
        """The real path. Raises `StoreError` where a link leads out of the folder."""
        place, root = Path(self.url, path), os.path.realpath(self.url)
        real = os.path.realpath(place)
        if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
            raise StoreError(f"{place} leads out of the store, to {real}. Remove that link.")
        return real

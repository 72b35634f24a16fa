"""Files under one place: a folder, or a place that `fsspec` reaches (memory, s3, gs, hf).

Only four things are asked of a place, and object stores give them as well as folders do: a file is written whole or not at
all, a file that was written is read at once, files are listed by folder, and files are deleted. No rename, no lock, no
append, no "create unless it exists".
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from modelpatch.atomic import sync_folder, write_bytes
from modelpatch.errors import MissingExtraError, ModelpatchError, StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}  # of this package, and the library each brings
REQUESTS = 32  # at a time, where every file is a request over the network
TRIES = 10


class Storage(ABC):
    """Files by paths such as `patches/flowers/latest.tag`. Failures raise `StoreError` with the place and the reason.

    Paths are made of checked names; an implementation still refuses what would lead out of the place.
    """

    url: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises `FileNotFoundError` where there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Put a file there, whole or not at all, in the place of any other."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file; nothing happens where there is none."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Return True if there is such a file."""

    @abstractmethod
    def is_there(self) -> bool:
        """Return True if the place is there: a folder, even an empty one; in an object store any file below the prefix."""

    @abstractmethod
    def names(self, folder: str) -> set[str]:
        """The names of the files and folders in a folder; none where there is no such folder."""

    @abstractmethod
    def walk(self, folder: str) -> list[str]:
        """The paths of all files below a folder."""

    @abstractmethod
    def age(self, path: str) -> float:
        """Seconds since the file was written; 0 where that is not known, and where there is no such file."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of `function` in the order of the items."""
        return [function(item) for item in items]


def open_storage(url: str | os.PathLike[str], options: dict[str, Any]) -> Storage:
    """The place that a folder or URL names, with `fsspec`'s options for it. Nothing is made or read yet.

    Raises `StoreError` for a URL that nothing here can reach, `MissingExtraError` where a library is missing.
    """
    text = os.fspath(url)
    scheme = text.partition("://")[0] if "://" in text else ""
    if not text or "::" in text or "\0" in text:
        raise StoreError(f"{text!r} names no store. Expected a folder, or a URL such as s3://bucket/patches.")
    try:
        system, root = url_to_fs(text, **options)
    except ImportError as error:
        if scheme in EXTRAS:
            raise MissingExtraError(EXTRAS[scheme], scheme, f"a store at {scheme}://") from error
        raise StoreError(f"{text} cannot be reached: {error}.") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"{text} cannot be reached: {error}. Expected a folder, or s3://, gs:// or hf://.") from error
    if isinstance(system, LocalFileSystem):
        if options:
            raise StoreError(f"the folder {text} takes no storage options; given: {', '.join(sorted(options))}.")
        return Folder(Path(root))
    return Objects(text, system, root)


class Folder(Storage):
    """A folder of this machine. Writes are durable; links inside it may not lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, path: str) -> bytes:
        with self._errors("read", path):
            return self._inside(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        place = self.root / path
        with self._errors("write", path):
            self._inside(os.path.dirname(path))  # of a link in the file's own place the link is replaced
            self._make(place.parent)
            try:
                write_bytes(place, data)
            except ModelpatchError as error:
                raise StoreError(str(error)) from error

    def delete(self, path: str) -> None:
        with self._errors("delete", path):
            self._inside(os.path.dirname(path))
            (self.root / path).unlink(missing_ok=True)

    def exists(self, path: str) -> bool:
        return self._inside(path).is_file()

    def is_there(self) -> bool:
        with self._errors("find", ""):
            return self.root.is_dir()

    def names(self, folder: str) -> set[str]:
        with self._errors("list", folder):
            try:
                return set(os.listdir(self._inside(folder)))
            except FileNotFoundError:
                return set()

    def walk(self, folder: str) -> list[str]:
        top = self._inside(folder)
        found = []
        for parent, _, files in os.walk(top):
            relative = os.path.relpath(parent, self._inside("")).replace(os.sep, "/")
            found += [f"{relative}/{file}" for file in files]
        return found

    def age(self, path: str) -> float:
        try:
            return max(0.0, time.time() - self._inside(path).stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def _make(self, folder: Path) -> None:
        """Make a folder that survives a power cut."""
        if not folder.is_dir():
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)

    def _inside(self, path: str) -> Path:
        """The real path. Raises `StoreError` where a link leads out of the folder."""
        real, root = os.path.realpath(self.root / path), os.path.realpath(self.root)
        if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
            raise StoreError(f"{self.root / path} leads out of the store, to {real}. Remove that link.")
        return Path(real)

    def _errors(self, action: str, path: str) -> AbstractContextManager[None]:
        return _errors(action, str(self.root / path))


class Objects(Storage):
    """A place that `fsspec` reaches, each of whose files is written by one request."""

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self.system, self.root = url, system, root.rstrip("/")

    def read(self, path: str) -> bytes:
        with self._errors("read", path):
            return bytes(self.system.cat_file(self._place(path)))

    def write(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            self.system.pipe_file(self._place(path), data)

    def delete(self, path: str) -> None:
        with self._errors("delete", path):
            try:
                self.system.rm_file(self._place(path))
            except FileNotFoundError:
                return

    def exists(self, path: str) -> bool:
        with self._errors("find", path):
            self.system.invalidate_cache()
            return bool(self.system.isfile(self._place(path)))

    def is_there(self) -> bool:
        with self._errors("find", ""):
            self.system.invalidate_cache()
            return bool(self.system.exists(self.root))

    def names(self, folder: str) -> set[str]:
        with self._errors("list", folder):
            self.system.invalidate_cache()  # listings are kept by some systems, and others write too
            try:
                found = self._steadily(lambda: self.system.ls(self._place(folder), detail=False))
            except FileNotFoundError:
                return set()
        return {name for path in found if (name := path.rstrip("/").rpartition("/")[2])}

    @staticmethod
    def _steadily(listing: Callable[[], list[str]]) -> list[str]:
        """A listing, made again where it goes through a dictionary in memory that another thread changes meanwhile."""
        for _ in range(TRIES):
            try:
                return listing()
            except (RuntimeError, KeyError):
                continue
        return listing()

    def walk(self, folder: str) -> list[str]:
        with self._errors("list", folder):
            self.system.invalidate_cache()
            found = self._steadily(lambda: self.system.find(self._place(folder)))
        start = len(self._place(folder)) + 1
        return [f"{folder}/{path[start:]}" for path in found]

    def age(self, path: str) -> float:
        with self._errors("look at", path):
            try:
                written = self.system.modified(self._place(path))
            except (FileNotFoundError, NotImplementedError):
                return 0.0
        aware = written if written.tzinfo else written.replace(tzinfo=UTC)
        return max(0.0, (datetime.now(UTC) - aware).total_seconds())

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        items = list(items)
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(REQUESTS, len(items))) as pool:
            return list(pool.map(function, items))

    def _place(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _errors(self, action: str, path: str) -> AbstractContextManager[None]:
        return _errors(action, f"{self.url.rstrip('/')}/{path}")


@contextmanager
def _errors(action: str, path: str) -> Iterator[None]:
    """Turn the errors of a file system into a `StoreError`, but for files that are not there."""
    try:
        yield
    except (FileNotFoundError, ModelpatchError):
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise StoreError(f"cannot {action} {path}: {said.splitlines()[0][:300]}") from error

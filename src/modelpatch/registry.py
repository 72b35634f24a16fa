"""Registries: implementations by name, from the package's own files and from other distributions.

    HEADS = Registry[type[Head]]("head", "modelpatch.heads")

    @HEADS.register("linear")
    class LinearHead(Head): ...

A folder of the package is a catalogue: the name `faster-rcnn` is looked for in its file `faster_rcnn.py`, which is imported
when the name is first asked for. Other distributions list theirs as entry points of the group `modelpatch.heads`:

    [project.entry-points."modelpatch.heads"]
    attentive = "their_package.heads:AttentiveHead"
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from modelpatch.errors import ModelpatchError

T = TypeVar("T")
Registered = TypeVar("Registered", bound=Any)


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to implementations that loads the file or entry point of a name when it is asked for.

    `thing` is the word for an implementation in messages, `group` the group of entry points and, unless `folder` names
    another, the folder whose files register some, `error` the class of what `find` raises. `files` lists the modules of names
    that do not have the file's own name; without a folder, `folder=False`, they are the only ones.
    """

    def __init__(
        self,
        thing: str,
        group: str,
        *,
        error: type[ModelpatchError] = ModelpatchError,
        files: Mapping[str, str] | None = None,
        folder: str | bool = True,
    ) -> None:
        self.thing, self.group, self.error = thing, group, error
        self._files, self._folder = dict(files or {}), group if folder is True else folder
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Register the decorated class or function under `name`.

        Raises ValueError for a name that another object has.
        """

        def add(item: Registered) -> Registered:
            known = self._registered.get(name)
            if known is not None and _origin(known) != _origin(item):
                raise ValueError(f"the {self.thing} {name!r} is registered already, by {_origin(known)}")
            self._registered[name] = item
            return item

        return add

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """A context at whose end the registry forgets the names that were registered in it, as tests and notebooks need."""
        self.names()  # the package's own files stay registered
        before = dict(self._registered)
        try:
            yield
        finally:
            self._registered = before

    def find(self, name: object) -> T:
        """The implementation of that name.

        Raises `error` with the nearest name and the list of known ones for an unknown name, and for an entry point that
        cannot be imported.
        """
        if isinstance(name, str):
            if name not in self._registered:
                self._load(name)
            if name in self._registered:
                return self._registered[name]
        raise self.unknown(name)

    def unknown(self, name: object) -> ModelpatchError:
        """The error for a name that is not registered, to be raised."""
        known = self.names()
        close = difflib.get_close_matches(str(name), known, 1, 0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return self.error(f"there is no {self.thing} {str(name)[:80]!r}.{hint} Known: {', '.join(known) or 'none'}.")

    def names(self) -> tuple[str, ...]:
        """Every name in alphabetical order. Imports the folder's files, and no entry point."""
        for file in self._own_files():
            importlib.import_module(file)
        return tuple(sorted({*self._registered, *self._files, *self._entry_points}))

    def __getitem__(self, name: str) -> T:
        try:
            return self.find(name)
        except self.error as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _load(self, name: str) -> None:
        """Import the module that may register `name`: a file of that name, one that is listed for it, or an entry point."""
        file = self._files.get(name) or f"{self._folder}.{name.replace('-', '_')}"
        if file in self._files.values() or file in self._own_files():
            importlib.import_module(file)
        if name not in self._registered and name in self._entry_points:
            entry = self._entry_points[name]
            try:
                item = entry.load()
            except Exception as error:  # whatever the import of another distribution raises
                reason = f"{type(error).__name__}: {error}"
                raise self.error(
                    f"the {self.thing} {name!r} of {entry.value} cannot be imported ({reason})."
                ) from error
            self._registered.setdefault(name, item)
        if name not in self._registered:
            self.names()  # a file may register several names

    def _own_files(self) -> list[str]:
        if not self._folder:
            return []
        spec = importlib.util.find_spec(self._folder)
        places = [] if spec is None else spec.submodule_search_locations
        return [f"{self._folder}.{one.name}" for one in pkgutil.iter_modules(places) if not one.ispkg]

    @cached_property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"

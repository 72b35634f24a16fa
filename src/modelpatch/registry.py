"""Registries: implementations by name, from the package's own files and from other distributions.

    HEADS = Registry[type[Head]]("head", "modelpatch.heads")

    @HEADS.register("linear")
    class LinearHead(Head): ...

A folder of the package is a catalogue: the name `scale-bias` is looked for in its file `scale_bias.py`, or in those that hold
it in quotes, which are imported when the name is first asked for. Other distributions list theirs as entry points of the
group `modelpatch.heads`.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from modelpatch.errors import ModelpatchError
from modelpatch.text import nearest

T = TypeVar("T")
Registered = TypeVar("Registered", bound=Any)


@dataclass(eq=False, repr=False)
class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to implementations that loads the file or entry point of a name when it is asked for.

    `thing` is the word for an implementation in messages, `group` the group of entry points and, unless `folder` names
    another, the folder whose files register some, `error` the class of what `find` raises.
    """

    thing: str
    group: str
    _: KW_ONLY
    error: type[ModelpatchError] = ModelpatchError
    folder: str = ""
    _registered: dict[str, T] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder or self.group

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Register the decorated class or function. Raises ValueError for a name that another object has."""

        def add(item: Registered) -> Registered:
            known = self._registered.get(name)
            if known is not None and _origin(known) != _origin(item):
                raise ValueError(f"the {self.thing} {name!r} is registered already, by {_origin(known)}")
            self._registered[name] = item
            return item

        return add

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
        known = self.names()
        hint = nearest(str(name), known)
        raise self.error(f"there is no {self.thing} {str(name)[:80]!r}.{hint} Known: {', '.join(known) or 'none'}.")

    def names(self) -> tuple[str, ...]:
        """Every name in alphabetical order. Imports the folder's files, and no entry point."""
        for file in self._own_files():
            importlib.import_module(file)
        return tuple(sorted({*self._registered, *self._entry_points}))

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
        """Import what may register `name`: the file of that name, else files that hold it, an entry point, or all files."""
        named = f"{self.folder}.{name.replace('-', '_')}"
        files = self._own_files()
        for file in [named] if named in files else self._own_files(name):
            importlib.import_module(file)
        if name not in self._registered and name in self._entry_points:
            entry = self._entry_points[name]
            try:
                item = entry.load()
            except Exception as error:  # whatever the import of another distribution raises
                given = f"the {self.thing} {name!r} of {entry.value}"
                raise self.error(f"{given} cannot be imported ({type(error).__name__}: {error}).") from error
            self._registered.setdefault(name, item)
        if name not in self._registered:
            self.names()  # a file may register several names

    def _own_files(self, name: str = "") -> list[str]:
        """The modules of the folder, or those whose source holds a name in quotes."""
        spec = importlib.util.find_spec(self.folder)
        places = [] if spec is None else spec.submodule_search_locations
        stems = [one.name for one in pkgutil.iter_modules(places) if not one.ispkg]
        if name:
            held = f'"{name}"'.encode()
            stems = [stem for stem in stems if held in (pkgutil.get_data(self.folder, f"{stem}.py") or b"")]
        return [f"{self.folder}.{stem}" for stem in stems]

    @cached_property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"

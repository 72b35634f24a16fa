"""The interface of data sources and their registry.

A source reads one layout. A new one is a file of this folder or an entry point of the group `modelpatch.data` in another
distribution:

    @register_source("my-layout")
    class MyLayout(DataSource):
        kind = "classification"

        def accepts(self, source): ...   # cheap: is this source in my layout?
        def read(self, source, options): ...   # its images, labels or targets, and class names
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES
from modelpatch.data.sources.documents import read_lines
from modelpatch.data.sources.foreign import tell_foreign
from modelpatch.data.sources.split_names import COLLECTIONS, plain_split_of
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.registry import Registry
from modelpatch.tasks.kind import Target, kind_of

SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
LARGEST_VALUE = 255  # of a mask
CLASS_FILES = ("classes.txt", "labels.txt")


@dataclass(frozen=True)
class Found:
    """The contents of a source: its splits by name, the names of classes, and what was not read.

    `layout` says in a few words what was recognised; where it is empty, that is the first line of the source's description.
    `passed_over` holds names of files, rows or objects, relative to the source, by the reason in plain words, and `notes` what
    was decided or changed; `Remarks` collects both.
    """

    kind: str
    splits: Mapping[str, Split]
    classes: Sequence[str]
    names_from_user: bool = False  # its classes are values of masks, or columns, which the user may name
    passed_over: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    layout: str = ""


@dataclass(frozen=True)
class SourceOptions:
    """The options for reading a source; `classes` become a tuple. Raises `DataError` for values that no source could have."""

    kind: str | None = None
    classes: Sequence[str] | int | None = None
    ignore: int | None = None
    separator: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            kind_of(self.kind)
        if isinstance(self.classes, str):
            raise DataError(f"classes={self.classes!r}; expected a list of names.")
        if isinstance(self.classes, Iterable):
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.ignore is not None and (type(self.ignore) is not int or not 0 <= self.ignore <= LARGEST_VALUE):
            raise DataError(f"ignore={self.ignore!r}; expected a value of masks, 0 to {LARGEST_VALUE}.")
        if self.separator is not None and (not isinstance(self.separator, str) or not self.separator):
            raise DataError(f"separator={self.separator!r}; expected the text between two labels, such as '|'.")
        for name, column in self.columns.items():
            if not isinstance(column, str) or not column:
                raise DataError(f"{name}={column!r}; expected the name of a column.")

    def class_names(self, folder: Path) -> Sequence[str] | None:
        """The class names that were given or that a file of the folder lists, one a line; None where there are none."""
        if isinstance(self.classes, tuple):
            return self.classes
        for file in (folder / name for name in CLASS_FILES):
            if file.is_file():
                return read_lines(file)
        return None

    @property
    def names(self) -> Sequence[str] | None:
        """The class names that were given, None for none."""
        return self.classes if isinstance(self.classes, tuple) else None

    def allow(self, target: type[Target]) -> bool:
        """Return True where no kind was asked for, or one of these targets."""
        return self.kind is None or kind_of(self.kind).target is target

    @property
    def columns(self) -> dict[str, str]:
        """The columns of tables that were named."""
        given = {name: getattr(self, name) for name in ("image_column", "label_column", "split_column")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def meanings(self) -> dict[str, Any]:
        """The options that say what labels and values of masks mean."""
        classes = list(self.classes) if isinstance(self.classes, tuple) else self.classes
        given = {"classes": classes, "ignore": self.ignore, "separator": self.separator}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """The options that were set, for a patch file to record how its data was read."""
        return {**self.meanings, **self.columns}


class DataSource(ABC):
    """A reader of one layout.

    `kind` is the kind of task that it reads, or None for one that depends on the contents. A source with `general=True`
    is asked only where no other one accepts. One with `has_columns=True` reads tables whose columns the user may name.
    """

    kind: ClassVar[str | None] = None
    general: ClassVar[bool] = False
    has_columns: ClassVar[bool] = False

    @abstractmethod
    def accepts(self, source: Any) -> bool:
        """Return True for a source in this layout, without reading more than names and the beginning of files."""

    @abstractmethod
    def read(self, source: Any, options: SourceOptions) -> Found:
        """The contents of the source. Raises `DataError` with the place of what cannot be read."""

    def name_of(self, source: Any) -> str:
        """The name of the task where the user gives none."""
        path = Path(source).resolve()
        return name_place(path) if path.exists() else path.name.rpartition(":")[2]  # hf:NAME


SOURCES = Registry[type[DataSource]](
    "data source", "modelpatch.data", folder="modelpatch.data.sources", error=DataError
)
register_source = SOURCES.register


def name_place(path: Path) -> str:
    """The name of a folder or file, or of the folder above where that name is a split's."""
    name = path.stem if path.is_file() else path.name
    return path.parent.name or name if plain_split_of(name, COLLECTIONS) else name


def read_source(given: Any, options: SourceOptions) -> tuple[Found, str]:
    """The contents of what was given, and its name. Raises `DataError` where no source reads it, or several do."""
    outer, (given, accepting) = given, _find_accepting(given)
    if not accepting:
        told = tell_foreign(given) if isinstance(given, Path) else ""
        expected = "Expected one of these, hf:NAME, bundled:digits, or a Dataset; see docs/data.md."
        raise DataError(
            f"{str(given)[:200]} is neither a folder of images nor a manifest (.csv, .tsv, .json, .jsonl, .parquet). "
            f"{f'Found {told}' if told else expected}"
        )
    unread = f"{given} holds no {options.kind} task in a layout that is read. See docs/data.md for these."
    fitting = [source for source in accepting if None in (options.kind, source.kind) or source.kind == options.kind]
    if not fitting:
        raise DataError(unread)
    chosen = [source for source in fitting if not source.general] or fitting
    if len(chosen) > 1:
        kinds = dict.fromkeys(f"kind={source.kind!r}" for source in chosen)
        layouts = "; ".join(map(describe_source, chosen))
        choice = "Keep one of them" if len(kinds) == 1 else f"Choose {' or '.join(kinds)} (--kind)"
        raise DataError(f"{given} is in more than one layout. {choice}. They are: {layouts}.")
    if options.columns and not chosen[0].has_columns:
        name, column = next(iter(options.columns.items()))
        raise DataError(f"{given} is no table, and has no column {column!r} ({name}). Leave it out.")
    try:
        found = chosen[0].read(given, options)
        check_class_count(found, given)
    except OSError as error:  # a folder that may not be listed
        raise DataError(f"{given}: {error.filename or 'a file'} cannot be read: {error.strerror or error}.") from error
    except DataError as error:
        told = tell_foreign(given) if chosen[0].general and isinstance(given, Path) else ""
        if told and told not in str(error):
            raise DataError(f"{error} Found {told}") from error
        raise
    if options.kind not in (None, found.kind):
        raise DataError(unread)
    if options.meanings and not found.names_from_user:
        raise DataError(
            f"{given} names its classes itself; classes and ignore are for the values of masks, classes and separator for "
            "columns of several labels or numbers."
        )
    return replace(found, layout=found.layout or describe_source(chosen[0])), chosen[0].name_of(outer)


def check_class_count(found: Found, source: object) -> None:
    """Raise `DataError` for fewer classes than a task of its kind needs."""
    if len(found.classes) < (least := kind_of(found.kind).fewest_classes):
        raise DataError(f"{source} has {len(found.classes)} class; a {found.kind} task needs at least {least}.")


def takes_columns(given: str | Path) -> bool:
    """Return True for a source that is read from tables, whose columns can be named."""
    path = Path(given).expanduser()
    return any(source.has_columns for source in _find_accepting(path if path.exists() else given)[1])


def _find_accepting(given: Any) -> tuple[Any, list[DataSource]]:
    """The given place, or the folder in it in which the data was unpacked, and the sources in whose layout that is."""
    accepting = [source for name in SOURCES.names() if (source := SOURCES.find(name)()).accepts(given)]
    if all(source.general for source in accepting) and (inner := only_folder(given)):
        place, found = _find_accepting(inner)
        if not all(source.general for source in found):
            return place, found
    return given, accepting


def only_folder(given: Any) -> Path | None:
    """The folder inside of one that holds nothing else but texts and the like, as archives unpack."""
    if not isinstance(given, Path) or not given.is_dir():
        return None
    visible = [one for one in given.iterdir() if not one.name.startswith((".", "__"))]
    folders = [one for one in visible if one.is_dir()]
    pictures = any(one.suffix.lower() in IMAGE_SUFFIXES for one in visible)
    return folders[0] if len(folders) == 1 and not pictures else None


def describe_source(source: DataSource) -> str:
    """The first line of a source's description without its article and full stop, or the name of its class."""
    first = ((type(source).__doc__ or "").strip() or type(source).__name__).splitlines()[0]
    return first.removeprefix("A ").removeprefix("The ").rstrip(".")


def find_file(places: Sequence[Path], missing: str) -> Path:
    """The first of the files that exists. Raises `DataError` with what is missing where none does."""
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise DataError(f"{missing}. Expected one in: {', '.join(dict.fromkeys(str(place.parent) for place in places))}.")

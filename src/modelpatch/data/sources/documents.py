"""Annotation documents that others wrote: JSON, XML, YAML and lists, read with errors that name the file and the place."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

from modelpatch.errors import DataError

LARGEST_YAML = 2**20  # bytes
SHOWN = 80  # characters of a wrong value
Key = int | str


class Fields:
    """The fields of an object in a document. What is missing or of another type is a `DataError` that names the place."""

    __slots__ = ("file", "place", "values")

    def __init__(self, values: Any, file: Path, *place: Key) -> None:
        self.values, self.file, self.place = values, file, place
        if not isinstance(values, Mapping):
            self.fail(f"it is {shown(values)}; expected an object with fields")

    def fail(self, problem: str) -> NoReturn:
        """Raise a `DataError` with the file and the place."""
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.place).removeprefix(".")
        raise DataError(f"{self.file}{f', {steps}' if steps else ''}: {problem}.")

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def value(self, name: str) -> Any:
        """The value of a field that must be there."""
        found = self.values.get(name)
        if found is None:
            self.fail(f"it has no {name!r}; it has {', '.join(map(str, self.values))[:SHOWN] or 'no fields'}")
        return found

    def text(self, name: str) -> str:
        """A text that is not empty; numbers count as texts."""
        found = self.value(name)
        if isinstance(found, bool) or not isinstance(found, str | int | float) or not str(found).strip():
            self.fail(f"{name} is {shown(found)}; expected a text")
        return str(found).strip()

    def key(self, name: str) -> Key:
        """A whole number from 0 on, or a text, that identifies something."""
        found = self.value(name)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, Key) or (isinstance(found, int) and found < 0):
            self.fail(f"{name} is {shown(found)}; expected a whole number from 0 on")
        return found

    def number(self, name: str) -> float:
        """A finite number."""
        return self._finite(name, self.value(name))

    def numbers(self, name: str, count: int | None = None) -> list[float]:
        """Finite numbers, `count` of them where it is given."""
        found = self.value(name)
        if not isinstance(found, list) or count not in (None, len(found)):
            self.fail(f"{name} is {shown(found)}; expected {'' if count is None else f'{count} '}numbers")
        return self.numbers_of(name, found)

    def numbers_of(self, name: str, values: Sequence[Any]) -> list[float]:
        """The values as finite numbers; `name` is the field that they are from."""
        return [self._finite(name, one) for one in values]

    def size(self) -> tuple[int, int] | None:
        """The fields `width` and `height`, None where they say nothing."""
        given = [self.values.get(name) for name in ("width", "height")]
        sides = [self._finite(name, one or 0) for name, one in zip(("width", "height"), given, strict=True)]
        return (round(sides[0]), round(sides[1])) if min(sides) >= 1 else None

    def all(self, name: str) -> Iterator["Fields"]:
        """The objects of a list."""
        found = self.value(name)
        if not isinstance(found, list):
            self.fail(f"{name} is {shown(found)}; expected a list")
        for number, one in enumerate(found):
            yield Fields(one, self.file, *self.place, name, number)

    def _finite(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{name} holds {shown(value)}; expected a finite number")
        return number


def shown(value: Any) -> str:
    """A value for messages: short, whatever it is."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes):
        kind = "an object" if isinstance(value, Mapping) else "a list"
        return f"{kind} of {len(value)}" if len(value) > 4 else f"{kind} {str(value)[:SHOWN]}"
    return "nothing" if value is None else f"{str(value)[:SHOWN]!r}"


def read_bytes(file: Path) -> bytes:
    """The bytes of a document."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def read_text(file: Path) -> str:
    """The text of a document: UTF-8, with or without a mark, or UTF-16 with one; else Latin-1, of which any byte is a part."""
    content = read_bytes(file)
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "latin-1"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{file} cannot be read as text. Save it as UTF-8.")


def read_lines(file: Path) -> list[str]:
    """The lines of a text that are not empty, without blanks at their ends."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def read_json(file: Path, form: str) -> Fields:
    """The object that a JSON file holds. `form` names what is expected of it."""
    try:
        return Fields(json.loads(read_text(file)), file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as {form}: {error}.") from error


def read_objects(file: Path, form: str) -> Iterator[Fields]:
    """The objects of the list that a JSON file holds. `form` names what is expected of it."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as {form}: {error}.") from error
    yield from Fields({"list": content}, file).all("list")


def read_yaml(file: Path, form: str) -> Fields:
    """The mapping that a YAML file holds. Aliases are refused, as few lines of them can stand for any amount of memory."""
    import yaml

    text = read_text(file)
    if len(text) > LARGEST_YAML:
        raise DataError(f"{file} cannot be read as {form}: it is longer than {LARGEST_YAML} characters.")
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise DataError(f"{file} cannot be read as {form}: it has aliases (*NAME). Write out what they stand for.")
        return Fields(yaml.safe_load(text), file)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as {form}: {' '.join(str(error).split())}.") from error


def read_xml(file: Path, form: str) -> ElementTree.Element:
    """The root of an XML file. Entities of its own are refused: they can expand without end, or name other files."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(name: str, *_: Any) -> NoReturn:
        raise DataError(
            f"{file} cannot be read as {form}: it defines the entity {name!r}. Write out what it stands for."
        )

    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(read_bytes(file), True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as error:
        raise DataError(f"{file} cannot be read as {form}: {error}.") from error

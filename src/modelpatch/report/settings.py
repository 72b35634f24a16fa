"""Methods and settings as tables: name, type, default."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich.table import Table

from modelpatch.report.tables import new_table


@dataclass(frozen=True)
class SettingRow:
    """A field of a dataclass: its name, the values it takes, and its default."""

    name: str
    values: str
    default: str


def describe_fields(settings: type) -> list[SettingRow]:
    """A row for every field that the constructor of a dataclass takes."""
    hints = get_type_hints(settings, include_extras=True)
    return [
        SettingRow(
            field.name, spell_type(hints[field.name]), "" if field.default is MISSING else spell_value(field.default)
        )
        for field in fields(settings)
        if field.init
    ]


def spell_type(hint: Any) -> str:
    """The values that a type takes, in words: `auto, none or light`, `integer`, `number or none`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return spell_type(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (list, tuple, set, frozenset) or getattr(origin, "__name__", "") == "Sequence":
        inner = dict.fromkeys(spell_type(arg) for arg in args if arg is not Ellipsis)
        return f"list of {' or '.join(inner) or 'values'}"
    if args:
        return " or ".join(dict.fromkeys(spell_type(arg) for arg in args))
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def spell_value(value: Any) -> str:
    """A default as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(spell_value, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def first_line(thing: object) -> str:
    """The first sentence of a docstring, without markup."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=[.:]) ", " ".join(paragraph.split()).replace("`", ""))[0]
    return sentence.rstrip(".:")


def methods_table(lines: Mapping[str, str]) -> Table:
    """One row per method: its name and a line about it."""
    return new_table("methods", texts=("name", "about"), rows=lines.items())


def settings_table(title: str, rows: Sequence[SettingRow]) -> Table:
    """One row per setting: name, default, values."""
    cells = [(row.name, row.default, row.values) for row in rows]
    return new_table(title, texts=("name", "default", "values"), rows=cells)

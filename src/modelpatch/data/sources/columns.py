"""Targets in the columns of a table: one class, several labels or numbers for each row.

    label              cat, dog, cat                classification
    label              cat|dog, dog, cat|bird       multilabel, by what separates labels
    cat, dog, bird     1, 0, -1                     multilabel, one column a label; -1 and blank: unknown
    age, height        31.5, 1.82                   regression, where it is asked for

What could be read in two ways is not guessed: the error names the options that decide.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.samples import order_name
from modelpatch.data.sources import base
from modelpatch.data.splits import Split
from modelpatch.errors import DataError, warn_caller
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.multilabel import UNKNOWN, Multilabel
from modelpatch.tasks.regression import Regression
from modelpatch.tasks.vector import Vector

USUAL, UNUSUAL = ("|", ";", ","), ("/", "+", "&")  # separators of labels; the unusual ones only where they are named
FLAGS = {
    "1": 1.0,
    "0": 0.0,
    "true": 1.0,
    "false": 0.0,
    "yes": 1.0,
    "no": 0.0,
    "-1": math.nan,
    "": math.nan,
    "?": math.nan,
}
BLANK = ("", "nan", "na", "n/a", "null")
OTHERS = {"", "id", "idx", "index", "unnamed: 0", "split", "fold", "subset"}
SIZES = {"width", "height"}  # of the image, where both are columns
MANY = 20  # different whole numbers, from which they may be a number and not classes
CLASSES, LABELS, NUMBERS = (f"--kind {kind.name}" for kind in (Classification, Multilabel, Regression))


@dataclass(frozen=True)
class Table:
    """The columns of a table that may hold targets, of all its splits one after another.

    `label` is the one that names classes, if there is one; `place` names a row for messages.
    """

    source: str
    cells: Mapping[str, Sequence[Any]]
    label: str | None
    place: Callable[[int], str]

    @property
    def others(self) -> list[str]:
        """The columns but the label's and those that never hold targets."""
        lower = {name: name.strip().lower() for name in self.cells}
        never = OTHERS | SIZES if set(lower.values()) >= SIZES else OTHERS
        return [name for name in self.cells if name != self.label and lower[name] not in never]


@dataclass(frozen=True)
class Targets:
    """A row of `values` (N, K) for each row of a table, NaN where unknown."""

    kind: str
    classes: tuple[str, ...]
    values: np.ndarray


def find_targets(table: Table, options: base.SourceOptions) -> Targets | list[str] | None:
    """The targets of all rows: vectors, or names of classes; None where the column of labels names a class a row.

    Raises `DataError` that names the options which decide, for a table that could be read in two ways.
    """
    kind = Multilabel.name if options.kind is None and options.separator is not None else options.kind
    if options.separator is not None and kind != Multilabel.name:
        raise DataError(f"a separator of labels is for {LABELS}, not for --kind {kind}. Leave it out.")
    readers = {Regression.name: read_numbers, Multilabel.name: read_labels, Classification.name: read_one_hot}
    return readers[kind](table, options) if kind in readers else _decide(table, options) if kind is None else None


def make_vectors(found: Targets, rows: Sequence[tuple[str, ImageSource]]) -> base.Found:
    """The task of rows, each a split and an image, with a vector for each."""
    by_split: dict[str, list[int]] = {}
    for number, (split, _) in enumerate(rows):
        by_split.setdefault(split, []).append(number)
    splits = {}
    for split, numbers in by_split.items():
        targets = [Vector(found.values[number]) for number in numbers]
        strata = np.array(kind_of(found.kind).list_strata(targets), dtype=np.int64)
        splits[split] = Split([rows[number][1] for number in numbers], strata, targets)
    return base.Found(found.kind, splits, found.classes, names_from_user=True)


# deciding ----------------------------------------------------------------------------------------------------


def _decide(table: Table, options: base.SourceOptions) -> Targets | list[str] | None:
    """Targets as the cells say by themselves. Raises `DataError` where they could mean two things."""
    if table.label is None:
        flags = [name for name in table.others if _holds_flags(table.cells[name])]
        if len(flags) > 1:
            found = _read_flags(table, flags)
            if (found.values.sum(1) == 1).all():
                raise DataError(
                    f"{table.source}: exactly one of the columns {_some(flags)} is 1 in every row. Say whether they are "
                    f"classes ({CLASSES}) or labels of which an image may have several ({LABELS})."
                )
            return found
        if numbers := [name for name in table.others if _holds_numbers(table.cells[name])]:
            raise DataError(
                f"{table.source} has no column of labels; {_some(numbers)} may be numbers to predict. Say so: {NUMBERS} "
                f"--classes {numbers[0]}."
            )
        return None
    cells = table.cells[table.label]
    if any(_is_list(cell) for cell in cells):
        return read_labels(table, options)
    texts = [text for cell in cells if (text := _text(cell)).lower() not in BLANK]
    if texts and all(_number(text) is not None for text in texts):
        _check_numbers(table, cells, texts)
        return None
    return read_labels(table, options) if _is_separated(table, texts) else None


def _check_numbers(table: Table, cells: Sequence[Any], texts: Sequence[str]) -> None:
    """Raise `DataError` for numbers that may be meant as numbers, not as classes."""
    values = {float(text) for text in texts}
    whole = all(value.is_integer() for value in values)
    decimal = any(isinstance(cell, float) for cell in cells) or any("." in text for text in texts)
    plain = whole and (not decimal or len(texts) < len(cells))  # pandas writes 1.0 where a column lacks a cell
    said = f"{table.source}: the column {table.label!r} holds {len(values)} different numbers in {len(texts)} rows"
    advice = f"Say whether they are numbers to predict ({NUMBERS}) or names of classes ({CLASSES})."
    gaps = len(values) > MANY and max(values) - min(values) >= len(values)
    if not plain or gaps or (len(values) > MANY and 2 * len(values) > len(texts)):
        raise DataError(f"{said}, such as {', '.join(texts[:3])}. {advice}")
    if len(values) > MANY:
        warn_caller(f"{said}, which are read as classes. {NUMBERS} reads them as numbers to predict.")


def _find_separators(cells: Sequence[str]) -> list[tuple[str, bool, str]]:
    """Texts that may separate labels: each with an example, and True where no other reading makes sense.

    Between labels, parts of one cell recur in others.
    """
    found, texts = [], set(cells)
    for separator in (*USUAL, *UNUSUAL):
        joined = [text for text in texts if separator in text]
        holders: dict[str, set[str]] = {}
        for text in texts:
            for part in _parts(text, separator):
                holders.setdefault(part, set()).add(text)
        again = [[len(holders[part]) > 1 for part in _parts(text, separator)] for text in joined]
        recurs = any(map(any, again))
        if joined and (recurs or separator in USUAL[:2]):
            sure = recurs if separator in USUAL[:2] else separator in USUAL and all(map(all, again))
            found.append((separator, sure, min(joined)))
    return found


def _may_be_words(texts: Sequence[str]) -> str | None:
    """A label that may be several ones with spaces between them: fewer words than labels make these, in different numbers."""
    labels = sorted(set(texts))
    parts = [_parts(label, " ") for label in labels]
    words, lengths = {word for own in parts for word in own}, {len(own) for own in parts}
    alone = {own[0] for own in parts if len(own) == 1} & {word for own in parts if len(own) > 1 for word in own}
    if len(lengths) < 2 or len(words) >= len(labels) or not (alone or 2 * len(words) <= len(labels)):
        return None
    return next(label for label, own in zip(labels, parts, strict=True) if len(own) > 1)


def _is_separated(table: Table, texts: Sequence[str]) -> bool:
    """Return True where cells hold several labels; raise `DataError` where they may or may not."""
    found = _find_separators(texts)
    if not found and (example := _may_be_words(texts)):
        found = [(" ", False, example)]
    if not found:
        return False
    (separator, sure, example), *more = found
    if more or not sure:
        others = f" or {more[0][0]!r}" if more else ""
        raise DataError(
            f"{table.source}: the label {example!r} is one class, or several labels with {separator!r}{others} between them. "
            f"Say which: {CLASSES}, or {LABELS} --separator '{separator}'."
        )
    warn_caller(
        f"{table.source}: labels such as {example!r} are read as several labels of an image, with {separator!r} between them. "
        f"{CLASSES} keeps them whole."
    )
    return True


# several labels ----------------------------------------------------------------------------------------------


def read_labels(table: Table, options: base.SourceOptions) -> Targets:
    """Several labels a row: lists, cells with a separator, or one column of 1 and 0 for each label."""
    flags = [name for name in table.others if _holds_flags(table.cells[name])]
    named = options.classes if isinstance(options.classes, tuple) else None
    if named is not None and all(name in table.cells for name in named):
        for name in named:
            for number, cell in enumerate(table.cells[name]):
                if _flag(cell) is None:
                    raise DataError(
                        f"{table.place(number)}: {name} is {str(cell)[:80]!r}; expected 1, 0, -1 or nothing."
                    )
        return _read_flags(table, named)
    if table.label is None:
        if not flags:
            raise DataError(f"{table.source} has neither a column of labels nor columns of 1 and 0, one a label.")
        if others := [name for name in table.others if name not in flags]:
            warn_caller(f"{table.source}: the columns {_some(others)} hold more than 1, 0 and -1 and are no labels.")
        return _read_flags(table, flags)
    cells = table.cells[table.label]
    separator = _find_separator(table, cells, options)
    if separator is None and len(flags) > 1 and not any(map(_is_list, cells)):
        raise DataError(
            f"{table.source}: labels may be those of the column {table.label!r}, or the columns {_some(flags)}. Name columns "
            "of 1 and 0 with --classes, or the separator of labels with --separator."
        )
    rows = [_read_cell(cell, separator) for cell in cells]
    if unknown := [number for number, row in enumerate(rows) if row is None]:
        warn_caller(
            f"{table.place(unknown[0])}: it has no label. In {len(unknown)} rows nothing is known about any label; write [] "
            "where an image has none."
        )
    found = sorted({label for row in rows if row is not None for label in row}, key=order_name)
    if not found:
        raise DataError(f"{table.source} has no label in any row of the column {table.label!r}.")
    classes = tuple(found if named is None else named)
    if foreign := [label for label in found if label not in classes]:
        raise DataError(f"{table.source} has the label {foreign[0]!r}, which is none of the classes that were given.")
    index = {name: number for number, name in enumerate(classes)}
    values = np.zeros((len(rows), len(classes)))
    for number, row in enumerate(rows):
        if row is None:
            values[number] = math.nan
        else:
            values[number, [index[label] for label in row]] = 1
    return Targets(Multilabel.name, classes, values)


def _find_separator(table: Table, cells: Sequence[Any], options: base.SourceOptions) -> str | None:
    """The separator that was given, or the one usual one that occurs."""
    texts = [_text(cell) for cell in cells if not _is_list(cell)]
    if options.separator is not None:
        if not any(options.separator in text for text in texts):
            raise DataError(f"{table.source}: no label holds the separator {options.separator!r}. Leave it out.")
        return options.separator
    found = [separator for separator in USUAL if any(separator in text for text in texts)]
    if len(found) > 1:  # all but one may belong to names
        found = [separator for separator, sure, _ in _find_separators(list(filter(None, texts))) if sure] or found
    if len(found) > 1:
        raise DataError(
            f"{table.source}: labels hold {' and '.join(map(repr, found))}. Name one: --separator '{found[0]}'."
        )
    return found[0] if found else None


def _read_cell(cell: Any, separator: str | None) -> list[str] | None:
    """The labels of a cell, None where nothing is known."""
    if _is_list(cell):
        items = ast.literal_eval(cell) if isinstance(cell, str) else cell
        return [text for item in items if (text := _text(item))]
    text = _text(cell)
    if text.lower() in BLANK or text == str(UNKNOWN):
        return None
    return _parts(text, separator) if separator is not None else [text]


def _read_flags(table: Table, names: Sequence[str]) -> Targets:
    columns = [[_flag(cell) for cell in table.cells[name]] for name in names]
    return Targets(Multilabel.name, tuple(names), np.array(columns, dtype=np.float64).T)


# classes and numbers -----------------------------------------------------------------------------------------


def read_one_hot(table: Table, options: base.SourceOptions) -> list[str] | None:
    """The name of the one column that is 1 in each row; None where there is a column of labels, or none of flags."""
    flags = [name for name in table.others if _holds_flags(table.cells[name])]
    if table.label is not None or len(flags) < 2:
        return None
    values = np.nan_to_num(_read_flags(table, flags).values)
    if len(wrong := np.flatnonzero(values.sum(1) != 1)):
        count = int(values[wrong[0]].sum())
        raise DataError(
            f"{table.place(int(wrong[0]))}: {count} of the columns {_some(flags)} are 1; expected one class."
        )
    return [flags[index] for index in values.argmax(1)]


def read_numbers(table: Table, options: base.SourceOptions) -> Targets:
    """The numbers of the columns that `classes` name, else of the column of labels, else of all columns of numbers."""
    named = options.classes if isinstance(options.classes, tuple) else None
    if named is not None and (missing := [name for name in named if name not in table.cells]):
        raise DataError(f"{table.source} has no column {missing[0]!r}; it has: {_some(list(table.cells), 20)}.")
    names = named or ((table.label,) if table.label is not None else ())
    if not names:
        names = tuple(name for name in table.others if _holds_numbers(table.cells[name]))
        if not names:
            raise DataError(f"{table.source} has no column of numbers. Name some: --classes COLUMN,COLUMN.")
        if len(names) > 1:
            warn_caller(
                f"{table.source}: the columns {_some(names, 10)} are the numbers to predict. --classes names others."
            )
    values = np.zeros((len(table.cells[names[0]]), len(names)))
    for column, name in enumerate(names):
        for number, cell in enumerate(table.cells[name]):
            text = _text(cell)
            value = math.nan if text.lower() in BLANK else _number(text)
            if value is None:
                raise DataError(
                    f"{table.place(number)}: {name} is {text[:80]!r}; expected a finite number, or nothing."
                )
            values[number, column] = value
    return Targets(Regression.name, tuple(names), values)


# cells -------------------------------------------------------------------------------------------------------


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _flag(cell: Any) -> float | None:
    """1, 0 or NaN (unknown), None for other cells."""
    text = _text(cell).lower()
    number = _number(text)
    text = str(int(number)) if number is not None and number.is_integer() else text
    return FLAGS.get("" if text in BLANK else text)


def _holds_flags(cells: Sequence[Any]) -> bool:
    found = [_flag(cell) for cell in cells]
    return None not in found and 1.0 in found


def _holds_numbers(cells: Sequence[Any]) -> bool:
    texts = [text for cell in cells if (text := _text(cell)).lower() not in BLANK]
    return bool(texts) and all(_number(text) is not None for text in texts)


def _is_list(cell: Any) -> bool:
    """Return True for a list, or the text of one: `['cat', 'dog']`."""
    if isinstance(cell, list | tuple | np.ndarray):
        return True
    if not isinstance(cell, str) or not (cell.strip().startswith("[") and cell.strip().endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(cell.strip()), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _parts(text: str, separator: str) -> list[str]:
    return [part for one in text.split(separator) if (part := one.strip())]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Tables in files: CSV with any separator and encoding, lists of paths, JSON, JSON lines, Parquet, Arrow."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources.labels import name_at
from modelpatch.data.splits import Lazy
from modelpatch.errors import DataError

SEPARATORS = (",", ";", "\t", "|")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LOOKED_AT = 50  # lines that tell the separator
PEEKED = 2**16  # bytes that tell the columns
LISTED_PICTURE = re.compile(r"\s*(.*\S)[ \t]+(\S+)\s*$")  # `path label`, as lists of pictures have it
COMMENTS = re.compile(r"\A(?:\s*#[^\n,;\t|]*\n)+")  # sentences above a table
WRAPPED = ("data", "rows", "samples", "items", "records", "images", "annotations")  # keys of JSON that hold the rows
LARGEST_CELL = 2**24


@dataclass
class TableFile:
    """A table as a file holds it: its columns, the cells of each, and notes of how it was read."""

    path: Path
    cells: Mapping[str, Sequence[Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.cells)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()), ()))

    def place(self, row: int) -> str:
        """The name of a row for messages, counted from 1."""
        return f"{self.path}, row {row + 1}"


def read_table(path: Path) -> TableFile:
    """The table in a file. Raises `DataError` that names the file for what is none."""
    try:
        return READERS[path.suffix.lower()](path)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a manifest: {str(error)[:300] or type(error).__name__}") from error


def peek_columns(path: Path) -> list[str]:
    """The columns of a table from the beginning of its file; empty where they cannot be told from it."""
    return list(peek_cells(path))


def peek_cells(path: Path) -> Mapping[str, Sequence[Any]]:
    """The columns of a table with the cells of its first rows, or with none where rows cannot be told from its beginning."""
    try:
        if path.suffix.lower() in ARROW:
            return dict.fromkeys(_arrow_schema(path), ())
        with path.open("rb") as stream:
            content = stream.read(PEEKED)
        whole = len(content) < PEEKED
        text, _ = decode(content, whole)
        if path.suffix.lower() == ".json":
            keys = [] if whole else re.findall(r'"([^"]{1,40})"\s*:', text)
            return _of_json(path, json.loads(text)).cells if whole else dict.fromkeys(keys, ())
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            first = json.loads(next(line for line in text.splitlines() if line.strip()))
            return {str(key): [value] for key, value in first.items()} if isinstance(first, dict) else {}
        lines = text.splitlines()
        return _of_lines(path, "\n".join(lines if whole else lines[:-1]), []).cells
    except (DataError, OSError, ValueError, TypeError, LookupError, RecursionError, StopIteration, csv.Error):
        return {}


# text --------------------------------------------------------------------------------------------------------


def decode(content: bytes, whole: bool = True) -> tuple[str, str]:
    """The text of a file and its encoding: that of its mark, UTF-8, UTF-16 without a mark, else Windows' Latin letters."""
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return codecs.getincrementaldecoder(encoding)().decode(content, whole), encoding
    for encoding in ("utf-16-le", "utf-16-be"):
        zeros = content[1 if encoding.endswith("le") else 0 : 200 : 2]
        if len(content) > 3 and zeros and zeros.count(0) > 0.9 * len(zeros):
            return codecs.getincrementaldecoder(encoding)().decode(content, whole), encoding
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content, whole), "utf-8"
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace") if b"\x81" not in content else content.decode("latin-1"), "latin-1"


def _read_text(path: Path) -> TableFile:
    text, encoding = decode(path.read_bytes())
    notes = [f"{path.name} is not UTF-8, and is read as Latin letters of Windows"] if encoding == "latin-1" else []
    return _of_lines(path, text, notes)


def _of_lines(path: Path, text: str, notes: list[str]) -> TableFile:
    """The table of separated cells, or of lines `path label`, with or without a line of column names."""
    text = COMMENTS.sub("", text)
    named = re.match(r"\s*sep=(.)\r?\n", text)  # as spreadsheet programs say it
    if named:
        text = text[named.end() :]
    separator = named[1] if named else _find_separator(text)
    csv.field_size_limit(LARGEST_CELL)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(map(str.strip, row))]
    if rows and separator == "," and all(len(row) == 1 for row in rows):
        rows = _split_lists(rows)
    if not rows:
        return TableFile(path, {}, notes)
    header, first = rows[0], 1
    if any(is_picture(cell.strip()) for cell in header):
        header, first = _name_columns(header), 0
        notes = [*notes, f"{path.name} has no line of column names; its columns are read as {', '.join(header)}"]
    header = _tell_apart([cell.strip() or f"unnamed: {number}" for number, cell in enumerate(header)])
    return TableFile(path, _columns_of(path, header, rows[first:]), notes)


def _find_separator(text: str) -> str:
    """The separator that cuts the first lines into the same number of cells, as many as may be."""
    head = "\n".join(text.split("\n", LOOKED_AT)[:LOOKED_AT])
    best, most = ",", (0.0, 1)
    for separator in SEPARATORS:
        try:
            rows = [row for row in csv.reader(io.StringIO(head, newline=""), delimiter=separator) if row]
        except csv.Error:
            continue
        count = len(rows[0]) if rows else 1
        alike = sum(len(row) == count for row in rows) / max(len(rows), 1)
        if count > 1 and (alike, count) > most:
            best, most = separator, (alike, count)
    return best


def _split_lists(rows: list[list[str]]) -> list[list[str]]:
    """Lines `path label` in two cells, where all lines are such and name pictures."""
    found = [LISTED_PICTURE.match(row[0]) for row in rows]
    if all(one is not None and is_picture(one[1]) for one in found):
        return [[one[1], one[2]] for one in found if one is not None]
    return rows


def _name_columns(cells: Sequence[str]) -> list[str]:
    picture = next(number for number, cell in enumerate(cells) if is_picture(cell.strip()))
    rest = (
        ["label"] if len(cells) == 2 else [f"column {number + 1}" for number in range(len(cells)) if number != picture]
    )
    rest.insert(picture, "image")
    return rest


def _tell_apart(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    counted: dict[str, int] = {}
    made = []
    for name in names:
        counted[name] = counted.get(name, 0) + 1
        made.append(f"{name} ({counted[name]})" if seen[name] > 1 and counted[name] > 1 else name)
    return (
        list(dict.fromkeys(made)) if len(set(made)) == len(made) else [f"{name} [{n}]" for n, name in enumerate(made)]
    )


def _columns_of(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, list[str | None]]:
    for number, row in enumerate(rows, 1):
        if any(cell.strip() for cell in row[len(header) :]):
            raise DataError(
                f"{path}, row {number}: it has more cells than the {len(header)} columns. Quote cells that hold commas."
            )
    return {name: [row[column] if column < len(row) else None for row in rows] for column, name in enumerate(header)}


# JSON --------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> TableFile:
    return _of_json(path, json.loads(decode(path.read_bytes())[0]))


def _read_json_lines(path: Path) -> TableFile:
    rows = []
    for number, line in enumerate(decode(path.read_bytes())[0].split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}. Expected one object a line.") from error
            if not isinstance(rows[-1], dict):
                raise DataError(f'{path}, line {number} is no object. Expected such as {{"image": ..., "label": ...}}.')
    return TableFile(path, _of_records(rows))


def _of_json(path: Path, content: Any) -> TableFile:
    """The table of a list of objects, lists by column, or labels by picture, also below a key such as `data`."""
    if isinstance(content, dict):
        classes, labels = content.get("classes"), content.get("labels")
        if isinstance(classes, list) and isinstance(labels, dict):  # classes by number
            named = {
                key: classes[one] if isinstance(one, int) and 0 <= one < len(classes) else one
                for key, one in labels.items()
            }
            return _of_json(path, named)
        inner = [content[key] for key in WRAPPED if isinstance(content.get(key), list) and _are_records(content[key])]
        if inner:
            content = inner[0]
        elif content and all(isinstance(value, list) for value in content.values()):
            lengths = {len(value) for value in content.values()}
            if len(lengths) == 1:
                return TableFile(path, {str(key): value for key, value in content.items()})
        elif content and all(isinstance(value, str | int | float) or value is None for value in content.values()):
            return TableFile(path, {"image": list(content), "label": list(content.values())})
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = [{"image": key, **value} for key, value in content.items()]
    if not isinstance(content, list) or not _are_records(content):
        raise DataError(
            f'{path} holds no table. Expected a list of objects such as {{"image": ..., "label": ...}}, or labels by image.'
        )
    return TableFile(path, _of_records(content))


def _are_records(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _of_records(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(str(key) for row in rows for key in row)
    return {name: [row.get(name) for row in rows] for name in names}


# Arrow -------------------------------------------------------------------------------------------------------


def _open_arrow(path: Path) -> Any:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pyarrow.parquet.read_table(path)
        try:
            return pyarrow.feather.read_table(path)
        except pyarrow.ArrowException:
            with pyarrow.memory_map(str(path)) as stream:  # as `datasets` writes its files
                return pyarrow.ipc.open_stream(stream).read_all()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _arrow_schema(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return list(pyarrow.parquet.read_schema(path).names)
    except pyarrow.ArrowException:
        return []
    return list(_open_arrow(path).column_names)


def _read_arrow(path: Path) -> TableFile:
    """The table of an Arrow file; pictures are read when they are asked for, and numbers of classes become their names."""
    import pyarrow

    table = _open_arrow(path)
    metadata = table.schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    cells: dict[str, Sequence[Any]] = {}
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        kind = column.type
        holds_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        in_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        try:
            values = (
                Lazy(range(len(column)), partial(_cell, column)) if holds_bytes or in_struct else column.to_pylist()
            )
        except pyarrow.ArrowException as error:
            raise ValueError(f"its column {name}: {error}") from error
        cells[str(name)] = _name_values(values, features.get(name), f"{path}, column {name}")
    return TableFile(path, cells)


def _cell(column: Any, row: int) -> Any:
    return column[row].as_py()


def _name_values(values: Sequence[Any], feature: Any, column: str) -> Sequence[Any]:
    """Names of classes in place of their numbers, one a row or several, as `datasets` describes them; -1 is none."""
    if isinstance(feature, dict) and feature.get("names"):
        return [None if value is None or value == -1 else name_at(feature["names"], value, column) for value in values]
    inner = feature.get("feature") or {} if isinstance(feature, dict) else (feature or [{}])[0]
    if isinstance(inner, dict) and inner.get("names"):
        return [None if value is None else [name_at(inner["names"], one, column) for one in value] for value in values]
    return values


READERS: dict[str, Callable[[Path], TableFile]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt", ".lst"), _read_text),
    ".json": _read_json,
    **dict.fromkeys((".jsonl", ".ndjson"), _read_json_lines),
    **dict.fromkeys((".parquet", ".pq", ".arrow", ".feather"), _read_arrow),
}
ARROW = (".parquet", ".pq", ".arrow", ".feather")

"""Legends of masks: files that name the colours, or the values, of classes.

class_dict.csv, classes.csv, ...   columns name, r, g, b; name and color; or value and name (_classes.csv of Roboflow)
labelmap.txt                       lines name:r,g,b:parts:actions (CVAT)
label_colors.txt                   lines r g b name (CamVid)
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelpatch.data.sources.documents import read_lines, read_text
from modelpatch.errors import DataError

NAMED = re.compile(r"class|label|colou?r|legend|palette", re.IGNORECASE)
NAME_COLUMNS = ("name", "class", "classname", "label", "labelname", "category")
VALUE_COLUMNS = ("pixelvalue", "value", "id", "index", "labelid", "classid")
CHANNEL_COLUMNS = (("r", "g", "b"), ("red", "green", "blue"))
COLOR_COLUMNS = ("color", "colour", "rgb", "hex")
CVAT_LINE = re.compile(r"([^:#]+):(\d+),(\d+),(\d+)(?::[^:]*){0,2}")
CAMVID_LINE = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")
Color = tuple[int, ...]


@dataclass(frozen=True)
class Legend:
    """The names of classes by their row, with the colour or else the value that each has in masks."""

    file: Path
    names: Sequence[str]
    colors: np.ndarray | None = None  # (N, 3) uint8
    values: Sequence[int] | None = None


def find_legend(folders: Sequence[Path]) -> Legend | None:
    """The legend in the first of the folders that holds one."""
    for folder in folders:
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and NAMED.search(file.stem)]
        for file in files:
            read = {".csv": _read_csv, ".txt": _read_lines}.get(file.suffix.lower())
            if read and (legend := read(file)):
                return legend
    return None


def _read_lines(file: Path) -> Legend | None:
    lines = [line for line in read_lines(file) if not line.startswith("#")]
    found: list[tuple[str, Color]] = []
    for line in lines:
        if match := CVAT_LINE.fullmatch(line):
            found.append((match[1].strip(), tuple(map(int, match.groups()[1:4]))))
        elif match := CAMVID_LINE.fullmatch(line):
            found.append((match[4].strip(), tuple(map(int, match.groups()[:3]))))
        elif found:
            raise DataError(
                f"{file}: the line {line[:80]!r} is no colour with a name; expected such as {lines[0][:80]!r}."
            )
        else:
            return None
    return _of_colors(file, found) if found else None


def _read_csv(file: Path) -> Legend | None:
    reader = csv.DictReader(read_text(file).splitlines(), skipinitialspace=True)
    columns = {re.sub(r"[^a-z]", "", str(column).lower()): column for column in reader.fieldnames or ()}
    name = next((columns[one] for one in NAME_COLUMNS if one in columns), None)
    channels = next((names for names in CHANNEL_COLUMNS if all(one in columns for one in names)), None)
    color = next((columns[one] for one in COLOR_COLUMNS if one in columns), None)
    value = next((columns[one] for one in VALUE_COLUMNS if one in columns), None)
    if name is None or not (channels or color or value):
        return None
    try:
        rows = [row for row in reader if any(str(cell or "").strip() for cell in row.values())]
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a list of classes: {error}.") from error
    if not rows:
        raise DataError(
            f"{file} has the columns of a list of classes and no row. Add a row for each class, or remove the file."
        )
    names = [_cell(row, name, file, number) for number, row in enumerate(rows, 1)]
    if channels or color:
        cells = [
            " ".join(
                _cell(row, one, file, number) for one in ([columns[one] for one in channels] if channels else [color])
            )
            for number, row in enumerate(rows, 1)
        ]
        found = [
            (name, _color(cell, file, number)) for number, (name, cell) in enumerate(zip(names, cells, strict=True), 1)
        ]
        return _of_colors(file, found)
    assert value is not None
    given = [_cell(row, value, file, number) for number, row in enumerate(rows, 1)]
    if wrong := [one for one in given if not one.isdecimal()]:
        raise DataError(f"{file}: the value of a class is {wrong[0][:80]!r}; expected a whole number from 0 on.")
    values = list(map(int, given))
    if len(set(values)) < len(values):
        raise DataError(f"{file}: two classes have one value. Expected one of its own for each.")
    return Legend(file, _checked(names, file), values=values)


def _cell(row: Mapping[str, str | None], column: str | None, file: Path, number: int) -> str:
    cell = str(row.get(column or "") or "").strip()
    if not cell:
        raise DataError(f"{file}, row {number}: it has no {column}.")
    return cell


def _color(text: str, file: Path, number: int) -> Color:
    if match := re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text):
        return tuple(int(part, 16) for part in match.groups())
    parts = re.findall(r"-?\d+", text)
    if len(parts) != 3:
        raise DataError(f"{file}, row {number}: {text[:80]!r} is no colour; expected red, green and blue.")
    return tuple(map(int, parts))


def _of_colors(file: Path, found: Sequence[tuple[str, Color]]) -> Legend:
    if wrong := [color for _, color in found if not all(0 <= part <= 255 for part in color)]:
        raise DataError(f"{file}: the colour {wrong[0]} is none; expected three numbers from 0 to 255.")
    colors = [color for _, color in found]
    if twice := [name for name, color in found if colors.count(color) > 1]:
        raise DataError(
            f"{file}: {twice[0]!r} and {twice[1]!r} have one colour. Expected one of its own for each class."
        )
    return Legend(file, _checked([name for name, _ in found], file), colors=np.array(colors, dtype=np.uint8))


def _checked(names: Sequence[str], file: Path) -> Sequence[str]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{file}: it names {twice[0]!r} twice.")
    return names

"""Manifests in CSV or parquet: columns `image` (path, or bytes in parquet), `label`, and `split` if there is one.

A folder may hold one manifest a split: `train.csv`, `test.csv`, or the same in parquet.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.samples import order_name
from modelpatch.data.sources.base import (
    SPLITS,
    DataSource,
    Found,
    SourceOptions,
    is_folder,
    named_splits,
    register_source,
)
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification

IMAGE_COLUMNS = ("image", "img", "path", "file", "filename")
LABEL_COLUMNS = ("label", "class", "fine_label", "target")
MANIFESTS = (".parquet", ".csv")


def find_manifests(path: Path) -> dict[str, Path]:
    """The manifests of a folder by split, parquet before CSV; empty where none is of the training split."""
    for suffix in MANIFESTS:
        files = named_splits([file for file in sorted(path.glob(f"*{suffix}")) if file.is_file()])
        if "train" in files:
            return files
    return {}


@register_source("manifests")
class Manifests(DataSource):
    """A manifest, or a folder that holds one for each split."""

    kind = Classification.name
    general = True

    def accepts(self, source: Any) -> bool:
        if is_folder(source):
            return bool(find_manifests(Path(source).expanduser()))
        return (
            isinstance(source, str | Path) and Path(source).suffix in MANIFESTS and Path(source).expanduser().is_file()
        )

    def read(self, source: Any, options: SourceOptions) -> Found:
        path = Path(source).expanduser()
        if path.is_file():
            rows = _read_manifest(path, path.parent)
        else:
            rows = [row for split, file in find_manifests(path).items() for row in _read_manifest(file, path, split)]
        if not rows:
            raise DataError(f"{path} has no rows.")
        classes = sorted({row.label for row in rows}, key=order_name)
        index = {name: number for number, name in enumerate(classes)}
        members: dict[str, list[ManifestRow]] = {}
        for row in rows:
            members.setdefault(row.split, []).append(row)
        splits = {
            split: Split([row.image for row in own], np.array([index[row.label] for row in own], dtype=np.int64))
            for split, own in members.items()
        }
        return Found(Classification.name, splits, classes)


@dataclass(frozen=True)
class ManifestRow:
    """One line of a manifest, checked."""

    image: ImageSource
    label: str
    split: str


def _read_manifest(path: Path, folder: Path, split: str | None = None) -> list[ManifestRow]:
    """The rows of a manifest whose images lie in `folder`, all of one `split` or each of its own.

    Raises `DataError` that names the file and the row.
    """
    columns, rows = _read_columns(path)
    image = next((column for column in IMAGE_COLUMNS if column in columns), None)
    label = next((column for column in LABEL_COLUMNS if column in columns), None)
    if image is None or label is None:
        raise DataError(
            f"{path} has the columns {', '.join(columns) or '(none)'}. Expected one of {', '.join(IMAGE_COLUMNS)} and one "
            f"of {', '.join(LABEL_COLUMNS)}."
        )
    result = []
    for number, row in enumerate(rows):
        place = f"{path}, row {number + 1}"
        if None in row:
            raise DataError(
                f"{place}: it has more cells than the {len(columns)} columns. Quote cells that hold commas."
            )
        for column in (image, label):
            if _is_missing(row[column]):
                raise DataError(f"{place}: it has no {column}.")
        name = split or str(row.get("split") or "train")
        if name not in SPLITS:
            raise DataError(f"{place}: split {name!r} is none of {', '.join(SPLITS)}.")
        result.append(ManifestRow(_image_source(row[image], folder, place), str(row[label]), SPLITS[name]))
    return result


def _read_columns(path: Path) -> tuple[list[str], list[dict[Any, Any]]]:
    """The columns and rows of a manifest, with class names in place of numbers where a parquet file has them."""
    if path.suffix == ".csv":
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                return list(reader.fieldnames or ()), list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
        for column, names in _class_names(table.schema.metadata or {}).items():
            for row in rows:
                if row.get(column) is not None:
                    row[column] = names[row[column]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    return table.column_names, rows


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes by column, as `datasets` writes them into a parquet file."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    described = {column: features.get(column, {}).get("names") for column in LABEL_COLUMNS}
    return {column: names for column, names in described.items() if names}


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _image_source(value: Any, folder: Path, place: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    file = folder / str(value)
    if not value or not file.is_file():
        raise DataError(f"{place}: there is no image {str(file)[:300]}.")
    return file

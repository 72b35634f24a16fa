"""Images with classes: class folders, manifests, and scikit-learn's 1,797 real 8 x 8 images of handwritten digits.

ROOT/train/CLASS/*, ROOT/test/CLASS/* (and `val` or `validation`), or ROOT/CLASS/* alone
ROOT/train.csv, ROOT/test.csv, or one file: CSV or parquet with columns `image` (path, or bytes in parquet), `label`, and
    `split` if there is one; several labels or numbers as `columns.py` reads them
bundled:digits
"""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource, find_images
from modelpatch.data.samples import order_name
from modelpatch.data.sources import base
from modelpatch.data.sources.columns import Table, Targets, find_targets, make_vectors
from modelpatch.data.splits import Split
from modelpatch.errors import DataError, require
from modelpatch.tasks.classification import Classification

IMAGE_COLUMNS = ("image", "img", "path", "file", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "tags")
MANIFESTS = (".parquet", ".csv")


def find_manifests(path: Path) -> dict[str, Path]:
    """The manifests of a folder by split, parquet before CSV; empty where none is of the training split."""
    for suffix in MANIFESTS:
        files = base.named_splits([file for file in sorted(path.glob(f"*{suffix}")) if file.is_file()])
        if "train" in files:
            return files
    return {}


@base.register_source("manifests")
class Manifests(base.DataSource):
    """A manifest, or a folder that holds one for each split."""

    general = True

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        return bool(find_manifests(path)) if path.is_dir() else path.suffix in MANIFESTS and path.is_file()

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, rows, label = Path(source), list[ManifestRow](), ""
        folder, files = (path.parent, {None: path}) if path.is_file() else (path, find_manifests(path))
        for given, file in files.items():
            named, own = _read_manifest(file, folder, given)
            label = label or named or ""
            for row in own:  # every file may have a name of its own for the column of labels
                cells = {label if name == named else name: value for name, value in row.cells.items()}
                rows.append(row._replace(cells=cells))
        if not rows:
            raise DataError(f"{path} has no rows.")
        names = dict.fromkeys(name for row in rows for name in row.cells if name not in IMAGE_COLUMNS)
        cells = {name: [row.cells.get(name) for row in rows] for name in names}
        found = find_targets(Table(str(path), cells, label or None, lambda number: rows[number].place), options)
        if isinstance(found, Targets):
            return make_vectors(found, [(row.split, row.image) for row in rows])
        labels = found or [_read_class(row, label) for row in rows]
        members = defaultdict[str, list[tuple[ImageSource, str]]](list)
        for row, name in zip(rows, labels, strict=True):
            members[row.split].append((row.image, name))
        return make_classification(members, sorted(set(labels), key=order_name))


@base.register_source("folders")
class ClassFolders(base.DataSource):
    """A folder of class folders, with or without folders of splits above them."""

    kind = Classification.name
    general = True

    def accepts(self, source: Any) -> bool:
        return Path(source).is_dir() and not find_manifests(Path(source))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path = Path(source)
        folders = base.split_folders(path)
        if "train" not in folders:
            raise DataError(
                f"{path} has the splits {', '.join(folders)} but no training images. Expected {path.name}/train/CLASS/*.jpg."
            )
        files = {
            split: {folder.name: find_images(folder) for folder in root.iterdir() if folder.is_dir()}
            for split, root in folders.items()
        }
        classes = sorted({name for own in files.values() for name, images in own.items() if images})
        if not classes:
            raise DataError(
                f"{path} holds no class folders with images. Expected {path.name}/train/CLASS/*.jpg or "
                f"{path.name}/CLASS/*.jpg."
            )
        members = {
            split: [(file, name) for name in classes for file in own.get(name, ())] for split, own in files.items()
        }
        return make_classification(members, classes)


@base.register_source("digits")
class Digits(base.DataSource):
    """The digits that scikit-learn brings."""

    kind = Classification.name

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str) and source == "bundled:digits"

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        bunch = require("sklearn.datasets", "demo", "Loading bundled:digits", "scikit-learn").load_digits()
        images = np.round(bunch.images / 16 * 255).astype(np.uint8)
        split = Split(list(images), bunch.target.astype(np.int64))
        return base.Found(Classification.name, {"train": split}, [str(digit) for digit in range(10)])


def make_classification(members: Mapping[str, Sequence[tuple[ImageSource, str]]], names: Sequence[str]) -> base.Found:
    """The task of images with the names of their classes, by split."""
    index = {name: number for number, name in enumerate(names)}
    splits = {
        split: Split([image for image, _ in pairs], np.array([index[name] for _, name in pairs], dtype=np.int64))
        for split, pairs in members.items()
    }
    return base.Found(Classification.name, splits, names)


class ManifestRow(NamedTuple):
    """A row of a manifest: its split, its image, and its cells by column."""

    split: str
    image: ImageSource
    cells: dict[str, Any]
    place: str


def _read_class(row: ManifestRow, label: str) -> str:
    """The class of a row. Raises `DataError` for a manifest without a column of labels, and for an empty cell."""
    if label not in row.cells:
        raise DataError(
            f"{row.place.rpartition(', row')[0]} has the columns {', '.join(row.cells)}. Expected one of "
            f"{', '.join(LABEL_COLUMNS)}."
        )
    if _is_empty(row.cells[label]):
        raise DataError(f"{row.place}: it has no {label}.")
    return str(row.cells[label])


def _is_empty(value: Any) -> bool:
    missing = isinstance(value, float) and value != value
    return value is None or missing or (isinstance(value, str) and not value.strip())


def _read_manifest(path: Path, folder: Path, split: str | None) -> tuple[str | None, list[ManifestRow]]:
    """The column of labels and all rows, images in `folder`. Raises `DataError` that names the file and the row."""
    columns, rows = _read_columns(path)
    image, label = (next((one for one in known if one in columns), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    read = []
    if image is None:
        raise DataError(
            f"{path} has the columns {', '.join(columns) or '(none)'}. Expected one of {', '.join(IMAGE_COLUMNS)} and one "
            f"of {', '.join(LABEL_COLUMNS)}."
        )
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        if None in row:
            raise DataError(
                f"{place}: it has more cells than the {len(columns)} columns. Quote cells that hold commas."
            )
        if _is_empty(row[image]):
            raise DataError(f"{place}: it has no {image}.")
        name = split or str(row.get("split") or "train")
        if name not in base.SPLITS:
            raise DataError(f"{place}: split {name!r} is none of {', '.join(base.SPLITS)}.")
        read.append(ManifestRow(base.SPLITS[name], _image_source(row[image], folder, place), row, place))
    return label, read


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
        rows, metadata = table.to_pylist(), table.schema.metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        for column in LABEL_COLUMNS:
            feature = features.get(column, {})
            inner = feature.get("feature") or {} if isinstance(feature, dict) else (feature or [{}])[0]
            for row in rows:  # classes by number, one a row or several, as `datasets` writes them
                if row.get(column) is not None and isinstance(feature, dict) and feature.get("names"):
                    row[column] = feature["names"][row[column]]
                elif row.get(column) is not None and inner.get("names"):
                    row[column] = [inner["names"][one] for one in row[column]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    return table.column_names, rows


def _image_source(value: Any, folder: Path, place: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    file = folder / str(value)
    if not value or not file.is_file():
        raise DataError(f"{place}: there is no image {str(file)[:300]}.")
    return file

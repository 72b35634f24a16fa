"""Images with one class each: class folders, manifests, and scikit-learn's 1,797 real 8 x 8 images of handwritten digits.

ROOT/train/CLASS/*, ROOT/test/CLASS/* (and `val` or `validation`), or ROOT/CLASS/* alone
ROOT/train.csv, ROOT/test.csv, or one file: CSV or parquet with columns `image` (path, or bytes in parquet), `label`, and
    `split` if there is one
bundled:digits
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource, find_images
from modelpatch.data.samples import order_name
from modelpatch.data.sources import base
from modelpatch.data.splits import Split
from modelpatch.errors import DataError, require
from modelpatch.tasks.classification import Classification

IMAGE_COLUMNS = ("image", "img", "path", "file", "filename")
LABEL_COLUMNS = ("label", "class", "fine_label", "target")
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

    kind = Classification.name
    general = True

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        return bool(find_manifests(path)) if path.is_dir() else path.suffix in MANIFESTS and path.is_file()

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, members = Path(source), defaultdict[str, list[tuple[ImageSource, str]]](list)
        folder, files = (path.parent, {None: path}) if path.is_file() else (path, find_manifests(path))
        for given, file in files.items():
            for split, image, label in _read_manifest(file, folder, given):
                members[split].append((image, label))
        if not members:
            raise DataError(f"{path} has no rows.")
        labels = {label for rows in members.values() for _, label in rows}
        return make_classification(members, sorted(labels, key=order_name))


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


def _read_manifest(path: Path, folder: Path, split: str | None) -> Iterator[tuple[str, ImageSource, str]]:
    """The split, image in `folder` and label of every row. Raises `DataError` that names the file and the row."""
    columns, rows = _read_columns(path)
    image, label = (next((one for one in known if one in columns), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image is None or label is None:
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
        for column in (image, label):
            value = row[column]
            if value is None or value != value or (isinstance(value, str) and not value.strip()):
                raise DataError(f"{place}: it has no {column}.")
        name = split or str(row.get("split") or "train")
        if name not in base.SPLITS:
            raise DataError(f"{place}: split {name!r} is none of {', '.join(base.SPLITS)}.")
        yield base.SPLITS[name], _image_source(row[image], folder, place), str(row[label])


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
            if names := features.get(column, {}).get("names"):  # of classes, as `datasets` writes them
                for row in rows:
                    if row.get(column) is not None:
                        row[column] = names[row[column]]
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

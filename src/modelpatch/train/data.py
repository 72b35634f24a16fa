"""A task with its images: class folders, manifests, the hub, or what the package's dependencies bundle.

| source              | what is read                                                                                |
|---------------------|---------------------------------------------------------------------------------------------|
| a folder            | `train/CLASS/*`, `test/CLASS/*` (and `val` or `validation`), or `CLASS/*` alone             |
| a folder            | `train.parquet`, `test.parquet` or the same in CSV                                          |
| `*.csv`, `*.parquet`  | columns `image` (path, or bytes in parquet), `label`, and `split` if there is one           |
| `hf:NAME`             | a data set of the Hugging Face hub, or a local one, through `datasets`                      |
| `bundled:digits`      | scikit-learn's 1,797 real 8 x 8 images of handwritten digits                                |

Where the source has no test split, a seeded stratified one is made.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from modelpatch.backbone.preprocess import IMAGE_SUFFIXES, ImageSource, image_bytes, open_image
from modelpatch.errors import DataError, MissingExtraError
from modelpatch.patch import Task

SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
IMAGE_COLUMNS = ("image", "img", "path", "file", "filename")
LABEL_COLUMNS = ("label", "class", "fine_label", "target")
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """Images, undecoded, and their class indices, int64 (N,)."""

    images: Sequence[ImageSource]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """The rows with these indices."""
        return Split([self.images[row] for row in rows], self.labels[rows])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the labels and of every image's bytes as they lie on disk or in memory, 64 hexadecimal digits."""
        digest = hashlib.sha256(self.labels.tobytes())
        for image in self.images:
            digest.update(hashlib.sha256(image_bytes(image)).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskData:
    """A task and its splits. `validation` is None where the source has none; it is never cut from the test images."""

    task: Task
    train: Split
    test: Split
    validation: Split | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    def with_validation(self, fraction: float, seed: int) -> TaskData:
        """The task with a stratified share of its training images as validation split, unless it has one."""
        if self.validation is not None:
            return self
        keep, held = stratified(self.train.labels, fraction, seed)
        return replace(self, train=self.train.take(keep), validation=self.train.take(held))

    def subsample(self, count: int, seed: int = 0) -> TaskData:
        """The task with `count` stratified training images; all of them if it has fewer."""
        if count >= len(self.train):
            return self
        _, rows = stratified(self.train.labels, count / len(self.train), seed)
        return replace(self, train=self.train.take(rows))

    def __repr__(self) -> str:
        held = "" if self.validation is None else f", {len(self.validation)} validation"
        counts = f"{len(self.train)} train{held}, {len(self.test)} test"
        return f"TaskData({self.task.name!r}, {len(self.classes)} classes, {counts})"


def load_task(source: str | Path, *, name: str | None = None, seed: int = 0, hold_out: bool = True) -> TaskData:
    """A classification task from a source (see the module's table). `seed` makes the test split where there is none.

    With `hold_out=False` a source without a test split is tested on all its images: for data that is only measured.

    Raises `DataError` for a source that holds no images, has one class, or has labels of classes that are not trained.
    """
    text = str(source)
    if text.startswith("hf:"):
        splits, classes = _read_hub(text.removeprefix("hf:"))
        stem = text.rsplit("/", 1)[-1].removeprefix("hf:")
    elif text == "bundled:digits":
        splits, classes, stem = *_read_digits(), "digits"
    else:
        path = Path(source).expanduser()
        splits, classes = _read_path(path)
        stem = path.resolve().stem if path.is_file() else path.resolve().name
    return _assemble(splits, classes, name or stem, text, seed if hold_out else None)


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (rest, share): `share` holds about `fraction` of each class, at least one of each with two rows."""
    generator = np.random.default_rng(seed)
    share: list[np.ndarray] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        share.append(rows[: max(round(fraction * len(rows)), int(len(rows) > 1))])
    taken = np.sort(np.concatenate(share))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def source_size(split: Split, sample: int = 16) -> int:
    """The median shorter side of the images, in pixels, from a few of them."""
    rows = np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)
    return int(np.median([min(open_image(split.images[row]).size) for row in rows]))


def _assemble(raw: dict[str, Split], classes: Sequence[str], name: str, source: str, seed: int | None) -> TaskData:
    if len(classes) < 2:
        raise DataError(f"{source} has {len(classes)} class; a classification task needs at least two.")
    if "train" not in raw or not len(raw["train"]):
        raise DataError(f"{source} has no training images; it has the splits: {', '.join(raw) or 'none'}.")
    if empty := [split for split, images in raw.items() if not len(images)]:
        raise DataError(f"{source}: its split {empty[0]!r} holds no images. Fill it or remove it.")
    facts: dict[str, Any] = {"source": source.rsplit("/", 1)[-1]}
    train = raw["train"]
    if "test" not in raw and seed is not None:
        keep, held = stratified(train.labels, TEST_FRACTION, seed)
        train, raw["test"] = train.take(keep), train.take(held)
        facts["test_split"] = f"stratified {TEST_FRACTION:.0%}, seed {seed}"
    raw.setdefault("test", train)
    unseen = set(np.unique(raw["test"].labels)) - set(np.unique(train.labels))
    if unseen:
        raise DataError(f"{source}: the class {classes[min(unseen)]!r} is tested but has no training image.")
    try:
        task = Task(name=name, classes=tuple(classes))
    except ValueError as error:
        raise DataError(f"{source}: its name or class names cannot be used: {error}") from error
    return TaskData(task, train, raw["test"], raw.get("validation"), facts)


# folders and manifests --------------------------------------------------------------------------------------


def _read_path(path: Path) -> tuple[dict[str, Split], list[str]]:
    if path.is_file() and path.suffix in (".csv", ".parquet"):
        return _from_rows(_read_rows(path), path)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of images nor a .csv or .parquet manifest.")
    for suffix in (".parquet", ".csv"):
        files = {SPLITS[file.stem]: file for file in sorted(path.glob(f"*{suffix}")) if file.stem in SPLITS}
        if "train" in files:
            rows = [{**row, "split": split} for split, file in files.items() for row in _read_rows(file)]
            return _from_rows(rows, path)
    folders = {SPLITS[folder.name]: folder for folder in sorted(path.iterdir()) if folder.name in SPLITS}
    if folders and "train" not in folders:
        raise DataError(
            f"{path} has the splits {', '.join(folders)} but no training images. Expected {path.name}/train/CLASS/*.jpg."
        )
    return _read_folders(folders or {"train": path}, path)


def _read_folders(folders: dict[str, Path], path: Path) -> tuple[dict[str, Split], list[str]]:
    classes = sorted(
        {folder.name for root in folders.values() for folder in root.iterdir() if folder.is_dir() and _images(folder)}
    )
    if not classes:
        raise DataError(
            f"{path} holds no class folders with images. Expected {path.name}/train/CLASS/*.jpg or {path.name}/CLASS/*.jpg."
        )
    splits = {}
    for name, root in folders.items():
        pairs = [(file, index) for index, kind in enumerate(classes) for file in _images(root / kind)]
        splits[name] = Split([file for file, _ in pairs], np.array([index for _, index in pairs], dtype=np.int64))
    return splits, classes


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest; class names that a parquet file carries are put in place of their numbers."""
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                return list(csv.DictReader(stream))
        table = pyarrow.parquet.read_table(path)
        described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    rows = table.to_pylist()
    features = described.get("info", {}).get("features", {})
    for column in LABEL_COLUMNS:
        if names := features.get(column, {}).get("names"):
            for row in rows:
                row[column] = names[row[column]]
    return rows


def _from_rows(rows: list[dict[str, Any]], path: Path) -> tuple[dict[str, Split], list[str]]:
    if not rows:
        raise DataError(f"{path} has no rows.")
    image = next((column for column in IMAGE_COLUMNS if column in rows[0]), None)
    label = next((column for column in LABEL_COLUMNS if column in rows[0]), None)
    if image is None or label is None:
        raise DataError(
            f"{path} has the columns {', '.join(rows[0])}. Expected one of {', '.join(IMAGE_COLUMNS)} and one of "
            f"{', '.join(LABEL_COLUMNS)}."
        )
    classes = sorted({str(row[label]) for row in rows if row.get(label) is not None}, key=_numeric_first)
    index = {name: number for number, name in enumerate(classes)}
    folder = path if path.is_dir() else path.parent
    splits: dict[str, tuple[list[ImageSource], list[int]]] = {}
    for number, row in enumerate(rows):
        if row.get(label) is None or row.get(image) is None:
            raise DataError(f"{path}, row {number + 1}: it has no {label if row.get(label) is None else image}.")
        split = str(row.get("split") or "train")
        if split not in SPLITS:
            raise DataError(f"{path}, row {number + 1}: split {split!r} is none of {', '.join(SPLITS)}.")
        images, labels = splits.setdefault(SPLITS[split], ([], []))
        images.append(_image_source(row[image], folder, f"{path}, row {number + 1}"))
        labels.append(index[str(row[label])])
    return {name: Split(images, np.array(labels, dtype=np.int64)) for name, (images, labels) in splits.items()}, classes


def _numeric_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _image_source(value: Any, folder: Path, where: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    file = folder / str(value)
    if not value or not file.is_file():
        raise DataError(f"{where}: there is no image {file}.")
    return file


# libraries --------------------------------------------------------------------------------------------------


def _read_hub(name: str) -> tuple[dict[str, Split], list[str]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"Loading hf:{name}") from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such data set, a script it refuses to run
        raise DataError(f"hf:{name} cannot be loaded: {error}") from error
    splits, classes = {}, []
    for split, table in loaded.items():
        if split not in SPLITS:
            continue
        image = next((c for c, f in table.features.items() if isinstance(f, datasets.Image)), None)
        label = next((c for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise DataError(f"hf:{name} has no image column and class label; it has: {', '.join(table.features)}.")
        classes = list(table.features[label].names)
        rows = _LazyImages(table.cast_column(image, datasets.Image(decode=False)), image)
        splits[SPLITS[split]] = Split(rows, np.array(table[label], dtype=np.int64))
    return splits, classes


class _LazyImages(Sequence[ImageSource]):
    """The encoded images of a hub data set, read when they are asked for."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        value = self.table[int(row)][self.column]
        return value.get("bytes") or Path(value["path"])


def _read_digits() -> tuple[dict[str, Split], list[str]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "demo", "Loading bundled:digits") from None
    bunch = load_digits()
    images: Iterable[np.ndarray] = np.round(bunch.images / 16 * 255).astype(np.uint8)
    return {"train": Split(list(images), bunch.target.astype(np.int64))}, [str(digit) for digit in range(10)]

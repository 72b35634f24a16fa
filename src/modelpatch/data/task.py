"""A task with its images: class folders, manifests, the hub, or what the package's dependencies bundle.

| source              | what is read                                                                                |
|---------------------|---------------------------------------------------------------------------------------------|
| a folder            | `train/CLASS/*`, `test/CLASS/*` (and `val` or `validation`), or `CLASS/*` alone             |
| a folder            | `train.parquet`, `test.parquet` or the same in CSV                                          |
| `*.csv`, `*.parquet`  | columns `image` (path, or bytes in parquet), `label`, and `split` if there is one           |
| `hf:NAME`             | a data set of the Hugging Face hub, or a local one, through `datasets`                      |
| `bundled:digits`      | scikit-learn's 1,797 real 8 x 8 images of handwritten digits                                |

Segmentation and detection have sources of their own, see `dense_data.py`; `kind` chooses where a folder has both.
Where the source has no test split, a seeded stratified one is made.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from pydantic import ValidationError

from modelpatch.backbone.preprocessing import ImageSource, find_images, image_bytes, open_image
from modelpatch.data.dense import SPLITS, Found, Wish, hub_targets, read_dense
from modelpatch.errors import DataError, MissingExtraError
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.tasks.targets import Target
from modelpatch.text import first_problem

IMAGE_COLUMNS = ("image", "img", "path", "file", "filename")
LABEL_COLUMNS = ("label", "class", "fine_label", "target")
MANIFESTS = (".parquet", ".csv")
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """Images, undecoded, and their class indices, int64 (N,).

    Images of dense tasks have `targets` instead; their labels are zeros, so that stratified splits of them are random ones.
    """

    images: Sequence[ImageSource]
    labels: np.ndarray
    targets: Sequence[Target] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """The rows with these indices."""
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        return Split([self.images[row] for row in rows], self.labels[rows], targets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of labels, targets and every image's bytes as they lie on disk or in memory, 64 hexadecimal digits."""
        digest = hashlib.sha256(self.labels.tobytes())
        for image in self.images:
            digest.update(hashlib.sha256(image_bytes(image)).digest())
        for target in self.targets or ():
            digest.update(hashlib.sha256(target.content()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """A task and its splits. `validation` is None where the source has none; it is never cut from the test images."""

    task: TaskRecord
    train: Split
    test: Split
    validation: Split | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    def with_validation(self, fraction: float, seed: int) -> Task:
        """The task with a stratified share of its training images as validation split, unless it has one.

        Raises `DataError` for a share that leaves a class without training images, or nothing to validate on.
        """
        if self.validation is not None:
            return self
        if not 0 < fraction < 1:
            raise DataError(f"the share of images held out for validation is {fraction}; expected one between 0 and 1.")
        keep, held = stratified(self.train.labels, fraction, seed)
        if not len(held):
            raise DataError(f"no class of {self.task.name} has an image to spare for validation. Add images, or none.")
        if lost := set(self.train.labels[held]) - set(self.train.labels[keep]):
            name, count = self.classes[min(lost)], int((self.train.labels == min(lost)).sum())
            raise DataError(
                f"a share of {fraction:g} for validation leaves the class {name!r} none of its {count} images to train on. "
                "Hold out a smaller share, or add images."
            )
        return replace(self, train=self.train.take(keep), validation=self.train.take(held))

    def subsample(self, count: int, seed: int = 0) -> Task:
        """The task with exactly `count` training images, as `drawn` chooses them; all of them if it has fewer.

        Raises `DataError` below 1.
        """
        if count < 1:
            raise DataError(f"a subsample of {count} images is no task; expected at least one.")
        if count >= len(self.train):
            return self
        return replace(self, train=self.train.take(drawn(self.train.labels, count, seed)))

    def __repr__(self) -> str:
        held = "" if self.validation is None else f", {len(self.validation)} validation"
        counts = f"{len(self.train)} train{held}, {len(self.test)} test"
        return f"Task({self.task.name!r}, {len(self.classes)} classes, {counts})"


def load_task(
    source: str | Path,
    *,
    name: str | None = None,
    seed: int = 0,
    hold_out: bool = True,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    ignore: int | None = None,
) -> Task:
    """A task from a source (see the module's table). `seed` makes the test split where there is none.

    With `hold_out=False` a source without a test split is tested on all its images: for data that is only measured. `kind` is
    found from the source where it is not given. For segmentation `classes` name the values of masks from 0 on, and `ignore` is
    one that stands for no class, beside 255.

    Raises `DataError` for a source that cannot be read or holds no images, has one class, or has labels of classes that
    are not trained.
    """
    text = str(source)
    if not isinstance(source, str | Path) or not text:
        raise DataError(f"{source!r} is no data. Expected a folder, a manifest, hf:NAME or bundled:digits.")
    _check_seed(seed)
    wish = Wish(kind, None if classes is None else tuple(classes), ignore)
    found: Found
    if text.startswith("hf:"):
        found = _read_hub(text.removeprefix("hf:"), wish)
        stem = text.rsplit("/", 1)[-1].removeprefix("hf:")
    elif text == "bundled:digits":
        found, stem = _labelled(*_read_digits()), "digits"
    else:
        try:
            path = Path(source).expanduser()
            found = read_dense(path, wish) or _labelled(*_read_path(path))
            stem = path.resolve().stem if path.is_file() else path.resolve().name
        except (OSError, RuntimeError) as error:  # no permission, a name too long, no such user's home
            raise DataError(f"{text[:200]} cannot be read: {str(error)[:200]}") from error
    wish.check(found, text)
    data = _assemble(found, name or stem, text, seed if hold_out else None)
    return replace(data, facts={**data.facts, **wish.facts})


def check_classification(data: Task, purpose: str) -> None:
    """Raises `DataError` for a task of another kind where only classes of whole images make sense."""
    if not kind_of(data.task.kind).classifies:
        raise DataError(
            f"{data.task.name} is a {data.task.kind} task; {purpose} takes classification tasks. Use fit, eval and predict."
        )


def _labelled(splits: dict[str, Split], classes: list[str]) -> Found:
    return Found(Classification.name, {name: (split.images, split.labels) for name, split in splits.items()}, classes)


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (rest, share): `share` holds about `fraction` of each class, at least one of each with two rows."""
    _check_seed(seed)
    generator = np.random.default_rng(seed)
    share: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        share.append(rows[: max(round(fraction * len(rows)), int(len(rows) > 1))])
    taken = np.sort(np.concatenate(share))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def drawn(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Exactly `count` row indices: one of every class if there are that many, and beyond that every class in proportion.

    The n images of a class stand evenly between 0 and 1, its first one at 0; those that stand lowest are taken, and among
    equals the seed decides.
    """
    _check_seed(seed)
    generator = np.random.default_rng(seed)
    rows, places = generator.permutation(len(labels)), np.zeros(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels[rows] == label)
        places[own[1:]] = (np.arange(1, len(own)) + 0.5) / len(own)
    return np.sort(rows[np.argsort(places, kind="stable")[:count]])


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"the seed of a split is {seed!r}; expected a whole number from 0 on.")


def split_seed(facts: Mapping[str, Any]) -> int | None:
    """The seed of the test split that these facts of a task's data tell of; None where the source brought its own."""
    found = re.fullmatch(r"stratified \d+%, seed (\d+)", str(facts.get("test_split", "")))
    return int(found[1]) if found else None


def check_same_split(facts: Mapping[str, Any], data: Task) -> None:
    """Raises `DataError` where a patch was fitted on another split of this source, as the facts in its file tell.

    Its training images would stand among the test images.
    """
    fitted, now = split_seed(facts), split_seed(data.facts)
    if facts.get("source") == data.facts.get("source") and None not in (fitted, now) and fitted != now:
        raise DataError(
            f"{data.task.name} was split with seed {now}, but the patch was fitted on the split of seed {fitted}: images it "
            f"was trained on would be tested. Load the data with seed {fitted}."
        )


def source_size(split: Split, sample: int = 16) -> int:
    """The median shorter side of the images, in pixels, from a few of them."""
    rows = np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)
    return int(np.median([min(open_image(split.images[row]).size) for row in rows]))


def _split(images: Sequence[ImageSource], asked: np.ndarray | Sequence[Target]) -> Split:
    if isinstance(asked, np.ndarray):
        return Split(images, asked)
    return Split(images, np.zeros(len(images), dtype=np.int64), asked)


def _assemble(found: Found, name: str, source: str, seed: int | None) -> Task:
    raw, classes = {split: _split(*pair) for split, pair in found.splits.items()}, found.classes
    if len(classes) < (least := kind_of(found.kind).fewest_classes):
        raise DataError(f"{source} has {len(classes)} class; a {found.kind} task needs at least {least}.")
    if "train" not in raw or not len(raw["train"]):
        raise DataError(f"{source} has no training images; it has the splits: {', '.join(raw) or 'none'}.")
    if empty := [split for split, images in raw.items() if not len(images)]:
        raise DataError(f"{source}: its split {empty[0]!r} holds no images. Fill it or remove it.")
    for split, images in raw.items():
        if images.targets is None and (images.labels.min() < 0 or images.labels.max() >= len(classes)):
            raise DataError(f"{source}: its split {split!r} has images without a label. Leave it out, or label them.")
    facts: dict[str, Any] = {"source": source.rsplit("/", 1)[-1]}
    train = raw["train"]
    if "test" not in raw and seed is not None:
        keep, held = stratified(train.labels, TEST_FRACTION, seed)
        if not len(held):
            raise DataError(f"{source} has one image a class, and no test split. Add images.")
        train, raw["test"] = train.take(keep), train.take(held)
        facts["test_split"] = f"stratified {TEST_FRACTION:.0%}, seed {seed}"
    raw.setdefault("test", train)
    unseen = set(np.unique(raw["test"].labels)) - set(np.unique(train.labels))
    if unseen:
        raise DataError(f"{source}: the class {classes[min(unseen)]!r} is tested but has no training image.")
    try:
        task = TaskRecord(name=name, kind=found.kind, classes=tuple(classes))
    except ValidationError as error:
        raise DataError(f"{source}: its name or class names cannot be used: {first_problem(error)}.") from error
    return Task(task, train, raw["test"], raw.get("validation"), facts)


# folders and manifests --------------------------------------------------------------------------------------


def _read_path(path: Path) -> tuple[dict[str, Split], list[str]]:
    if path.is_file() and path.suffix in MANIFESTS:
        return _from_rows(_read_manifest(path, path.parent), path)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of images nor a .csv or .parquet manifest.")
    for suffix in MANIFESTS:
        files = _by_split([file for file in sorted(path.glob(f"*{suffix}")) if file.is_file()])
        if "train" in files:
            return _from_rows([row for split, file in files.items() for row in _read_manifest(file, path, split)], path)
    folders = _by_split([folder for folder in sorted(path.iterdir()) if folder.is_dir()])
    if folders and "train" not in folders:
        raise DataError(
            f"{path} has the splits {', '.join(folders)} but no training images. Expected {path.name}/train/CLASS/*.jpg."
        )
    return _read_folders(folders or {"train": path}, path)


def _by_split(paths: list[Path]) -> dict[str, Path]:
    """The files or folders that are named as splits. Raises `DataError` for two of one split (`val`, `validation`)."""
    splits: dict[str, Path] = {}
    for path in paths:
        name = path.stem if path.suffix in MANIFESTS else path.name
        if name in SPLITS:
            other = splits.setdefault(SPLITS[name], path)
            if other is not path:
                raise DataError(f"{other} and {path} are both the {SPLITS[name]} split. Keep one of them.")
    return splits


def _read_folders(folders: dict[str, Path], path: Path) -> tuple[dict[str, Split], list[str]]:
    classes = sorted(
        {
            folder.name
            for root in folders.values()
            for folder in root.iterdir()
            if folder.is_dir() and find_images(folder)
        }
    )
    if not classes:
        raise DataError(
            f"{path} holds no class folders with images. Expected {path.name}/train/CLASS/*.jpg or {path.name}/CLASS/*.jpg."
        )
    splits = {}
    for name, root in folders.items():
        pairs = [(file, index) for index, kind in enumerate(classes) for file in find_images(root / kind)]
        splits[name] = Split([file for file, _ in pairs], np.array([index for _, index in pairs], dtype=np.int64))
    return splits, classes


@dataclass(frozen=True)
class _Row:
    """One line of a manifest, checked."""

    image: ImageSource
    label: str
    split: str


def _read_manifest(path: Path, folder: Path, split: str | None = None) -> list[_Row]:
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
        where = f"{path}, row {number + 1}"
        if None in row:
            raise DataError(
                f"{where}: it has more cells than the {len(columns)} columns. Quote cells that hold commas."
            )
        for column in (image, label):
            if _is_missing(row[column]):
                raise DataError(f"{where}: it has no {column}.")
        name = split or str(row.get("split") or "train")
        if name not in SPLITS:
            raise DataError(f"{where}: split {name!r} is none of {', '.join(SPLITS)}.")
        result.append(_Row(_image_source(row[image], folder, where), str(row[label]), SPLITS[name]))
    return result


def _read_columns(path: Path) -> tuple[list[str], list[dict[Any, Any]]]:
    """The columns and rows of a manifest; class names that a parquet file carries are put in place of their numbers."""
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                return list(reader.fieldnames or ()), list(reader)
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
        for column, names in _class_names(table.schema.metadata or {}).items():
            for row in rows:
                if row.get(column) is not None:
                    row[column] = names[row[column]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    return table.column_names, rows


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes by column, as `datasets` writes them into a parquet file."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    described = {column: features.get(column, {}).get("names") for column in LABEL_COLUMNS}
    return {column: names for column, names in described.items() if names}


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _from_rows(rows: list[_Row], path: Path) -> tuple[dict[str, Split], list[str]]:
    if not rows:
        raise DataError(f"{path} has no rows.")
    classes = sorted({row.label for row in rows}, key=_numeric_first)
    index = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[_Row]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    return {
        split: Split([row.image for row in members], np.array([index[row.label] for row in members], dtype=np.int64))
        for split, members in splits.items()
    }, classes


def _numeric_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _image_source(value: Any, folder: Path, where: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    file = folder / str(value)
    if not value or not file.is_file():
        raise DataError(f"{where}: there is no image {str(file)[:300]}.")
    return file


# libraries --------------------------------------------------------------------------------------------------


def _read_hub(name: str, wish: Wish) -> Found:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"Loading hf:{name}") from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such data set, a script it refuses to run
        raise DataError(f"hf:{name} cannot be loaded: {error}") from error
    tables = {SPLITS[split]: table for split, table in loaded.items() if split in SPLITS}
    dense = hub_targets(name, tables, wish, lambda table, column: _LazyImages(_undecoded(table, column), column))
    if dense is not None:
        return dense
    splits, classes = {}, []
    for split, table in tables.items():
        image = next((c for c, f in table.features.items() if isinstance(f, datasets.Image)), None)
        label = next((c for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise DataError(f"hf:{name} has no image column and class label; it has: {', '.join(table.features)}.")
        classes = list(table.features[label].names)
        splits[split] = Split(_LazyImages(_undecoded(table, image), image), np.array(table[label], dtype=np.int64))
    return _labelled(splits, classes)


def _undecoded(table: Any, column: str) -> Any:
    import datasets

    return table.cast_column(column, datasets.Image(decode=False))


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

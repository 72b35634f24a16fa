"""Data sets of torch and of the Hugging Face hub: objects with random access or streams, DataLoaders, and `hf:NAME`.

A `DataLoader` with the usual sampler and collation is read as its data set, any other one as a stream of its batches' samples.
Of `datasets`, an image column with a class label is a classification task, with lists of labels one of several labels, two
image columns a segmentation task, and a column `objects` of `bbox` and `category` a detection task. Images are decoded when
they are asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from modelpatch.data.samples import (
    LABEL_KEYS,
    SampleForm,
    find_kind,
    name_classes,
    naming,
    split_item,
    to_label,
    to_mask,
)
from modelpatch.data.seeding import seeded
from modelpatch.data.sources import base
from modelpatch.data.sources.column_names import check_column
from modelpatch.data.sources.columns import Table, Targets, find_targets, make_vectors
from modelpatch.data.sources.hub_classes import encoded_images, name_splits, read_class_tables
from modelpatch.data.sources.labels import UNLABELLED, name_at
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import Scene, SceneObject, make_detection
from modelpatch.data.sources.values import BINARY, PROBED, make_segmentation, read_classes
from modelpatch.data.splits import DatasetSplit, Split, StreamSplit
from modelpatch.errors import DataError, require, warn_caller
from modelpatch.tasks.detection import Boxes
from modelpatch.tasks.kind import Target, kind_of
from modelpatch.tasks.segmentation import IGNORED, PixelMask, read_values
from modelpatch.tasks.vector import Vector

PREFIX = "hf:"
SAVED = ("state.json", "dataset_info.json")  # files of a saved table
NO_LABEL = -1
FIRST_PICTURES = ("image", "img", "pixel_values")


def is_dataset(source: Any) -> bool:
    """Return True for a data set object, or a mapping of some by split."""
    if isinstance(source, Mapping):
        return bool(source) and all(is_dataset(one) for one in source.values())
    return isinstance(source, torch_data.Dataset | torch_data.DataLoader) or _is_hub(source)


def describe(source: Any) -> str:
    """A name for a data set: its builder's, its folder's, or its class."""
    source = source.dataset if isinstance(source, torch_data.DataLoader | torch_data.Subset) else source
    root = getattr(source, "root", None)
    named = getattr(source, "builder_name", None) or (str(root).rstrip("/").rsplit("/", 1)[-1] if root else None)
    return str(named or type(source).__name__)


def name_of(source: Any) -> str:
    """A name for the task of a data set, as `describe` has it, but never a split's where the folder above has another."""
    name = describe(source)
    root = getattr(source, "root", None) or getattr(getattr(source, "dataset", None), "root", None)
    return base.name_place(Path(root).resolve()) if root and name in base.SPLITS else name


def read_datasets(
    splits: Mapping[str, Any], options: base.SourceOptions, workers: int | None, length: int | None
) -> base.Found:
    """The task of data sets by split. Raises `DataError` for objects, samples and labels that cannot be read."""
    if unknown := [split for split in splits if split not in base.SPLITS]:
        raise DataError(f"there is no split {unknown[0]!r}; expected {', '.join(base.SPLITS)}.")
    splits = {base.SPLITS[split]: one for split, one in splits.items()}
    if "train" not in splits:
        raise DataError(f"there is no training split, only {', '.join(splits)}. Give one named train.")
    source = describe(splits["train"])
    if _are_tables(splits.values(), options):
        return _with_names(read_tables(splits, options, source), options, workers)
    given = {**options.columns, **({} if options.separator is None else {"separator": options.separator})}
    if given:
        name, value = next(iter(given.items()))
        raise DataError(f"{source} is no table, for which {name}={value!r} is. Leave it out.")
    opened, remarks = {split: _open(one) for split, one in splits.items()}, Remarks()
    train = opened["train"][0]
    kind = options.kind
    if kind is None:
        with seeded(0):
            first = list(islice(_items(train), 1))
        if not first:
            raise DataError(f"{source} holds no samples.")
        with naming(source, 0):
            kind = find_kind(split_item(first[0])[1])
    layout = f"data set {type(train).__name__} of Python"
    if kind_of(kind).target is None:
        opened = _without_unlabelled(opened, source, remarks)
        train = opened["train"][0]
    classes, table = _find_classes(train, source, kind, options)
    made: dict[str, Split] = {}
    for split, (data, default) in opened.items():
        own = _names_of(data) or classes  # its indices count its own names, a subset of the task's in another order
        names = own if own != classes and set(own) <= set(classes) else None
        form = SampleForm(describe(splits[split]), classes, names, kind, table)
        count = default if workers is None else workers
        if _is_stream(data):
            size = length if split == "train" and length is not None else length_hint(data, -1)
            made[split] = StreamSplit(data, form, size if size >= 0 else None, workers=count)
        elif form.target is not None and not form.dense:
            made[split] = DatasetSplit(data, form, vectors=_known_vectors(data, form), workers=count)
        else:
            made[split] = DatasetSplit(data, form, labels=_known_labels(data, form), workers=count)
        with seeded(0):  # a sample that cannot be read is an error before anything is trained
            next(made[split].some(1), None)
    return base.Found(kind, made, classes, names_from_user=True, layout=layout, **remarks.facts)


def _without_unlabelled(opened: Mapping[str, Any], source: str, remarks: Remarks) -> dict[str, tuple[Any, int | None]]:
    """The data sets without the samples that they list with -1, which are counted; beside one class alone it stays."""
    listed = {split: [] if _is_stream(data) else _listed(data) or [] for split, (data, _) in opened.items()}
    lost = {split: [row for row, label in enumerate(own) if label == NO_LABEL] for split, own in listed.items()}
    for split, first in ((split, rows[0]) for split, rows in lost.items() if rows):
        with seeded(0), naming(source, first):
            if to_label(split_item(opened[split][0][first])[1]) != NO_LABEL:  # what is listed is not what is read
                return dict(opened)
    if not any(lost.values()) or len({*listed["train"]} - {NO_LABEL}) < 2:
        return dict(opened)
    kept = {}
    for split, (data, workers) in opened.items():
        rows = [row for row, label in enumerate(listed[split]) if label != NO_LABEL]
        if lost[split] and not rows:
            remarks.note(f"the split {split} has no label in any row, and is left out")
        else:
            kept[split] = (torch_data.Subset(data, rows) if lost[split] else data, workers)
    count = sum(map(len, lost.values()))
    remarks.pass_over(UNLABELLED, *(f"{split}, row {row}" for split, own in lost.items() for row in own))
    warn_caller(f"{source}: {count:,} samples have the label -1, which stands for no label, and are left out.")
    return kept


def _known_vectors(data: Any, form: SampleForm) -> list[Target] | None:
    """The targets that a data set lists, where the first, middle and last sample agree with them."""
    listed = _listed_raw(data)
    if listed is None:
        return None
    vectors: list[Any] = []
    for row, value in enumerate(listed):
        with naming(form.source, row):
            vectors.append(form.read_target(value))
    for row in {0, len(vectors) // 2, len(vectors) - 1}:
        with seeded(0, row):
            target: Any = form.read(data[row], row)[1]
        if target.content() != vectors[row].content():
            return None
    return vectors


def _is_hub(source: Any) -> bool:
    modules = {base.__module__.split(".")[0] for base in type(source).__mro__}
    return "datasets" in modules and hasattr(source, "features")


def _are_tables(splits: Iterable[Any], options: base.SourceOptions) -> bool:
    """Return True for tables of `datasets` whose columns say what they are, without a transform or format of the user's."""
    splits = list(splits)
    if not all(_is_hub(one) and hasattr(one, "__len__") and one.format["type"] is None for one in splits):
        return False
    features = splits[0].features
    pictures, label = find_columns(features)
    said = label is not None or len(pictures) == 2 or "objects" in features or bool(options.columns)
    named = options.kind is not None and options.allow(Vector)
    return bool(pictures) and (said or named or bool(_find_lists(features)))


def _with_names(found: base.Found, options: base.SourceOptions, workers: int | None) -> base.Found:
    """The task of tables with the number of workers, and the class names that the user gives."""
    for split in found.splits.values():
        split.workers = workers
    if options.classes is None or found.names_from_user:
        return found
    count = options.classes if isinstance(options.classes, int) else len(options.classes)
    if count != len(found.classes):
        raise DataError(f"{count} classes were given; the data set has {len(found.classes)}.")
    names = found.classes if isinstance(options.classes, int) else options.classes
    return replace(found, classes=names, names_from_user=True)


def _open(source: Any) -> tuple[Any, int | None]:
    """The data set or stream to read, and its number of workers. Raises `DataError` for other objects."""
    if isinstance(source, torch_data.DataLoader):
        sampler, batches = source.sampler, type(source.batch_sampler) is torch_data.BatchSampler
        drawn = type(sampler) is torch_data.RandomSampler and not sampler.replacement
        whole = drawn or type(sampler) is torch_data.SequentialSampler
        usual = source.collate_fn is torch_data.default_collate and batches and whole
        if usual and not isinstance(source.dataset, torch_data.IterableDataset):
            return source.dataset, source.num_workers or None
        return UnbatchedLoader(source), 0
    if isinstance(source, torch_data.IterableDataset) or (_is_hub(source) and not hasattr(source, "__len__")):
        return source, None
    if isinstance(source, type):
        raise DataError(f"{source.__name__} is a class; expected an instance, such as {source.__name__}(...).")
    if not isinstance(source, str | bytes | Mapping) and hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return source, None
    raise DataError(
        f"unsupported data set {source!r:.200} of type {type(source).__name__}; expected a torch Dataset, IterableDataset or "
        "DataLoader of (image, label), or a data set of `datasets`. A folder or file is read by load_task."
    )


class UnbatchedLoader:
    """The samples of a DataLoader's batches, one by one."""

    def __init__(self, loader: torch_data.DataLoader[Any]) -> None:
        self.loader, self.dataset = loader, loader.dataset

    def __len__(self) -> int:
        return len(self.loader.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if self.loader.generator is not None:  # its own state would differ from run to run
            self.loader.generator.manual_seed(int(torch.randint(2**31, ()).item()))
        for batch in self.loader:
            images, labels = split_item(batch)
            if not hasattr(images, "__len__") or not hasattr(labels, "__len__") or len(images) != len(labels):
                raise DataError(
                    "the DataLoader's batches are no pairs of as many images as labels. Give its data set, or one whose "
                    "batches are (images, labels)."
                )
            yield from zip(images, labels, strict=True)


def _is_stream(data: Any) -> bool:
    return not hasattr(data, "__getitem__") or isinstance(data, torch_data.IterableDataset)


def _items(data: Any) -> Iterable[Any]:
    return data if _is_stream(data) else (data[row] for row in range(len(data)))


def _find_classes(
    data: Any, source: str, kind: str, options: base.SourceOptions
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The class names, and the table of mask values for masks."""
    names = options.classes
    if isinstance(names, int):
        names = tuple(map(str, range(names)))
    names = names or _names_of(data)
    if names is None and kind_of(kind).dense:
        raise DataError(f"{source} names no classes for its masks or boxes. Give classes=[...].")
    if kind_of(kind).target is PixelMask:
        classes, table = read_classes(options, names or (), source)
        if len(classes) == len(BINARY) and options.ignore is None and _shows_black_and_white(data):
            warn_caller(
                f"masks of {source} hold 0 and 255 alone: 255 is {classes[1]!r}. It is ignored with ignore=255."
            )
            table[IGNORED] = 1
        return tuple(classes), table
    if names is None and kind_of(kind).target is not None:
        listed = _listed_raw(data)
        values = (split_item(item)[1] for item in _items(data)) if listed is None else iter(listed)
        names = kind_of(kind).name_classes(values)
        if names is None:
            raise DataError(f"{source} names none of its {kind_of(kind).nouns}. Give them: classes=[...].")
        if listed is None and _is_stream(data):
            warn_caller(f"{source} was read once to find its {kind_of(kind).nouns}. Give classes=[...] to avoid this.")
    if names is None:
        names = name_classes(_listed(data) or [to_label(split_item(item)[1]) for item in _items(data)])
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        warn_caller(
            f"{source} names no classes; its labels make {len(names)} of them: {shown}. Name them with classes=[...]."
        )
    return tuple(names), None


def _shows_black_and_white(data: Any) -> bool:
    """Return True where the first masks hold nothing but 0 and 255."""
    with seeded(0):
        masks = [to_mask(split_item(item)[1]) for item in islice(_items(data), PROBED)]
    values = {int(value) for mask in masks for value in np.unique(read_values(mask))}
    return IGNORED in values and values <= {0, IGNORED}


def _names_of(data: Any) -> tuple[str, ...] | None:
    """The class names that a data set lists, through subsets and concatenations."""
    if isinstance(data, torch_data.Subset | UnbatchedLoader):
        return _names_of(data.dataset)
    if isinstance(data, torch_data.ConcatDataset):
        found = {_names_of(part) for part in data.datasets}
        return found.pop() if len(found) == 1 else None
    if isinstance(features := getattr(data, "features", None), Mapping):
        inner: list[Any] = [getattr(one, "feature", one) for one in features.values()]
        return next((tuple(one.names) for one in inner if hasattr(one, "names")), None)
    names = getattr(data, "classes", None)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return tuple(names) or None
    return None


def _listed(data: Any) -> Sequence[int | str] | None:
    """The classes that a data set lists without reading images; None for one that does not."""
    listed = _listed_raw(data)
    try:
        return None if listed is None else [to_label(label) for label in listed]
    except DataError:
        return None


def _listed_raw(data: Any) -> Sequence[Any] | None:
    """The labels that a data set lists without reading images; None for one that does not."""
    if isinstance(data, torch_data.Subset):
        whole = _listed_raw(data.dataset)
        return None if whole is None else [whole[index] for index in data.indices]
    if isinstance(data, torch_data.ConcatDataset):
        parts = [_listed_raw(part) for part in data.datasets]
        return None if None in parts else [label for part in parts if part is not None for label in part]
    if isinstance(data, torch_data.TensorDataset):
        labels: Any = data.tensors[1] if len(data.tensors) > 1 else None
    elif _is_hub(data) and hasattr(data, "column_names") and hasattr(data, "__getitem__"):
        column = next((key for key in LABEL_KEYS if key in data.column_names), None)
        labels = None if column is None else data.with_format(None)[column]
    elif getattr(data, "target_transform", None) is not None:
        return None
    else:
        labels = getattr(data, "targets", None)
        labels = getattr(data, "labels", None) if labels is None else labels
    if labels is None or not hasattr(labels, "__len__") or len(labels) != len(data) or not len(labels):
        return None
    return list(labels)


def _known_labels(data: Any, form: SampleForm) -> np.ndarray | None:
    """The class indices that a data set lists, where the first, middle and last sample agree with them."""
    listed = None if form.dense else _listed(data)
    if listed is None:
        return None
    labels = np.zeros(len(listed), dtype=np.int64)
    for row, label in enumerate(listed):
        with naming(form.source, row):
            labels[row] = form.read_label(label)
    for row in {0, len(labels) // 2, len(labels) - 1}:
        with seeded(0, row):
            if form.read(data[row], row)[1] != labels[row]:
                return None
    return labels


@base.register_source("hub")
class Hub(base.DataSource):
    """A data set that `datasets.load_dataset` finds."""

    has_columns = True

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str) and source.startswith(PREFIX)

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        datasets, name = require("datasets", "data", f"Loading {source}"), str(source).removeprefix(PREFIX)
        if is_saved(Path(name)):
            return Saved().read(name, options)
        try:
            loaded = datasets.load_dataset(name)
        except Exception as error:  # no network, no such data set, a script it refuses to run
            raise DataError(f"{source} cannot be loaded: {error}") from error
        return read_tables(loaded, options, source)


def is_saved(path: Path) -> bool:
    """Return True for a folder that `save_to_disk` of `datasets` wrote."""
    return (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in SAVED)


@base.register_source("saved")
class Saved(base.DataSource):
    """A folder that `save_to_disk` of `datasets` wrote, of one table or of several splits."""

    has_columns = True

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str | Path) and is_saved(Path(source))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        datasets = require("datasets", "data", f"Reading {source}")
        try:
            loaded = datasets.load_from_disk(str(source))
        except Exception as error:  # files that are gone or damaged
            raise DataError(f"{source} cannot be loaded as a saved data set: {error}") from error
        return read_tables(loaded if isinstance(loaded, Mapping) else {"train": loaded}, options, str(source))


def read_tables(loaded: Mapping[str, Any], options: base.SourceOptions, source: str) -> base.Found:
    """Tables of `datasets` by split as a task."""
    remarks = Remarks()
    tables = name_splits(loaded, remarks)
    if "train" not in tables:
        raise DataError(f"{source} has no training split, only {', '.join(map(str, loaded)) or 'none'}.")
    features = tables["train"].features
    pictures, label = find_columns(features)
    chosen = check_column(dict.fromkeys(features, ()), options.image_column, "image-column", source)
    pictures = pictures if chosen is None else [chosen, *(column for column in pictures if column != chosen)]
    label = check_column(dict.fromkeys(features, ()), options.label_column, "label-column", source) or label
    if options.split_column is not None:
        raise DataError(f"{source} has splits of its own, which split_column cannot name. Leave it out.")
    if pictures and "objects" in features and not options.columns and options.allow(Boxes):
        return _read_boxes(tables, pictures[0], source)
    if len(pictures) == 2 and label is None and not options.columns and options.allow(PixelMask):
        first, second = sorted(pictures, key=lambda column: column not in FIRST_PICTURES)
        pairs = {
            split: (encoded_images(table, first), encoded_images(table, second)) for split, table in tables.items()
        }
        return make_segmentation(pairs, options, options.names, source)
    if pictures and (found := _read_columns(tables, pictures, label, options, source)) is not None:
        return found
    return read_class_tables(tables, options, source, remarks)


def find_columns(features: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The columns of images, and the first one of class labels."""
    import datasets

    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return pictures, labels[0] if labels else None


def _find_lists(features: Mapping[str, Any]) -> list[str]:
    """The columns of lists of names or of class labels."""
    inner = {column: getattr(feature, "feature", None) for column, feature in features.items()}
    return [column for column, one in inner.items() if hasattr(one, "names") or getattr(one, "dtype", "") == "string"]


def _read_columns(
    tables: Mapping[str, Any], pictures: Sequence[str], label: str | None, options: base.SourceOptions, source: str
) -> base.Found | None:
    """A task of several labels or numbers; None where a column holds one class label a row, or no table says more."""
    features = next(iter(tables.values())).features
    lists = _find_lists(features)
    if label is not None and label not in lists and options.kind is None and options.separator is None:
        return None
    known = label if options.label_column is not None else next((key for key in LABEL_KEYS if key in features), None)
    named = known or (lists[0] if len(lists) == 1 else label)
    cells: dict[str, list[Any]] = {}
    for column, feature in features.items():
        if column in pictures:
            continue
        names, within = getattr(feature, "names", None), getattr(getattr(feature, "feature", None), "names", None)
        cells[column] = own = [cell for table in tables.values() for cell in table.with_format(None)[column]]
        if names:
            cells[column] = [None if cell is None or cell < 0 else name_at(names, cell, source) for cell in own]
        elif within:
            cells[column] = [None if cell is None else [name_at(within, one, source) for one in cell] for cell in own]
            if column == named and options.classes is None:
                options = replace(options, classes=tuple(within))
    starts = np.cumsum([0, *map(len, tables.values())])

    def place(number: int) -> str:
        split = int(np.searchsorted(starts, number, side="right")) - 1
        return f"{source}, {list(tables)[split]}, row {number - int(starts[split])}"

    found = find_targets(Table(source, cells, named, place), options)
    if not isinstance(found, Targets):
        return None
    images = [(split, image) for split, table in tables.items() for image in encoded_images(table, pictures[0])]
    return make_vectors(found, images)


def _read_boxes(tables: Mapping[str, Any], picture: str, source: str) -> base.Found:
    """Boxes are left, top, width, height, as the hub's data sets of objects have them."""
    scenes: dict[str, list[Scene]] = {}
    names: Sequence[str] | None = None
    try:
        for split, table in tables.items():
            feature = table.features["objects"]
            inner = getattr(feature, "feature", feature)
            category = (inner[0] if isinstance(inner, list) else inner)["category"]
            names = list(getattr(category, "feature", category).names)
            scenes[split] = []
            for image, row in zip(encoded_images(table, picture), table["objects"], strict=True):
                one = row if isinstance(row, dict) else {key: [own[key] for own in row] for key in ("bbox", "category")}
                pairs = zip(one["bbox"], one["category"], strict=True)
                objects = [
                    SceneObject(name_at(names, label, source), (x, y, x + w, y + h)) for (x, y, w, h), label in pairs
                ]
                scenes[split].append(Scene(image, objects))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{source}: its objects cannot be read ({error!r}). Expected a column `objects` of `bbox` (left, top, width, "
            "height) and `category` with names."
        ) from error
    return make_detection(scenes, names, source)

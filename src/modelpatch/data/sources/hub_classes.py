"""Classes of images in tables of `datasets`: with names or numbers alone, under any usual names of columns and splits."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.samples import order_name
from modelpatch.data.sources.base import Found, SourceOptions
from modelpatch.data.sources.column_names import LABEL_NAMES, check_column, find_by_name
from modelpatch.data.sources.labels import UNLABELLED, clean_name, is_missing, name_at
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.split_names import split_of
from modelpatch.data.splits import Lazy, Split
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification

PLAIN = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string", "large_string", "bool")


def name_splits(loaded: Mapping[str, Any], remarks: Remarks) -> dict[str, Any]:
    """The tables by split; of two of one split the one that is called as the split is, and others are counted."""
    found: dict[str, tuple[str, Any]] = {}
    for name, table in sorted(loaded.items(), key=lambda item: len(str(item[0]))):
        split = split_of(str(name))
        if split is None or split in found:
            remarks.pass_over("split that is not read", str(name))
        else:
            found[split] = (name, table)
    return {split: found[split][1] for split in ("train", "validation", "test") if split in found}


def list_columns(features: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The columns of images, and those of class labels, or without any those of numbers or words called as labels."""
    import datasets

    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = {name: () for name, feature in features.items() if getattr(feature, "dtype", None) in PLAIN}
    return pictures, labels or find_by_name(plain, LABEL_NAMES)


def choose_columns(features: Mapping[str, Any], options: SourceOptions, source: str) -> tuple[str, str]:
    """The column of images and the one of labels. Raises `DataError` for none, and for several that are not chosen from."""
    cells: Any = dict.fromkeys(features, ())
    pictures, labels = list_columns(features)
    for thing, option, found in (("images", "image_column", pictures), ("labels", "label_column", labels)):
        named = check_column(cells, getattr(options, option), option.replace("_", "-"), source)
        if named is not None:
            found[:] = [named]
        if len(found) > 1:
            raise DataError(
                f"{source} has several columns of {thing}: {', '.join(found)}. Name one: --{option.replace('_', '-')} "
                f"{found[0]} ({option}=...)."
            )
    if not pictures or not labels:
        raise DataError(f"{source} has no image column and class label; it has: {', '.join(features)}.")
    return pictures[0], labels[0]


def read_class_tables(tables: Mapping[str, Any], options: SourceOptions, source: str, remarks: Remarks) -> Found:
    """The task of tables by split. Rows without a label, or with -1 for it, are left out and counted."""
    image, label = choose_columns(next(iter(tables.values())).features, options, source)
    names = getattr(next(iter(tables.values())).features[label], "names", None)
    columns: dict[str, list[str | None]] = {}
    for split, table in tables.items():
        own = getattr(table.features.get(label), "names", None)
        if label not in table.features:
            remarks.pass_over("split without labels", split)
            continue
        columns[split] = [_name_of(value, own, source) for value in table.with_format(None)[label]]
    classes = list(
        names or sorted({name for own in columns.values() for name in own if name is not None}, key=order_name)
    )
    index = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, labels in columns.items():
        kept = [row for row, name in enumerate(labels) if name is not None]
        remarks.pass_over(UNLABELLED, *(f"{split}, row {row}" for row, name in enumerate(labels) if name is None))
        if not kept:
            remarks.note(f"the split {split} has no label in any row, and is left out")
            continue
        if unknown := {str(labels[row]) for row in kept} - index.keys():
            raise DataError(f"{source}: the split {split} has the class {min(unknown)!r}, which train has not.")
        table = tables[split] if len(kept) == len(labels) else tables[split].select(kept)
        numbers = np.array([index[str(labels[row])] for row in kept], dtype=np.int64)
        splits[split] = Split(encoded_images(table, image), numbers)
    if names is None:
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        remarks.note(f"the column {label} names no classes; its values make {len(classes)}: {shown}")
    return Found(Classification.name, splits, classes, **remarks.facts)


def encoded_images(table: Any, column: str) -> Sequence[ImageSource]:
    """The encoded images of a table's column, read when they are asked for."""
    import datasets

    return Lazy(table.cast_column(column, datasets.Image(decode=False)), partial(_cell, column))


def _cell(column: str, row: Mapping[str, Any]) -> ImageSource:
    return row[column].get("bytes") or Path(row[column]["path"])


def _name_of(value: Any, names: Sequence[str] | None, source: str) -> str | None:
    """The class of a value, None where it has none."""
    if is_missing(value) or (not isinstance(value, str | bool) and value == -1):
        return None
    if names is None or isinstance(value, str):
        return clean_name(str(value))
    return name_at(names, value, source)

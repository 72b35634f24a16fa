"""`hf:NAME`: a data set of the Hugging Face hub, or a local one, through `datasets`.

An image column with a class label is a classification task, two image columns a segmentation task, and a column `objects`
of `bbox` and `category` a detection task. Images are decoded when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.sources.base import SPLITS, DataSource, Found, SourceOptions, register_source
from modelpatch.data.sources.masks import make_segmentation
from modelpatch.data.sources.scenes import Scene, check_corners, make_detection
from modelpatch.data.splits import Lazy, Split
from modelpatch.errors import DataError, MissingExtraError
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.detection import Boxes
from modelpatch.tasks.segmentation import PixelMask

PREFIX = "hf:"
FIRST_PICTURES = ("image", "img", "pixel_values")


@register_source("hub")
class Hub(DataSource):
    """A data set that `datasets.load_dataset` finds."""

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str) and source.startswith(PREFIX)

    def read(self, source: Any, options: SourceOptions) -> Found:
        try:
            import datasets
        except ImportError:
            raise MissingExtraError("datasets", "data", f"Loading {source}") from None
        try:
            loaded = datasets.load_dataset(str(source).removeprefix(PREFIX))
        except Exception as error:  # no network, no such data set, a script it refuses to run
            raise DataError(f"{source} cannot be loaded: {error}") from error
        return read_tables(loaded, options, source)


def read_tables(loaded: Mapping[str, Any], options: SourceOptions, source: str) -> Found:
    """Tables of `datasets` by split as a task."""
    tables = {SPLITS[split]: table for split, table in loaded.items() if split in SPLITS}
    features = next(iter(tables.values())).features if tables else {}
    pictures, label = find_columns(features)
    if pictures and "objects" in features and options.allow(Boxes):
        return _read_boxes(tables, pictures[0], source)
    if len(pictures) == 2 and label is None and options.allow(PixelMask):
        first, second = sorted(pictures, key=lambda column: column not in FIRST_PICTURES)
        pairs = {
            split: (encoded_images(table, first), encoded_images(table, second)) for split, table in tables.items()
        }
        names = options.classes if isinstance(options.classes, tuple) else None
        return make_segmentation(pairs, options, names, source)
    splits, classes = {}, []
    for split, table in tables.items():
        pictures, label = find_columns(table.features)
        if not pictures or label is None:
            raise DataError(f"{source} has no image column and class label; it has: {', '.join(table.features)}.")
        classes = list(table.features[label].names)
        splits[split] = Split(encoded_images(table, pictures[0]), np.array(table[label], dtype=np.int64))
    return Found(Classification.name, splits, classes)


def find_columns(features: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The columns of images, and the first one of class labels."""
    import datasets

    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return pictures, labels[0] if labels else None


def encoded_images(table: Any, column: str) -> Sequence[ImageSource]:
    """The encoded images of a table's column, read when they are asked for."""
    import datasets

    return Lazy(table.cast_column(column, datasets.Image(decode=False)), partial(_cell, column))


def _cell(column: str, row: Mapping[str, Any]) -> ImageSource:
    return row[column].get("bytes") or Path(row[column]["path"])


def _read_boxes(tables: Mapping[str, Any], picture: str, source: str) -> Found:
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
                objects = [(names[label], check_corners((x, y, x + w, y + h)), False) for (x, y, w, h), label in pairs]
                scenes[split].append(Scene(image, objects))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{source}: its objects cannot be read ({error!r}). Expected a column `objects` of `bbox` (left, top, width, "
            "height) and `category` with names."
        ) from error
    return make_detection(scenes, names, source)

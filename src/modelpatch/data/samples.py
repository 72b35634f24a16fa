"""Samples of data sets, converted and checked: (image, label), (image, mask) or (image, boxes)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.detection import Boxes, Detection
from modelpatch.tasks.kind import Target, kind_of
from modelpatch.tasks.multilabel import Multilabel
from modelpatch.tasks.regression import Regression
from modelpatch.tasks.segmentation import PixelMask, Segmentation

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "x")
LABEL_KEYS = (
    "label",
    "labels",
    "tags",
    "class",
    "fine_label",
    "target",
    "targets",
    "y",
    "mask",
    Segmentation.name,
    "objects",
)
CHANNELS = (1, 3, 4)
ITEMS = "expected (image, label), or a dict with keys such as 'image' and 'label'"


@dataclass(frozen=True)
class SampleForm:
    """The conversion of a data set's items to samples of a task with `classes`.

    `names` are the data set's own class names where its indices count them; `table` (256,) maps the values of masks.
    """

    source: str
    classes: tuple[str, ...]
    names: tuple[str, ...] | None = None
    kind: str = Classification.name
    table: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def target(self) -> type[Target] | None:
        """The type of targets, None for class indices."""
        return kind_of(self.kind).target

    @property
    def dense(self) -> bool:
        """True where targets belong to places in the image."""
        return kind_of(self.kind).dense

    def list_strata(self, targets: Sequence[Target]) -> Sequence[int]:
        """The strata of targets, see `Kind.list_strata`."""
        return kind_of(self.kind).list_strata(targets)

    def read(self, item: Any, place: object) -> tuple[ImageSource, Target | int]:
        """The image and the class index or target of an item. Raises `DataError` that names the place."""
        with naming(self.source, place):
            image, target = split_item(item)
            return to_image(image), self.read_target(target)

    def read_target(self, value: Any) -> Target | int:
        """The class index or target that a label stands for."""
        if self.target is None:
            return self.read_label(value)
        if self.table is not None:
            return PixelMask(to_mask(value), self.table)
        if self.target is not Boxes:
            return kind_of(self.kind).read_target(value, self.classes)
        boxes, last = to_boxes(value), len(self.classes) - 1
        if wrong := [label for label in boxes.labels.tolist() if not 0 <= label <= last]:
            raise DataError(f"a box has the label {wrong[0]}; expected 0 to {last}.")
        return boxes

    def read_label(self, value: Any) -> int:
        """The class index of a label."""
        label = to_label(value)
        if isinstance(label, int):
            names = self.names or self.classes
            if not 0 <= label < len(names):
                hint = " Leave samples without a label out, such as with a filter." if label == -1 else ""
                raise DataError(f"the label is {label}; expected 0 to {len(names) - 1} for {len(names)} classes.{hint}")
            if self.names is None:
                return label
            label = names[label]
        if label not in self.classes:
            raise DataError(f"the label is {label!r}; expected one of: {', '.join(self.classes)[:300]}.")
        return self.classes.index(label)

    def read_targets(self, items: Iterable[Any]) -> list[Any]:
        """The class index or target of every item, 0 where targets are dense."""
        return [0 if self.dense else self.read_target(split_item(item)[1]) for item in items]


@contextmanager
def naming(source: str, place: object) -> Iterator[None]:
    """Add the place of a sample to a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}, sample {place}: {error}") from error


def split_item(item: Any) -> tuple[Any, Any]:
    """The image and the label of an item."""
    if isinstance(item, Mapping):
        image, label = (next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
        if image is None or label is None:
            raise DataError(f"it has the keys {', '.join(map(str, item))[:300]}; {ITEMS}.")
        return item[image], item[label]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise DataError(f"it is a {type(item).__name__}; {ITEMS}.")


def to_image(value: Any) -> ImageSource:
    """The image as PIL, uint8 array (H, W[, C]), path or bytes, from one of these or a tensor (C, H, W) or (H, W).

    Arrays (H, W, C) of other channels than 1, 3 and 4 stay as they are, for networks of as many.

    Raises `DataError` for other values than uint8, bool, and floats in [0, 1].
    """
    if isinstance(value, Mapping):  # as `datasets` keeps an image that is not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image | str | Path | bytes):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        array = value.permute(1, 2, 0).numpy() if value.ndim == 3 and value.shape[0] in CHANNELS else value.numpy()
    elif isinstance(value, np.ndarray):
        array = value
        if _has_bands(array):
            return np.ascontiguousarray(array)
        if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
            array = array.transpose(1, 2, 0)
    else:
        raise DataError(f"its image is a {type(value).__name__}; expected a PIL image, an array or a tensor.")
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise DataError(f"its image has the shape {tuple(value.shape)}; expected (C, H, W) or (H, W[, C]).")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise DataError(
                f"its image has values from {array.min():.3g} to {array.max():.3g}; expected floats in [0, 1]. Leave "
                "Normalize out of the transform: the patch's own preprocessing normalises."
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise DataError(f"its image is of {array.dtype}; expected uint8, or floats in [0, 1].")
    return np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _has_bands(array: np.ndarray) -> bool:
    """True for a picture (H, W, C) of more channels than a Pillow image has, which networks of as many take."""
    return array.ndim == 3 and array.shape[2] not in CHANNELS and 1 < array.shape[2] < min(array.shape[:2])


def to_label(value: Any) -> int | str:
    """The class index or name. Raises `DataError` for other values."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bool | int | str):
        return value if isinstance(value, str) else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else f" {value!r}"[:80]
    raise DataError(
        f"its label is a {type(value).__name__}{shape}; expected a class index or class name. Use argmax for vectors of "
        f"probabilities, kind={Segmentation.name!r} for masks."
    )


def to_mask(value: Any) -> ImageSource:
    """A mask as a picture or uint8 array (H, W)."""
    if isinstance(value, Image.Image | str | Path | bytes):
        return value
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "uib" or not array.size or array.min() < 0 or array.max() > 255:
        raise DataError(
            f"its mask is of {array.dtype} and shape {array.shape}; expected whole numbers 0 to 255 (H, W)."
        )
    return array.astype(np.uint8)


def to_boxes(value: Any) -> Boxes:
    """The boxes of a dict of `boxes` (N, 4), left, top, right, bottom in pixels or tv_tensors, and `labels` (N,)."""
    if not isinstance(value, Mapping) or "boxes" not in value or "labels" not in value:
        raise DataError("its target has no boxes; expected a dict of 'boxes' (N, 4) and 'labels' (N,).")
    boxes = value["boxes"]
    if hasattr(boxes, "format"):
        from torchvision.transforms.v2.functional import convert_bounding_box_format

        boxes = convert_bounding_box_format(boxes, new_format="xyxy") if boxes.format.name != "XYXY" else boxes
    corners = np.asarray(torch.as_tensor(boxes).cpu(), dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(torch.as_tensor(value["labels"]).cpu(), dtype=np.int64).reshape(-1)
    if len(labels) != len(corners):
        raise DataError(f"it has {len(corners)} boxes and {len(labels)} labels; expected one label for each box.")
    if not np.isfinite(corners).all() or (corners[:, 2:] <= corners[:, :2]).any():
        raise DataError("it has a box without area; expected left < right and top < bottom.")
    difficult = np.asarray(torch.as_tensor(value.get("difficult", np.zeros(len(labels)))).cpu(), dtype=bool)
    return Boxes(corners, labels, difficult.reshape(-1))


def find_kind(target: Any) -> str:
    """The kind of task that such a target belongs to. Raises `DataError` for one that could belong to several."""
    if isinstance(target, Mapping):
        return Detection.name
    if isinstance(target, Image.Image):
        return Segmentation.name
    if isinstance(target, list | tuple | set | frozenset):
        if all(isinstance(one, str) for one in target):
            return Multilabel.name
        target = np.asarray(list(target), dtype=object) if not np.ndim(list(target)) > 1 else target
    if np.ndim(target) >= 2:
        return Segmentation.name
    number = target.item() if np.ndim(target) == 0 and hasattr(target, "item") else target
    if np.ndim(target) == 1 or (isinstance(number, float) and not number.is_integer()):
        found = f"a vector of {len(target)} numbers" if np.ndim(target) == 1 else f"the number {number:g}"
        vector = f"kind={Multilabel.name!r} for several labels an image, " if np.ndim(target) == 1 else ""
        raise DataError(
            f"its label is {found}. Say what it is: {vector}kind={Regression.name!r} for numbers to predict; for classes "
            "give an index (argmax of probabilities) or a name."
        )
    return Classification.name


def name_classes(labels: Sequence[int | str]) -> tuple[str, ...]:
    """The class names of labels: names in order, or the numbers from 0 to the largest index."""
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted({str(label) for label in labels}, key=order_name))
    if any(isinstance(label, str) for label in labels):
        raise DataError("some labels are class names and others class indices; expected one of the two.")
    return tuple(map(str, range(int(max(labels, default=-1)) + 1)))


def order_name(name: str) -> tuple[int, int, str]:
    """A key that sorts names of numbers as numbers, before other names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)

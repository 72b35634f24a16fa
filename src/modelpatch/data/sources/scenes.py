"""Images with objects, as sources of boxes collect them, and the detection task made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.sources.base import Found
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Boxes, Detection


@dataclass(frozen=True)
class Scene:
    """An image with its objects: (class, corners, difficult)."""

    image: ImageSource
    objects: Sequence[tuple[str, tuple[float, ...], bool]]


def make_detection(scenes: Mapping[str, Sequence[Scene]], names: Sequence[str] | None, source: str) -> Found:
    """A task whose classes are `names`, or those of its objects. Raises `DataError` for an object of another class."""
    present = sorted({name for own in scenes.values() for scene in own for name, _, _ in scene.objects})
    if not present:
        raise DataError(f"{source} has no objects in any of its images.")
    classes = present if names is None else list(names)
    if unknown := [name for name in present if name not in classes]:
        raise DataError(f"{source} has objects of the class {unknown[0]!r}, which its list of classes lacks.")
    index = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, own in scenes.items():
        boxes = [
            Boxes(
                np.array([corners for _, corners, _ in scene.objects], dtype=np.float64).reshape(-1, 4),
                np.array([index[name] for name, _, _ in scene.objects], dtype=np.int64),
                np.array([difficult for _, _, difficult in scene.objects], dtype=bool),
            )
            for scene in own
        ]
        splits[split] = Split([scene.image for scene in own], np.zeros(len(own), dtype=np.int64), boxes)
    return Found(Detection.name, splits, classes)


def check_corners(corners: tuple[float, ...]) -> tuple[float, ...]:
    """Corners left, top, right, bottom of a box that has an area. Raises ValueError for others."""
    finite = len(corners) == 4 and all(map(math.isfinite, corners))
    if not finite or corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise ValueError(f"the box {corners} has no area")
    return corners

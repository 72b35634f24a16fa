"""Pictures with objects, as annotations of any layout describe them, made a detection task.

Boxes are turned with their picture and cut at its edges; what is passed over or changed is counted.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, ImageSource
from modelpatch.data.sources.base import Found
from modelpatch.data.sources.headers import Corners, Orientation, Size, find_stored, read_header
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Boxes, Detection

BEYOND = 0.5  # pixels that a box may reach beyond its picture without a word: rounding
NO_AREA = "box without area"
OUTSIDE = "box outside of its picture"
UNLISTED = "picture that no annotation lists"


class SceneObject(NamedTuple):
    """An object: its class, its corners in pixels or in shares of the picture's sides, and if it is hard to find."""

    name: str
    corners: Corners
    difficult: bool = False


class Scene(NamedTuple):
    """A picture with its objects. `size` is the one that the annotations record; `relative` corners are shares of sides."""

    image: ImageSource
    objects: Sequence[SceneObject]
    size: Size | None = None
    relative: bool = False


def make_detection(
    scenes: Mapping[str, Sequence[Scene]],
    names: Sequence[str] | None,
    source: str,
    remarks: Remarks | None = None,
    *,
    names_from_user: bool = False,
) -> Found:
    """A task whose classes are `names`, or those of its objects. Raises `DataError` for an object of another class."""
    remarks = remarks or Remarks()
    root = Path(source)
    placed = _place(scenes, root, remarks)
    counts = Counter(one.name for own in placed.values() for objects in own for one in objects)
    if not counts:
        raise DataError(f"{source} has no objects in any of its images.")
    classes = sorted(counts) if names is None else list(names)
    if unknown := sorted(counts.keys() - set(classes)):
        raise DataError(f"{source} has objects of the class {unknown[0]!r}, which its list of classes lacks.")
    remarks.note("classes have no box", [name for name in classes if name not in counts], "class has no box")
    index = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, own in placed.items():
        boxes = [
            Boxes(
                np.array([one.corners for one in objects], dtype=np.float64).reshape(-1, 4),
                np.array([index[one.name] for one in objects], dtype=np.int64),
                np.array([one.difficult for one in objects], dtype=bool),
            )
            for objects in own
        ]
        splits[split] = Split([one.image for one in scenes[split]], np.zeros(len(own), dtype=np.int64), boxes)
    _count_unlisted(scenes, root, remarks)
    return Found(Detection.name, splits, classes, names_from_user, **remarks.facts)


def _place(
    scenes: Mapping[str, Sequence[Scene]], root: Path, remarks: Remarks
) -> Mapping[str, list[list[SceneObject]]]:
    """The objects of every picture, in pixels of the picture as it is shown, cut at its edges."""
    flat = [scene for own in scenes.values() for scene in own]
    known = [read_header(scene.image) for scene in flat]
    headers = [header or Orientation(scene.size or (0, 0)) for header, scene in zip(known, flat, strict=True)]
    stored, undecided = find_stored(headers, [scene.size for scene in flat])
    remarks.note(
        f"pictures are turned by EXIF, and nothing says if their boxes are; read as boxes of the picture as it is "
        f"{'stored' if undecided and stored[undecided[0]] else 'shown'}",
        [name_of(flat[row].image, root) for row in undecided if flat[row].objects],
    )
    turned, resized, rows = list[str](), list[str](), iter(range(len(flat)))
    clipped = list[str]()
    placed: dict[str, list[list[SceneObject]]] = {}
    for split, own in scenes.items():
        placed[split] = []
        for scene in own:
            row = next(rows)
            header, name = headers[row], name_of(scene.image, root)
            if scene.relative and known[row] is None:
                raise DataError(f"{root / name} cannot be read as an image, so that its boxes have no size in pixels.")
            if stored[row]:
                turned.append(name)
            elif known[row] and scene.size not in (None, header.size, header.stored):
                resized.append(f"{name} ({_times(scene.size)} for {_times(header.size)})")
            objects = []
            for one in scene.objects:
                if found := _cut(one, scene, header, stored[row], name, remarks, clipped):
                    objects.append(found)
            placed[split].append(objects)
    remarks.note("pictures are turned by EXIF, and their boxes with them", turned)
    remarks.note("pictures have another size than their annotations say", resized)
    beyond = "beyond the picture and {} cut at its edge"
    remarks.note(f"boxes reach {beyond.format('are')}", clipped, f"box reaches {beyond.format('is')}")
    return placed


def _cut(
    one: SceneObject, scene: Scene, header: Orientation, stored: bool, name: str, remarks: Remarks, clipped: list[str]
) -> SceneObject | None:
    """The object with a box inside of its picture; None, counted, for one that has no area there."""
    corners, (width, height) = one.corners, header.stored if stored else header.size
    place = f"{one.name} in {name}"
    if not all(map(math.isfinite, corners)):
        raise DataError(f"{name}: a box of {one.name} has the corners {corners}; expected finite numbers.")
    if scene.relative:
        corners = (corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        remarks.pass_over(NO_AREA, place)
        return None
    if width and height:
        inner = (max(corners[0], 0.0), max(corners[1], 0.0), min(corners[2], width), min(corners[3], height))
        if inner[2] <= inner[0] or inner[3] <= inner[1]:
            remarks.pass_over(OUTSIDE, place)
            return None
        if max(abs(a - b) for a, b in zip(inner, corners, strict=True)) > BEYOND:
            clipped.append(place)
        corners = inner
    return one._replace(corners=header.turn_box(corners) if stored else corners)


def _count_unlisted(scenes: Mapping[str, Sequence[Scene]], root: Path, remarks: Remarks) -> None:
    """Count the pictures beside listed ones that no split lists."""
    listed = {scene.image for own in scenes.values() for scene in own if isinstance(scene.image, Path)}
    for folder in sorted({file.parent for file in listed}):
        beside = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
        unlisted = [file for file in beside if file not in listed and not file.name.startswith(".")]
        remarks.pass_over(UNLISTED, *(name_of(file, root) for file in unlisted))


def name_of(image: ImageSource, root: Path) -> str:
    """The name of a picture for messages, below the folder of its data set where it lies there."""
    if not isinstance(image, str | Path):
        return "a picture in memory"
    return str(Path(image).relative_to(root)) if Path(image).is_relative_to(root) else str(image)


def _times(size: Size | None) -> str:
    return "x".join(map(str, size or ()))

"""Label Studio's own JSON: a list of tasks with their results, in hundredths of the picture's sides, or JSON-MIN.

Its exports as COCO, VOC and YOLO are read as those.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources import base
from modelpatch.data.sources.annotated import AnnotatedPictures, NamedPictures, box_around, points_of, turned_box
from modelpatch.data.sources.documents import Fields, read_objects
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.labels import check_names, make_classification
from modelpatch.data.sources.picture_files import UPLOADED
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import Scene, SceneObject
from modelpatch.tasks.classification import Classification

FORM = "an export of Label Studio"
BOXES, OUTLINES, ELLIPSES = "rectanglelabels", "polygonlabels", "ellipselabels"
SHAPES = (BOXES, OUTLINES, ELLIPSES)
LISTED = re.compile(rb"\s*\[\s*\{")


@base.register_source("label-studio")
class LabelStudioBoxes(AnnotatedPictures):
    """Label Studio's boxes, and the boxes around its outlines."""

    def begins(self, text: bytes) -> bool:
        return LISTED.match(text) is not None and any(f'"{shape}"'.encode() in text for shape in SHAPES)

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        for task in read_objects(file, FORM):
            objects = []
            sizes = set[tuple[int, int]]()
            for result in _results(task):
                value = Fields(result.value("value"), file, *result.place, "value") if "value" in result else result
                shape = next((one for one in SHAPES if one in value), None)
                if shape is None:
                    if any(name.endswith("labels") for name in value.values):
                        value.fail(f"it is none of {', '.join(SHAPES)}. Export brushes and key points as PNG or COCO")
                    continue
                if shape != BOXES:
                    pictures.outlines.append(f"{shape} in task {task.place[-1]}")
                width, height = (_side(result, value, name) for name in ("original_width", "original_height"))
                sizes.add((width, height))
                corners = _corners(shape, value, width / 100, height / 100)
                objects += [SceneObject(name, corners) for name in _texts(value, shape)]
            size = sizes.pop() if len(sizes) == 1 else None
            yield Scene(_picture_of(task, pictures), objects, size)


@base.register_source("label-studio-choices")
class LabelStudioChoices(AnnotatedPictures):
    """Label Studio's choices: one class a picture."""

    kind = Classification.name

    def begins(self, text: bytes) -> bool:
        if LISTED.match(text) is None or any(f'"{shape}"'.encode() in text for shape in SHAPES):
            return False
        return b'"choices"' in text and b'"annotations"' in text

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        pictures, pairs = NamedPictures(path if path.is_dir() else path.parent), []
        for file in filter(self.is_own, self.files(path)):
            for task in read_objects(file, FORM):
                chosen = [
                    name
                    for result in _results(task)
                    if "value" in result and "choices" in (value := Fields(result.value("value"), file, *result.place))
                    for name in _texts(value, "choices")
                ]
                if len(chosen) > 1:
                    task.fail(f"it has the choices {', '.join(chosen)[:200]}; expected one. Export several as CSV")
                if chosen:
                    pairs.append((_picture_of(task, pictures), chosen[0]))
                else:
                    remarks.pass_over("task without a choice", f"{file.name}, task {task.place[-1]}")
        members = {"train": pairs}
        return make_classification(members, remarks, check_names(members, options.names, str(source)))

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        """Nothing: it has no boxes."""
        return iter(())


def _results(task: Fields) -> Iterator[Fields]:
    """The results of a task's first annotation that was not skipped, or those of JSON-MIN."""
    if "annotations" in task or "completions" in task:
        name = "annotations" if "annotations" in task else "completions"
        for annotation in task.all(name):
            if not annotation.values.get("was_cancelled") and "result" in annotation:
                yield from annotation.all("result")
                return
        return
    for name, value in task.values.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield from task.all(str(name))


def _picture_of(task: Fields, pictures: NamedPictures) -> Path:
    """The picture of a task, which may have been uploaded, or lie at a URL."""
    data = task.values.get("data")
    values: Mapping[str, Any] = data if isinstance(data, Mapping) else task.values
    for value in values.values():
        text = unquote(str(value).split("?d=")[-1].split("?")[0])
        if isinstance(value, str) and is_picture(text):
            return pictures.find(task, text, UPLOADED.sub("", text.rpartition("/")[2]))
    return task.fail("it names no image")


def _side(result: Fields, value: Fields, name: str) -> int:
    holder = result if name in result else value
    side = round(holder.number(name))
    if side < 1:
        holder.fail(f"{name} is {side}; expected the picture's pixels")
    return side


def _texts(value: Fields, name: str) -> list[str]:
    given = value.value(name)
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        value.fail(f"{name} is no list of names")
    return [one.strip() for one in given]


def _corners(shape: str, value: Fields, across: float, down: float) -> Corners:
    """The box of a shape in pixels, of which a hundredth of the sides is `across` and `down`."""
    if shape == OUTLINES:
        left, top, right, bottom = box_around(points_of(value, "points"))
        return left * across, top * down, right * across, bottom * down
    x, y = value.number("x") * across, value.number("y") * down
    degrees = value.number("rotation") if "rotation" in value else 0.0
    if shape == ELLIPSES:
        radii = value.number("radiusX") * across, value.number("radiusY") * down
        corners = (x - radii[0], y - radii[1], x + radii[0], y + radii[1])
    else:
        corners = (x, y, x + value.number("width") * across, y + value.number("height") * down)
    return turned_box(corners, degrees, (x, y)) if degrees else corners

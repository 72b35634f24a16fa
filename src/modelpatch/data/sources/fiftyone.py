"""FiftyOne's own exports: `labels.json` of class names and the labels of every picture in `data/`, for each split or alone.

Its exports as COCO, VOC and YOLO are read as those.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelpatch.data.sources import base
from modelpatch.data.sources.documents import Fields, read_json, shown
from modelpatch.data.sources.finding import Pictures, folders_of_splits
from modelpatch.data.sources.labels import check_names, make_classification
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import UNLISTED, Scene, SceneObject, make_detection, name_of
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.detection import Detection

FORM = "labels of FiftyOne"
LABELS, DATA = "labels.json", "data"


class _Export(base.DataSource):
    """An export whose labels are lists of objects, or not."""

    lists: bool

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        found = _label_files(path) if path.is_dir() else {}
        return bool(found) and all(_begins_as(file, self.lists) for file in found.values())


@base.register_source("fiftyone-classes")
class FiftyOneClasses(_Export):
    """FiftyOneImageClassificationDataset: one class a picture."""

    kind = Classification.name
    lists = False

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        remarks = Remarks()
        members = {
            split: [
                (image, _class_of(label, fields, names))
                for image, label, fields, names in _read_labels(file, Path(source), remarks)
            ]
            for split, file in _label_files(Path(source)).items()
        }
        return make_classification(members, remarks, check_names(members, options.names, str(source)))


@base.register_source("fiftyone-boxes")
class FiftyOneBoxes(_Export):
    """FiftyOneImageDetectionDataset: a list of objects a picture."""

    kind = Detection.name
    lists = True

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        remarks, path = Remarks(), Path(source)
        scenes = {
            split: [
                Scene(image, _objects_of(fields, image, names), relative=True)
                for image, _, fields, names in _read_labels(file, Path(source), remarks)
            ]
            for split, file in _label_files(path).items()
        }
        return make_detection(scenes, None, str(path), remarks)


def _label_files(path: Path) -> dict[str, Path]:
    """The labels of every split."""
    if (path / LABELS).is_file():
        return {"train": path / LABELS}
    folders = {split: own[0] for split, own in folders_of_splits(path).items()}
    return {split: folder / LABELS for split, folder in folders.items() if (folder / LABELS).is_file()}


def _begins_as(file: Path, lists: bool) -> bool:
    """Return True for a document of FiftyOne whose first label is a list, or is none."""
    try:
        document = read_json(file, FORM)
    except DataError:
        return False
    labels = document.values.get("labels")
    if not isinstance(labels, dict) or "images" in document:
        return False
    return any(isinstance(one, list) for one in labels.values()) == lists


def _read_labels(file: Path, top: Path, remarks: Remarks) -> Iterator[tuple[Path, Any, Fields, list[str]]]:
    """Each picture with its label, all labels as fields, and the class names."""
    document = read_json(file, FORM)
    given = document.values.get("classes") or []
    if not isinstance(given, list):
        document.fail(f"classes is {shown(given)}; expected a list")
    labels = Fields(document.value("labels"), file, "labels")
    pictures, listed = Pictures(file.parent / DATA), set()
    for name, label in labels.values.items():
        asking = f"{file}, labels"
        image = pictures.find(name, [pictures.root], asking) or pictures.find_stem(name, [pictures.root], asking)
        if image is None:
            labels.fail(f"there is no image {name[:200]!r} in {pictures.root}")
        if label is None:
            remarks.pass_over("picture without a label", name_of(image, top))
        else:
            yield image, label, Fields({name: label}, file, "labels"), list(map(str, given))
        listed.add(image)
    remarks.pass_over(UNLISTED, *(name_of(one, top) for one in pictures.files if one not in listed))


def _class_of(label: Any, fields: Fields, names: list[str]) -> str:
    if isinstance(label, dict):
        inner = Fields(label, fields.file, *fields.place, *fields.values)
        return _class_of(inner.value("label"), inner, names)
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(names):
            fields.fail(f"the label of {next(iter(fields.values))!r} is {label}; expected 0 to {len(names) - 1}")
        return names[label]
    if not isinstance(label, str) or not label.strip():
        fields.fail(f"the label of {next(iter(fields.values))!r} is {shown(label)}; expected a class")
    return label.strip()


def _objects_of(fields: Fields, image: Path, names: list[str]) -> list[SceneObject]:
    objects = []
    for entry in fields.all(next(iter(fields.values))):
        left, top, width, height = entry.numbers("bounding_box", 4)
        name = _class_of(entry.value("label"), entry, names)
        objects.append(SceneObject(name, (left, top, left + width, top + height)))
    return objects

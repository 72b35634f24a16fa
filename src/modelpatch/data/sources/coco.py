"""COCO: one JSON of images, categories and annotations a split, wherever tools put it and its pictures.

annotations/instances_SPLIT*.json with SPLIT*/ or images/SPLIT/ (COCO, CVAT), SPLIT.json with images/
SPLIT/_annotations.coco.json beside its pictures (Roboflow)
result.json with images/ (Label Studio), labels.json with data/ (FiftyOne), any one JSON with its pictures, or that file itself
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelpatch.data.sources import base
from modelpatch.data.sources.documents import Fields, Key, read_json
from modelpatch.data.sources.finding import Pictures, folders_of_splits
from modelpatch.data.sources.foreign import is_of_another_tool
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.outlines import box_of_outline
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import NO_AREA, Scene, SceneObject, make_detection
from modelpatch.data.sources.split_names import split_of
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection

KEYS = (b'"annotations"', b'"images"')
BOXES = "instances"  # the beginning of the official names of files with boxes
FORM = "annotations of COCO"
FOLDERS = ("annotations", "Annotations")
PICTURE_FOLDERS = ("images", "data")
FOREIGN = "object of a picture that the annotations do not list"
OTHERS = "another file of annotations"


@base.register_source("coco")
class Coco(base.DataSource):
    """COCO's boxes, or the boxes around its outlines."""

    kind = Detection.name

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        if path.is_file():
            return path.suffix.lower() == ".json" and _is_coco(path)
        return path.is_dir() and any(map(_is_coco, _list_files(path)))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks, categories = Path(source), Remarks(), dict[str, None]()
        root = path if path.is_dir() else path.parent.parent if path.parent.name in FOLDERS else path.parent
        files = _choose_files(path, remarks) if path.is_dir() else {"train": path}
        pictures = Pictures(root)
        scenes = {
            split: read_annotations(file, pictures, _places(split, file, root), remarks, categories)
            for split, file in files.items()
        }
        used = {one.name for own in scenes.values() for scene in own for one in scene.objects}
        unused = [name for name in categories if name not in used]
        remarks.note("categories have no box and are left out", unused, "category has no box and is left out")
        return make_detection(scenes, options.class_names(root), str(path), remarks)


def _list_files(path: Path) -> list[Path]:
    """The JSON files of a folder, of its splits' folders, and of folders of annotations in these."""
    roots = [path, *(folder for own in folders_of_splits(path).values() for folder in own)]
    places = [place for root in roots for place in (root, *(root / name for name in FOLDERS))]
    files = [file for place in places if place.is_dir() for file in sorted(place.glob("*.json"))]
    return list({file.resolve(): file for file in files if file.is_file() and not file.name.startswith(".")}.values())


def _is_coco(file: Path) -> bool:
    """Return True for a file that begins as COCO's do: other JSON may be kept beside images."""
    with file.open("rb") as stream:
        text = stream.read(2**20)
    begins = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(key in text for key in KEYS)
    return begins and not is_of_another_tool(text)


def _choose_files(path: Path, remarks: Remarks) -> dict[str, Path]:
    """The annotations of every split. A file whose name and folder tell of no split is that of all pictures."""
    by_split: dict[str | None, list[Path]] = {}
    for file in filter(_is_coco, _list_files(path)):
        above = file.parent.parent if file.parent.name in FOLDERS else file.parent
        split = split_of(file.stem) or (split_of(above.name) if above != path else None)
        by_split.setdefault(split, []).append(file)
    chosen = {}
    official = any(file.stem.startswith(BOXES) for files in by_split.values() for file in files)
    for split, files in by_split.items():
        boxes = [file for file in files if file.stem.startswith(BOXES) or not official]
        if not boxes:  # captions, key points, names of test images
            continue
        if len(boxes) > 1 and not (split is None and len(by_split) > 1):
            raise DataError(
                f"{boxes[0]} and {boxes[1]} are both annotations of {'the same pictures' if split is None else split}. "
                "Keep one, or name them by split: train.json, test.json."
            )
        chosen[split] = boxes[0]
    whole = chosen.pop(None, None)
    found = {split: file for split, file in chosen.items() if split} or ({"train": whole} if whole else {})
    read = set(found.values())
    unread = [file for own in by_split.values() for file in own if file not in read]
    remarks.pass_over(OTHERS, *(str(file.relative_to(path)) for file in unread))
    return found


def _places(split: str, file: Path, root: Path) -> list[Path]:
    """The folders where a split's pictures may be, the likeliest first."""
    roots = list(dict.fromkeys([file.parent, root]))
    inner = [place for one in roots for place in (one, *(one / name for name in PICTURE_FOLDERS))]
    return [*(folder for place in inner for folder in folders_of_splits(place).get(split, ())), *inner]


def read_annotations(
    file: Path, pictures: Pictures, places: Sequence[Path], remarks: Remarks, categories: dict[str, None]
) -> list[Scene]:
    """Pictures with their objects. COCO's boxes are left, top, width, height; crowds count as difficult."""
    document = read_json(file, FORM)
    names = _read_names(document)
    categories.update(dict.fromkeys(names.values()))
    images: dict[Key, Fields] = {}
    for image in document.all("images"):
        if images.setdefault(image.key("id"), image) is not image:
            image.fail(f"the id {image.key('id')!r} is that of another image, too")
    objects: dict[Key, list[SceneObject]] = {number: [] for number in images}
    written = {str(number): number for number in images}, {str(number): number for number in names}  # 7 may be "7"
    for entry in document.all("annotations"):
        number, category = entry.key("image_id"), entry.key("category_id")
        number = number if number in images else written[0].get(str(number), number)
        category = category if category in names else written[1].get(str(category), category)
        if category not in names:
            entry.fail(
                f"category_id {category!r} is none of the categories, which are {', '.join(map(str, names))[:200]}"
            )
        if number not in objects:
            remarks.pass_over(FOREIGN, f"{file.name}, annotations[{entry.place[-1]}]")
        elif corners := _read_corners(entry):
            objects[number].append(SceneObject(names[category], corners, _is_hard(entry)))
        else:
            remarks.pass_over(NO_AREA, f"{names[category]} in {images[number].text('file_name')}")
    files = {number: pictures.find(image.text("file_name"), places, str(file)) for number, image in images.items()}
    if missing := [images[number].text("file_name") for number, found in files.items() if found is None]:
        raise DataError(
            f"{file}: there is no image {missing[0][:200]!r}; {len(missing)} of {len(files)} are missing. Expected in: "
            f"{', '.join(dict.fromkeys(str(place) for place in places if place.is_dir()))}."
        )
    return [Scene(found, objects[number], images[number].size()) for number, found in files.items() if found]


def _read_names(document: Fields) -> dict[Key, str]:
    names: dict[Key, str] = {}
    for entry in document.all("categories"):
        name = entry.text("name")
        if names.setdefault(entry.key("id"), name) != name:
            entry.fail(f"the id {entry.key('id')!r} is that of {names[entry.key('id')]!r}, too")
    return names


def _read_corners(entry: Fields) -> Corners | None:
    """The corners of an annotation, from its outline where it has no box of an area. None for one without any area."""
    if entry.values.get("bbox"):
        left, top, width, height = entry.numbers("bbox", 4)
        if width > 0 and height > 0:
            return left, top, left + width, top + height
    elif not entry.values.get("segmentation"):
        entry.fail("it has neither a bbox nor a segmentation")
    return box_of_outline(entry) if entry.values.get("segmentation") else None


def _is_hard(entry: Fields) -> bool:
    return any(entry.number(name) != 0 for name in ("iscrowd", "ignore") if name in entry)

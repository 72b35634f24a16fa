"""Pascal VOC: an XML file of objects for each picture, or masks.

JPEGImages/, Annotations/*.xml, ImageSets/Main/SPLIT.txt; SegmentationClass/*.png and ImageSets/Segmentation/SPLIT.txt
XML beside the pictures or in a folder of its own (labelImg, FiftyOne), for each split or alone (Roboflow)

A folder with lists that has `train` and `val` alone is tested on `val`, as is the custom. VOC's own class names are known.
"""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES
from modelpatch.data.sources import base
from modelpatch.data.sources.documents import Fields, read_lines, read_xml
from modelpatch.data.sources.finding import Pictures, folders_of_splits
from modelpatch.data.sources.legends import find_legend
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import UNLISTED, Scene, SceneObject, make_detection, name_of
from modelpatch.data.sources.split_names import SPLIT_OF_WORD, named_splits, split_of
from modelpatch.data.sources.values import make_segmentation
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection
from modelpatch.tasks.segmentation import Segmentation

FORM = "annotations of Pascal VOC"
BEGINNING = 4096  # bytes in which an annotation's first element is
SIDES = ("xmin", "ymin", "xmax", "ymax")
MASKS, PICTURES, ANNOTATIONS, LISTS = "SegmentationClass", "JPEGImages", "Annotations", "ImageSets"


@base.register_source("voc-masks")
class VocMasks(base.DataSource):
    """VOC's images with masks, listed in `ImageSets/Segmentation/SPLIT.txt`."""

    kind = Segmentation.name

    def accepts(self, source: Any) -> bool:
        path = _find_root(Path(source))
        return (path / MASKS).is_dir() and (path / LISTS / "Segmentation").is_dir()

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path = _find_root(Path(source))
        pictures = Pictures(path / PICTURES)
        pairs = {
            split: (
                [_find_image(pictures, stem) for stem in stems],
                [path / MASKS / f"{stem}.png" for stem in stems],
            )
            for split, stems in _list_stems(path / LISTS / "Segmentation").items()
        }
        from torchvision.models.segmentation import FCN_ResNet50_Weights

        legend = find_legend([path])
        names = options.class_names(path) if legend is None else options.names
        usual = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
        return make_segmentation(pairs, options, names, str(path), legend=legend, usual=usual)


@base.register_source("voc")
class VocBoxes(base.DataSource):
    """VOC's boxes, of the images that `ImageSets/Main` lists or of all that have an annotation."""

    kind = Detection.name

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        return path.is_dir() and any(map(_is_annotation, _first_annotations(_find_root(path))))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = _find_root(Path(source)), Remarks()
        lists = path / LISTS / "Main"
        if lists.is_dir() and any(split_of(file.stem) for file in lists.glob("*.txt")):
            pictures = Pictures(path / PICTURES)
            scenes = {
                split: [
                    read_annotation(path / ANNOTATIONS / f"{stem}.xml", _find_image(pictures, stem)) for stem in stems
                ]
                for split, stems in _list_stems(lists).items()
            }
        else:
            folders = folders_of_splits(path) or {"train": [path]}
            scenes = {
                split: [scene for root in roots for scene in _read_below(root, path, remarks)]
                for split, roots in folders.items()
            }
        return make_detection(scenes, options.class_names(path), str(path), remarks)


def _find_root(path: Path) -> Path:
    """The folder itself, or the one year's in a `VOCdevkit` (below it). Raises `DataError` for several."""
    if not path.is_dir() or (path / PICTURES).is_dir():
        return path
    years = [one for below in (path, path / "VOCdevkit") if below.is_dir() for one in sorted(below.glob("VOC[0-9]*"))]
    years = [one for one in years if (one / PICTURES).is_dir()]
    if len(years) > 1:
        raise DataError(f"{path} holds {years[0].name} and {years[1].name}. Give one of them: {years[0]}.")
    return years[0] if years else path


def _first_annotations(path: Path) -> list[Path]:
    """The first XML file of each folder in which annotations may be."""
    roots = [path, *(folder for own in folders_of_splits(path).values() for folder in own)]
    places = [place for root in roots for place in (root, *sorted(one for one in root.iterdir() if one.is_dir()))]
    first = (next(iter(sorted(place.glob("*.xml"))), None) for place in places)
    return [file for file in first if file is not None]


def _is_annotation(file: Path) -> bool:
    """Return True for an XML file whose first element is VOC's."""
    with file.open("rb") as stream:
        text = stream.read(BEGINNING)
    return re.search(rb"<annotation[\s>]", text.replace(b"\0", b"")) is not None  # without the zeros of UTF-16


def _read_below(root: Path, top: Path, remarks: Remarks) -> list[Scene]:
    """The scenes of every annotation below a folder, each with the picture of its stem, or the one that it names."""
    pictures, scenes = Pictures(root), []
    for file in sorted(file for file in root.rglob("*.xml") if not file.name.startswith(".")):
        if not _is_annotation(file):
            remarks.pass_over("XML file without annotations", name_of(file, top))
            continue
        places = [file.parent, *(root / name for name in (PICTURES, "images", "data")), root]
        image = pictures.find_stem(file.stem, places, str(file))
        if image is None and (name := read_xml(file, FORM).findtext("filename", "").strip()):
            image = pictures.find(name, places, str(file)) or pictures.find_stem(name, places, str(file))
        if image is None:
            raise DataError(f"{file}: there is no image {file.stem!r} in {root}. Expected one of that stem.")
        scenes.append(read_annotation(file, image))
    listed = {scene.image for scene in scenes}
    beside = {file.parent for file in listed if isinstance(file, Path)}  # counted with the others of every layout
    apart = [file for file in pictures.files if file.parent not in beside]
    remarks.pass_over(UNLISTED, *(name_of(file, top) for file in apart))
    return scenes


def read_annotation(path: Path, image: Path) -> Scene:
    """An image's objects. VOC counts pixels from 1, corners included: a box's edges are xmin - 1, ymin - 1, xmax and ymax."""
    root, objects = read_xml(path, FORM), []
    for number, entry in enumerate(root.iter("object")):
        if (box := entry.find("bndbox")) is None:
            other = ", ".join(part.tag for part in entry)[:80]
            raise DataError(
                f"{path} cannot be read as {FORM}: object {number} has no bndbox; it has {other or 'nothing'}."
            )
        fields = _fields_of(entry, path, number)
        xmin, ymin, xmax, ymax = (_fields_of(box, path, number).number(side) for side in SIDES)
        corners = (max(xmin - 1, 0.0), max(ymin - 1, 0.0), xmax, ymax)
        objects.append(SceneObject(fields.text("name"), corners, entry.findtext("difficult", "").strip() == "1"))
    size = root.find("size")
    return Scene(image, objects, None if size is None else _fields_of(size, path).size())


def _fields_of(element: ElementTree.Element, path: Path, number: int | None = None) -> Fields:
    """The texts of an element's own elements."""
    texts = {part.tag: part.text.strip() for part in element if part.text and part.text.strip()}
    return Fields(texts, path, *(() if number is None else ("object", number)), element.tag)


def _list_stems(folder: Path) -> dict[str, list[str]]:
    """The stems of every split. Without a test list, `val` is the test split."""
    files = {file.stem.lower(): file for file in sorted(folder.glob("*.txt"))}
    lists = named_splits([file for stem, file in files.items() if stem in SPLIT_OF_WORD])
    if "train" not in lists and "trainval" in files:
        lists["train"] = files["trainval"]
    if not lists and len(files) == 1:  # of all pictures, such as CVAT's default.txt
        lists["train"] = next(iter(files.values()))
    if "train" not in lists:
        raise DataError(f"{folder} has no train.txt, which lists the images to train on.")
    if "test" not in lists and "validation" in lists:
        lists["test"] = lists.pop("validation")
    return {split: [_stem_of(line) for line in read_lines(file)] for split, file in lists.items()}


def _stem_of(line: str) -> str:
    """The stem in a line of a list, which may have a suffix, and a number behind it."""
    name = line.split()[0]
    return name[: -len(suffix)] if (suffix := Path(name).suffix).lower() in IMAGE_SUFFIXES else name


def _find_image(pictures: Pictures, stem: str) -> Path:
    if found := pictures.find_stem(stem, (), str(pictures.root)):
        return found
    raise DataError(f"{pictures.root} has no image {stem!r}, which a list of images names.")

"""Pascal VOC: `JPEGImages`, with `SegmentationClass/*.png` or `Annotations/*.xml`, and lists of stems in `ImageSets`.

A folder that has `train` and `val` alone is tested on `val`, as is the custom. VOC's own class names are known.
"""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES
from modelpatch.data.sources import base
from modelpatch.data.sources.masks import make_segmentation
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection
from modelpatch.tasks.segmentation import Segmentation


@base.register_source("voc-masks")
class VocMasks(base.DataSource):
    """VOC's images with masks, listed in `ImageSets/Segmentation/SPLIT.txt`."""

    kind = Segmentation.name

    def accepts(self, source: Any) -> bool:
        return (Path(source) / "SegmentationClass").is_dir()

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path = Path(source)
        if not (names := options.class_names(path)):
            from torchvision.models.segmentation import FCN_ResNet50_Weights

            names = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
        pairs = {
            split: (
                [_find_image(path / "JPEGImages", stem) for stem in stems],
                [path / "SegmentationClass" / f"{stem}.png" for stem in stems],
            )
            for split, stems in _list_stems(path / "ImageSets" / "Segmentation").items()
        }
        return make_segmentation(pairs, options, names, str(path))


@base.register_source("voc")
class VocBoxes(base.DataSource):
    """VOC's images with boxes, listed in `ImageSets/Main/SPLIT.txt`."""

    kind = Detection.name

    def accepts(self, source: Any) -> bool:
        return all((Path(source) / name).is_dir() for name in ("Annotations", "JPEGImages"))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path = Path(source)
        scenes = {
            split: [
                read_annotation(path / "Annotations" / f"{stem}.xml", _find_image(path / "JPEGImages", stem))
                for stem in stems
            ]
            for split, stems in _list_stems(path / "ImageSets" / "Main").items()
        }
        return base.make_detection(scenes, options.class_names(path), str(path))


def read_annotation(path: Path, image: Path) -> base.Scene:
    """An image's objects. VOC counts pixels from 1, corners included: a box's edges are xmin - 1, ymin - 1, xmax and ymax."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for entry in root.iter("object"):
            box = entry.find("bndbox")
            edges = [float(_text(box, side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            corners = (max(edges[0] - 1, 0.0), max(edges[1] - 1, 0.0), edges[2], edges[3])
            difficult = entry.findtext("difficult", "0").strip() == "1"
            objects.append((_text(entry, "name"), base.check_corners(corners), difficult))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} cannot be read as annotations of Pascal VOC: {error}.") from error
    return image, objects


def _text(entry: ElementTree.Element | None, name: str) -> str:
    text = None if entry is None else entry.findtext(name)
    if text is None or not text.strip():
        raise ValueError(f"an object without {name}")
    return text.strip()


def _list_stems(folder: Path) -> dict[str, list[str]]:
    """The stems of every split. Without a test list, `val` is the test split."""
    lists = base.named_splits(sorted(folder.glob("*.txt")))
    if "train" not in lists:
        raise DataError(f"{folder} has no train.txt, which lists the images to train on.")
    if "test" not in lists and "validation" in lists:
        lists["test"] = lists.pop("validation")
    return {
        split: [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        for split, file in lists.items()
    }


def _find_image(folder: Path, stem: str) -> Path:
    files = [folder / (stem + suffix) for suffix in (".jpg", *sorted(IMAGE_SUFFIXES))]
    return base.find_file(files, f"{folder} has no image {stem!r}, which a list of images names")

"""Where dense tasks come from: images with a mask or with boxes.

| layout                                                                        | kind         |
|-------------------------------------------------------------------------------|--------------|
| `SPLIT/images/*` with `SPLIT/labels/*.png` (or `masks/`) of the same stem         | segmentation |
| `images/*` with `labels/*.png` (or `masks/`)                                      | segmentation |
| VOC: `JPEGImages`, `SegmentationClass/*.png`, `ImageSets/Segmentation/SPLIT.txt`  | segmentation |
| VOC: `JPEGImages`, `Annotations/*.xml`, `ImageSets/Main/SPLIT.txt`                | detection    |
| COCO: `SPLIT.json` or `annotations/instances_SPLIT*.json`, images beside them     | detection    |
| `hf:NAME` with two image columns                                                | segmentation |
| `hf:NAME` with a column `objects` of `bbox` and `category`                        | detection    |

Names of classes stand in `classes.txt` or `labels.txt`, one a line, or are given; VOC's own and COCO's are known. A VOC folder
that has `train` and `val` alone is tested on `val`, as is the custom. The value 255 of a mask is never a class.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, ImageSource, find_images
from modelpatch.errors import DataError, TrainingWarning
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.detection import Boxes, Detection
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.segmentation import IGNORED, UNKNOWN, PixelMask, Segmentation, read_values
from modelpatch.tasks.targets import Target

SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
MASK_FOLDERS = ("labels", "masks")
CLASS_FILES = ("classes.txt", "labels.txt")
Asked = np.ndarray | Sequence[Target]  # class indices, or targets


@dataclass(frozen=True)
class Found:
    """What a source holds: images and what is asked about them by split, and the names of classes."""

    kind: str
    splits: Mapping[str, tuple[Sequence[ImageSource], Asked]]
    classes: Sequence[str]


@dataclass(frozen=True)
class Wish:
    """What a user says about a source. Raises `DataError` for what no source could be."""

    kind: str | None = None
    classes: tuple[str, ...] | None = None
    ignore: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            kind_of(self.kind)
        if self.ignore is not None and (type(self.ignore) is not int or not 0 <= self.ignore <= IGNORED):
            raise DataError(f"ignore={self.ignore!r}; expected a value of masks, 0 to {IGNORED}.")

    @property
    def facts(self) -> dict[str, Any]:
        """What was said, for a patch to remember how its data was read."""
        said = {"classes": None if self.classes is None else list(self.classes), "ignore": self.ignore}
        return {name: value for name, value in said.items() if value is not None}

    def check(self, found: Found, source: str) -> None:
        """Raises `DataError` for a source of another kind, and for options that say nothing about this kind."""
        if self.kind is not None and self.kind != found.kind:
            raise DataError(
                f"{source} holds no {self.kind} task in a layout that is read. See docs/{self.kind}.md for these layouts."
            )
        if found.kind != Segmentation.name and (self.classes is not None or self.ignore is not None):
            raise DataError(f"{source} names its classes itself; classes and ignore are for the values of masks.")


def read_dense(path: Path, wish: Wish) -> Found | None:
    """A folder as a dense task; None for one that is none, or is asked for as classification."""
    if wish.kind == Classification.name or not path.is_dir():
        return None
    masks = _mask_splits(path) if wish.kind != Detection.name else {}
    boxes = _box_splits(path) if wish.kind != Segmentation.name else {}
    if masks and boxes:
        raise DataError(f"{path} has masks and boxes. Say which: kind='segmentation' or kind='detection' (--kind).")
    if masks:
        return _masked(masks, wish, _names_of(path, wish), str(path))
    return _boxed(boxes, _names_of(path, wish), str(path)) if boxes else None


# masks ------------------------------------------------------------------------------------------------------

Pairs = tuple[Sequence[ImageSource], Sequence[ImageSource]]  # images and their masks


class _Masks(Sequence[PixelMask]):
    """Masks whose pictures are fetched when they are asked for."""

    def __init__(self, sources: Sequence[ImageSource], table: np.ndarray) -> None:
        self.sources, self.table = sources, table

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, row: Any) -> Any:
        return PixelMask(self.sources[row], self.table)


def _mask_splits(path: Path) -> dict[str, Pairs]:
    """Images with their masks by split; none where the folder has no such layout."""
    if (path / "SegmentationClass").is_dir():
        lists = _voc_lists(path / "ImageSets" / "Segmentation")
        return {
            split: (
                [_image(path / "JPEGImages", stem) for stem in stems],
                [path / "SegmentationClass" / f"{stem}.png" for stem in stems],
            )
            for split, stems in lists.items()
        }
    roots = {SPLITS[folder.name]: folder for folder in sorted(path.iterdir()) if folder.name in SPLITS} or {
        "train": path
    }
    if not all((root / "images").is_dir() and _mask_folder(root) for root in roots.values()):
        return {}
    return {split: _pairs(root / "images", _mask_folder(root)) for split, root in roots.items()}


def _mask_folder(root: Path) -> Path | None:
    return next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)


def _pairs(images: Path, masks: Path | None) -> Pairs:
    assert masks is not None
    by_stem = {file.relative_to(masks).with_suffix(""): file for file in find_images(masks)}
    files = find_images(images)
    stems = [file.relative_to(images).with_suffix("") for file in files]
    if missing := [stem for stem in stems if stem not in by_stem]:
        raise DataError(
            f"{masks} has no mask for {len(missing)} of {len(files)} images of {images}, first {missing[0]}. Expected one of "
            "the same stem for each."
        )
    return files, [by_stem[stem] for stem in stems]


def _masked(pairs: Mapping[str, Pairs], wish: Wish, names: Sequence[str] | None, source: str) -> Found:
    """Masks whose values are `names`, but for the one to ignore; without names, the values that training masks hold."""
    for _, masks in pairs.values():
        files = [mask for mask in masks if isinstance(mask, Path)] if isinstance(masks, list) else []
        if missing := [file for file in files if not file.is_file()]:
            raise DataError(f"{source}: there is no mask {missing[0]}.")
    ignored = {IGNORED, *([] if wish.ignore is None else [wish.ignore])}
    if names is None:
        values = sorted(
            {int(v) for mask in pairs.get("train", ((), ()))[1] for v in np.unique(read_values(mask))} - ignored
        )
        classes = {value: str(value) for value in values}
        shown = ", ".join(classes.values())
        warnings.warn(
            f"{source} names no classes, so that each value of its masks is one: {shown}. Name them with --classes "
            "(classes=[...]); a value that means nothing is left out with --ignore (ignore=N).",
            TrainingWarning,
            stacklevel=2,
        )
    else:
        classes = {value: name for value, name in enumerate(names) if value not in ignored}
    if not classes or len(names or ()) > IGNORED:
        raise DataError(f"{source} has {len(names or ())} classes; expected 1 to {IGNORED}.")
    table = np.full(256, UNKNOWN, dtype=np.int16)
    table[list(ignored)] = IGNORED
    table[list(classes)] = np.arange(len(classes))
    splits = {split: (images, _Masks(masks, table)) for split, (images, masks) in pairs.items()}
    return Found(Segmentation.name, splits, list(classes.values()))


# boxes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """An image with its objects: (class, corners, difficult)."""

    image: ImageSource
    objects: Sequence[tuple[str, tuple[float, ...], bool]]


def _box_splits(path: Path) -> dict[str, list[_Scene]]:
    """Images with their objects by split; none where the folder has no such layout."""
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return {
            split: [
                _read_voc(path / "Annotations" / f"{stem}.xml", _image(path / "JPEGImages", stem)) for stem in stems
            ]
            for split, stems in _voc_lists(path / "ImageSets" / "Main").items()
        }
    files = {
        SPLITS[name]: file
        for file in sorted([*path.glob("*.json"), *(path / "annotations").glob("*.json")])
        if (name := file.stem.removeprefix("instances_").rstrip("0123456789")) in SPLITS and _is_coco(file)
    }
    return {split: _read_coco(file, path) for split, file in files.items()}


def _boxed(scenes: Mapping[str, list[_Scene]], names: Sequence[str] | None, source: str) -> Found:
    found = sorted({name for own in scenes.values() for scene in own for name, _, _ in scene.objects})
    if not found:
        raise DataError(f"{source} has no objects in any of its images.")
    classes = found if names is None else list(names)
    if unknown := [name for name in found if name not in classes]:
        raise DataError(f"{source} has objects of the class {unknown[0]!r}, which its list of classes lacks.")
    index = {name: number for number, name in enumerate(classes)}
    splits: dict[str, tuple[Sequence[ImageSource], Asked]] = {}
    for split, own in scenes.items():
        boxes = [
            Boxes(
                np.array([corners for _, corners, _ in scene.objects], dtype=np.float64).reshape(-1, 4),
                np.array([index[name] for name, _, _ in scene.objects], dtype=np.int64),
                np.array([difficult for _, _, difficult in scene.objects], dtype=bool),
            )
            for scene in own
        ]
        splits[split] = [scene.image for scene in own], boxes
    return Found(Detection.name, splits, classes)


def _read_voc(path: Path, image: Path) -> _Scene:
    """Pascal VOC's corners are pixels from 1 on, both within the box: (xmin - 1, ymin - 1, xmax, ymax) are its edges."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for entry in root.iter("object"):
            box = entry.find("bndbox")
            edges = [float(_text(box, side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            corners = (max(edges[0] - 1, 0.0), max(edges[1] - 1, 0.0), edges[2], edges[3])
            objects.append((_text(entry, "name"), _checked(corners), entry.findtext("difficult", "0").strip() == "1"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} cannot be read as annotations of Pascal VOC: {error}.") from error
    return _Scene(image, objects)


def _text(entry: ElementTree.Element | None, name: str) -> str:
    text = None if entry is None else entry.findtext(name)
    if text is None or not text.strip():
        raise ValueError(f"an object without {name}")
    return text.strip()


def _checked(corners: tuple[float, ...]) -> tuple[float, ...]:
    if (
        len(corners) != 4
        or not all(map(math.isfinite, corners))
        or corners[2] <= corners[0]
        or corners[3] <= corners[1]
    ):
        raise ValueError(f"the box {corners} has no area")
    return corners


def _is_coco(path: Path) -> bool:
    """Whether a file's beginning looks like COCO's: other JSON may lie beside images."""
    with path.open("rb") as stream:
        text = stream.read(2**20)
    return any(key in text for key in (b'"annotations"', b'"categories"', b'"images"'))


def _read_coco(path: Path, folder: Path) -> list[_Scene]:
    """COCO's boxes are left, top, width, height; crowds count as difficult."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in described["categories"]}
        objects: dict[Any, list[tuple[str, tuple[float, ...], bool]]] = {}
        for entry in described["annotations"]:
            left, top, width, height = map(float, entry["bbox"])
            corners = _checked((left, top, left + width, top + height))
            objects.setdefault(entry["image_id"], []).append(
                (names[entry["category_id"]], corners, bool(entry.get("iscrowd", 0)))
            )
        images = {entry["id"]: str(entry["file_name"]) for entry in described["images"]}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as annotations of COCO: {error!r}.") from error
    split = path.stem.removeprefix("instances_")
    places = [folder / "images" / split, folder / split, folder / "images", folder]
    return [_Scene(_find(places, name, path), objects.get(number, [])) for number, name in images.items()]


def _find(places: Sequence[Path], name: str, named_by: Path) -> Path:
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        raise DataError(f"{named_by}: there is no image {name[:200]!r} in {', '.join(map(str, places))}.")
    return file


# names and lists --------------------------------------------------------------------------------------------


def _voc_lists(folder: Path) -> dict[str, list[str]]:
    """The stems of every split. Without a test list, `val` is tested on."""
    lists = {SPLITS[file.stem]: file for file in sorted(folder.glob("*.txt")) if file.stem in SPLITS}
    if "train" not in lists:
        raise DataError(f"{folder} has no train.txt, which lists the images to train on.")
    if "test" not in lists and "validation" in lists:
        lists["test"] = lists.pop("validation")
    return {
        split: [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        for split, file in lists.items()
    }


def _image(folder: Path, stem: str) -> Path:
    suffixes = (".jpg", *sorted(IMAGE_SUFFIXES))
    file = next((folder / (stem + suffix) for suffix in suffixes if (folder / (stem + suffix)).is_file()), None)
    if file is None:
        raise DataError(f"{folder} has no image {stem!r}, which a list of images names.")
    return file


def _names_of(path: Path, wish: Wish) -> Sequence[str] | None:
    """The names that were given, or stand in a file of the folder; VOC's own for its masks."""
    if wish.classes is not None:
        return wish.classes
    for name in CLASS_FILES:
        if (path / name).is_file():
            return [line.strip() for line in (path / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    return _voc_names() if (path / "SegmentationClass").is_dir() and wish.kind != Detection.name else None


def _voc_names() -> list[str]:
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    return ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]


# the hub ----------------------------------------------------------------------------------------------------


def hub_targets(
    name: str, tables: Mapping[str, Any], wish: Wish, images: Callable[[Any, str], Sequence[ImageSource]]
) -> Found | None:
    """A data set of the hub as a dense task; None for one of labelled images. `images` gives a column's encoded pictures."""
    import datasets

    if wish.kind == Classification.name or not tables:
        return None
    features = next(iter(tables.values())).features
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labelled = any(isinstance(feature, datasets.ClassLabel) for feature in features.values())
    if "objects" in features and pictures and wish.kind != Segmentation.name:
        return _hub_boxes(name, tables, pictures[0], images)
    if len(pictures) == 2 and not labelled and wish.kind != Detection.name:
        first, second = sorted(pictures, key=lambda column: column not in ("image", "img", "pixel_values"))
        pairs: dict[str, Pairs] = {
            split: (images(table, first), images(table, second)) for split, table in tables.items()
        }
        return _masked(pairs, wish, wish.classes, f"hf:{name}")
    return None


def _hub_boxes(
    name: str, tables: Mapping[str, Any], picture: str, images: Callable[[Any, str], Sequence[ImageSource]]
) -> Found:
    """Boxes are left, top, width, height, as the hub's sets of objects have them."""
    scenes: dict[str, list[_Scene]] = {}
    names: Sequence[str] | None = None
    try:
        for split, table in tables.items():
            feature = table.features["objects"]
            inner = getattr(feature, "feature", feature)
            inner = inner[0] if isinstance(inner, list) else inner
            category = inner["category"]
            names = list(getattr(category, "feature", category).names)
            scenes[split] = []
            for image, row in zip(images(table, picture), table["objects"], strict=True):
                boxes, labels = (
                    (row["bbox"], row["category"])
                    if isinstance(row, dict)
                    else ([one["bbox"] for one in row], [one["category"] for one in row])
                )
                objects = [
                    (names[label], _checked((x, y, x + w, y + h)), False)
                    for (x, y, w, h), label in zip(boxes, labels, strict=True)
                ]
                scenes[split].append(_Scene(image, objects))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"hf:{name}: its objects cannot be read ({error!r}). Expected a column `objects` of `bbox` (left, top, width, "
            "height) and `category` with names."
        ) from error
    return _boxed(scenes, names, f"hf:{name}")

"""YOLO: a text file of boxes for each picture, class cx cy w h a line, all but the class in shares of the picture's sides.

data.yaml with path, train, val, test and names (Ultralytics, Roboflow, FiftyOne), or that file itself
obj.data and obj.names with lists of pictures (Darknet, CVAT)
images/SPLIT with labels/SPLIT, SPLIT/images with SPLIT/labels, or text files beside the pictures, and classes.txt
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, find_images
from modelpatch.data.sources import base
from modelpatch.data.sources.documents import Fields, read_lines, read_text, read_yaml, shown
from modelpatch.data.sources.finding import Pictures, folders_of_splits, is_there
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import Scene, SceneObject, make_detection, name_of
from modelpatch.data.sources.split_names import split_of
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection

FORM = "a description of a YOLO data set"
DESCRIPTIONS = (".yaml", ".yml", ".data")
ENTRIES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
NAME_FILES = (*base.CLASS_FILES, "obj.names", "labels/classes.txt", "labels/train/classes.txt")
NO_LABELS = {Path(name).name for name in NAME_FILES}
SLACK = 0.01  # of a side by which a share may be below 0 or above 1: rounding
Labels = Mapping[Path, Path | None]  # of each picture


@base.register_source("yolo")
class Yolo(base.DataSource):
    """YOLO's boxes."""

    kind = Detection.name

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        if path.is_file():
            return path.suffix.lower() in DESCRIPTIONS and _is_description(path)
        return path.is_dir() and (_find_description(path) is not None or _has_labels(path))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        file = path if path.is_file() else _find_description(path)
        root = path.parent if path.is_file() else path
        fields = None if file is None else _read_description(file)
        splits = _list_pictures(root, remarks) if fields is None else _listed_pictures(fields, remarks)
        names: Sequence[str] | None = None if fields is None else _names_in(fields)
        given = names is None and isinstance(options.classes, tuple)
        if names is None and not (names := options.class_names(root) or _names_beside(root)):
            raise DataError(
                f"{path} has boxes of YOLO, and nothing names their classes. Give --classes NAME,NAME (classes=[...]), or a "
                "file classes.txt with one name a line."
            )
        labels = {image: _label_of(image, root) for images in splits.values() for image in images}
        _count_labels(labels, root, remarks)
        points = 0 if fields is None else _count_points(fields)
        outlines: list[str] = []
        scenes = {
            split: [
                Scene(image, read_labels(labels[image], names, outlines, points), relative=True) for image in images
            ]
            for split, images in splits.items()
        }
        remarks.note("outlines are read as the boxes around them", outlines, "outline is read as the box around it")
        return make_detection(scenes, names, str(path), remarks, names_from_user=given)


# descriptions -----------------------------------------------------------------------------------------------


def _is_description(file: Path) -> bool:
    """Return True for a file that begins as those that describe a YOLO data set."""
    with file.open("rb") as stream:
        text = b"\n" + stream.read(2**16)
    if file.suffix.lower() == ".data":
        return b"names" in text and b"train" in text
    return any(f"\n{key}:".encode() in text for key in ("names", "nc")) and any(
        f"\n{key}:".encode() in text for key in ENTRIES
    )


def _find_description(path: Path) -> Path | None:
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix.lower() in DESCRIPTIONS]
    found = [file for file in files if _is_description(file)]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} both describe a data set. Give one of them in place of {path}.")
    return found[0] if found else None


def _read_description(file: Path) -> Fields:
    if file.suffix.lower() != ".data":
        return read_yaml(file, FORM)
    pairs = [line.partition("=") for line in read_lines(file) if not line.startswith("#")]
    values: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    if "names" in values:
        values["names"] = read_lines(_locate(values["names"], Fields(values, file), "names"))
    return Fields({key: value for key, value in values.items() if key != "classes"}, file)


def _names_in(fields: Fields) -> list[str] | None:
    """The class names by index, from a list or a mapping from numbers. Raises `DataError` where their number is not `nc`."""
    if "names" not in fields:
        return None
    given = fields.value("names")
    if isinstance(given, dict):
        try:
            by_number = {int(str(number)): name for number, name in given.items()}
        except ValueError:
            fields.fail(f"names is {shown(given)}; expected a list, or numbers with a name each")
        if sorted(by_number) != list(range(len(by_number))):
            fields.fail(
                f"names has the numbers {', '.join(map(str, by_number))[:80]}; expected 0 to {len(by_number) - 1}"
            )
        given = [by_number[number] for number in range(len(by_number))]
    if not isinstance(given, list) or not given or any(isinstance(one, list | dict) or one is None for one in given):
        fields.fail(f"names is {shown(given)}; expected a list of names")
    names = [str(one).strip() for one in given]
    if "nc" in fields and fields.number("nc") != len(names):
        fields.fail(f"nc is {fields.value('nc')}, but there are {len(names)} names")
    if twice := [name for name in names if names.count(name) > 1]:
        fields.fail(f"names has {twice[0]!r} twice")
    return names


def _count_points(fields: Fields) -> int:
    """The number of values of key points behind each box."""
    if "kpt_shape" not in fields:
        return 0
    count, values = fields.numbers("kpt_shape", 2)
    return max(round(count), 0) * max(round(values), 0)


def _names_beside(root: Path) -> list[str] | None:
    files = [root / name for name in NAME_FILES] + sorted(root.glob("*.names"))
    return next((read_lines(file) for file in files if file.is_file()), None)


def _listed_pictures(fields: Fields, remarks: Remarks) -> dict[str, list[Path]]:
    """The pictures of every split that a description lists: of folders, or of text files that list pictures."""
    splits = defaultdict[str, list[Path]](list)
    for key, split in ENTRIES.items():
        given = fields.values.get(key) or []
        for entry in given if isinstance(given, list) else [given]:
            if not isinstance(entry, str):
                fields.fail(f"{key} is {shown(entry)}; expected a folder or a text file")
            try:
                place = _locate(entry, fields, key)
            except DataError as error:
                if split == "train":
                    raise
                remarks.note(f"left out: {error}")
                continue
            splits[split].extend(find_images(place) if place.is_dir() else _read_list(place, fields.file.parent))
    return {split: list(dict.fromkeys(images)) for split, images in splits.items()}


def _locate(entry: str, fields: Fields, key: str) -> Path:
    """The folder or file of an entry, below `path`, beside the description, or where its last parts are found there."""
    beside, path = fields.file.parent, str(fields.values.get("path") or "")
    parts = [part for part in Path(entry.replace("\\", "/")).parts if part not in (".", "..", "/")]
    ends = [beside.joinpath(*parts[start:]) for start in range(len(parts))]
    for place in (beside / path / entry, Path(path).expanduser() / entry, beside / entry, *ends):
        if is_there(place):
            return place
    return fields.fail(f"{key} is {entry[:200]!r}, which is neither below {beside} nor below its path {path!r}")


def _read_list(file: Path, root: Path) -> list[Path]:
    """The pictures that a text file lists, relative to it or to the folder of the description."""
    pictures = Pictures(root)
    images = []
    for line in read_lines(file):
        if (found := pictures.find(line, [file.parent, root], str(file))) is None:
            raise DataError(f"{file}: there is no image {line[:200]!r} below {root}.")
        images.append(found)
    return images


# pictures and labels ----------------------------------------------------------------------------------------


def _is_labels(name: str) -> bool:
    return name.lower() in ("labels", "label")


def _is_images(name: str) -> bool:
    return name.lower() in ("images", "image", "imgs", "img")


def _has_labels(path: Path) -> bool:
    """Return True where text files lie in a folder `labels`, or beside pictures and look like YOLO's."""
    roots = [path, *(folder for own in folders_of_splits(path).values() for folder in own)]
    for root in roots:
        for folder in sorted(one for one in root.iterdir() if one.is_dir() and _is_labels(one.name)):
            inner = [folder, *(one for own in folders_of_splits(folder).values() for one in own)]
            if any(_text_files(place) for place in inner):
                return True
    beside = [*roots, path / "data", path / "obj_train_data"]
    return any(place.is_dir() and any(map(_looks_like_labels, _text_files(place)[:1])) for place in beside)


def _text_files(folder: Path) -> list[Path]:
    return [
        file for file in sorted(folder.glob("*.txt")) if file.name not in NO_LABELS and not file.name.startswith(".")
    ]


def _looks_like_labels(file: Path) -> bool:
    if not any(file.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES):
        return False
    try:
        lines = [list(map(float, line.split())) for line in read_text(file).splitlines() if line.strip()]
    except ValueError:
        return False
    return all(len(line) >= 5 for line in lines)


def _list_pictures(root: Path, remarks: Remarks) -> dict[str, list[Path]]:
    """The pictures below a folder, only those in folders of images if there are any, by the split of a folder's name."""
    files = Pictures(root).files
    parts = {file: file.relative_to(root).parts[:-1] for file in files}
    if any(_is_images(part) for own in parts.values() for part in own):
        inside = {file: any(map(_is_images, parts[file])) for file in files}
        stray = [name_of(file, root) for file in files if not inside[file]]
        remarks.pass_over("picture outside of the folders of images", *stray)
        files = [file for file in files if inside[file]]
    splits = defaultdict[str, list[Path]](list)
    for file in files:
        splits[next((split for part in parts[file] if (split := split_of(part))), "train")].append(file)
    return splits


def _label_of(image: Path, root: Path) -> Path | None:
    """The text file of a picture: in `labels` in place of `images`, beside it, or in a folder of labels next to its own."""
    name, parts = f"{image.stem}.txt", list(image.parts[:-1])
    places = [image.parent]
    for number in reversed(range(len(parts))):
        if _is_images(parts[number]):
            places = [Path(*parts[:number], label, *parts[number + 1 :]) for label in ("labels", "label")] + places
            break
    places += [image.parent.parent / "labels" / image.parent.name, image.parent.parent / "labels", root / "labels"]
    return next((place / name for place in places if (place / name).is_file()), None)


def _count_labels(labels: Labels, root: Path, remarks: Remarks) -> None:
    """Note pictures without a file of labels, and count files of labels without a picture."""
    read = {file for file in labels.values() if file}
    if not read:
        first = next(iter(labels), None)
        where = "labels/ in place of images/, or beside them"
        raise DataError(
            f"{root}: none of its {len(labels)} pictures has a text file of boxes ({where}), first {first}."
        )
    unlabelled = [name_of(image, root) for image, file in labels.items() if file is None]
    remarks.note(
        "pictures have no file of labels, and are read as pictures without objects",
        unlabelled,
        "picture has no file of labels, and is read as one without objects",
    )
    left = [file for folder in sorted({file.parent for file in read}) for file in _text_files(folder)]
    remarks.pass_over("file of labels without a picture", *(name_of(file, root) for file in left if file not in read))


def read_labels(file: Path | None, names: Sequence[str], outlines: list[str], points: int = 0) -> list[SceneObject]:
    """The objects of a file; none of a file that is empty or not there.

    Polygons become the boxes around them and are added to `outlines`. A line has `points` values of key points after its box.
    """
    objects = []
    for number, line in enumerate(read_text(file).splitlines() if file else (), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        values = _parse(line, place)
        index, shares = values[0], values[1:]
        if not index.is_integer() or not 0 <= index < len(names):
            raise DataError(
                f"{place}: the class is {line.split()[0]}; expected 0 to {len(names) - 1}, one of {len(names)}."
            )
        if len(shares) == 4 + points:
            x, y, width, height = _checked(shares[:4], place)
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        elif len(shares) >= 6 and len(shares) % 2 == 0:
            across, down = _checked(shares, place)[::2], shares[1::2]
            corners = (min(across), min(down), max(across), max(down))
            outlines.append(place)
        else:
            raise DataError(
                f"{place}: it has {len(values)} values; expected the class and cx cy w h in shares of the picture's sides, "
                "or the class and x y of each corner of an outline. Remove confidences of predictions."
            )
        objects.append(SceneObject(names[int(index)], corners))
    return objects


def _parse(line: str, place: str) -> list[float]:
    try:
        values = [float(value) for value in line.split()]
    except ValueError:
        values = [float("nan")]
    if any(value != value or abs(value) == float("inf") for value in values):
        raise DataError(f"{place}: it is {line.strip()[:80]!r}; expected the class and numbers.")
    return values


def _checked(shares: Sequence[float], place: str) -> Sequence[float]:
    if wrong := [share for share in shares if not -SLACK <= share <= 1 + SLACK]:
        hint = " Divide pixels by the picture's width and height." if wrong[0] > 1 else ""
        raise DataError(
            f"{place}: it has the value {wrong[0]:g}; expected shares of the picture's sides, 0 to 1.{hint}"
        )
    return shares

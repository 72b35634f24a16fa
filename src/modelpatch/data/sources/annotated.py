"""The boxes of pictures in files of annotation tools, one for each picture or for many, beside the pictures or apart."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from modelpatch.data.sources import base
from modelpatch.data.sources.documents import Fields
from modelpatch.data.sources.finding import Pictures, folders_of_splits
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import Scene, make_detection, name_of
from modelpatch.data.sources.split_names import plain_split_of, split_of
from modelpatch.tasks.detection import Detection

FOLDERS = frozenset(
    str.split("annotations annotation annots annot anns ann labels label jsons json xml images image data")
)
BEGINNING = 2**16  # bytes in which a file says what it is


class NamedPictures:
    """The pictures below a folder, found for the entries of annotations, and the outlines that became boxes."""

    def __init__(self, root: Path) -> None:
        self.root, self.outlines = root, list[str]()
        self._pictures = Pictures(root)

    def find(self, entry: Fields, name: str, *others: str) -> Path:
        """The picture of the first of the names that there is one of, else of its stem. Raises `DataError` for none."""
        file, parents = entry.file, [entry.file.parent, *entry.file.parents]
        places = [*(one for one in parents if one.is_relative_to(self.root)), self.root / "images"]
        for one in (name, *others):
            if found := self._pictures.find(one, places, str(file)):
                return found
        if found := self._pictures.find_stem(Path(name.replace("\\", "/")).stem, places, str(file)):
            return found
        return entry.fail(f"there is no image {name[:200]!r} in {self.root} or below it")


class AnnotatedPictures(base.DataSource):
    """Boxes in the files of an annotation tool.

    They lie in the folder itself, in those of its splits, or in a folder of annotations in one of these.
    """

    kind = Detection.name
    suffix: ClassVar[str] = ".json"

    @abstractmethod
    def begins(self, text: bytes) -> bool:
        """Return True for the beginning of a file that the tool wrote."""

    @abstractmethod
    def scenes(self, file: Path, pictures: NamedPictures) -> Iterable[Scene]:
        """The pictures of a file with their objects."""

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        first = {file.parent: file for file in reversed(self.files(path))}
        return any(map(self.is_own, first.values()))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        root = path if path.is_dir() else path.parent
        pictures, scenes = NamedPictures(root), defaultdict[str, list[Scene]](list)
        for file in self.files(path):
            if self.is_own(file):
                scenes[_split_of(file, root)] += self.scenes(file, pictures)
            else:
                remarks.pass_over("file without annotations", name_of(file, root))
        outlines = pictures.outlines
        remarks.note("outlines are read as the boxes around them", outlines, "outline is read as the box around it")
        return make_detection(scenes, options.class_names(root), str(path), remarks)

    def files(self, path: Path) -> list[Path]:
        """The files of a folder that may hold annotations, or the file itself."""
        if path.is_file():
            return [path]
        return [
            file for place in self.places(path) for file in sorted(place.glob(f"*{self.suffix}")) if _is_plain(file)
        ]

    def places(self, path: Path) -> list[Path]:
        """The folders that may hold annotations."""
        if not path.is_dir():
            return []
        roots = [path, *_splits_in(path)]
        inner = [
            one for root in roots for one in sorted(root.iterdir()) if one.is_dir() and one.name.lower() in FOLDERS
        ]
        return [*roots, *inner, *(one for folder in inner for one in _splits_in(folder))]

    def is_own(self, file: Path) -> bool:
        """Return True for a file that the tool wrote."""
        if file.suffix.lower() != self.suffix:
            return False
        with file.open("rb") as stream:
            return self.begins(stream.read(BEGINNING).replace(b"\0", b""))  # without the zeros of UTF-16


def box_around(points: Sequence[Sequence[float]]) -> Corners:
    """The corners of the box around points (x, y)."""
    across, down = [point[0] for point in points], [point[1] for point in points]
    return min(across), min(down), max(across), max(down)


def turned_box(corners: Corners, degrees: float, about: Sequence[float]) -> Corners:
    """The box around a box that is turned clockwise about a point."""
    left, top, right, bottom = corners
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    shifts = [(x - about[0], y - about[1]) for x in (left, right) for y in (top, bottom)]
    return box_around([(about[0] + x * cosine - y * sine, about[1] + x * sine + y * cosine) for x, y in shifts])


def points_of(entry: Fields, name: str) -> list[list[float]]:
    """The points (x, y) of a list, at least one. Raises `DataError` for anything else."""
    given = entry.value(name)
    if not isinstance(given, list) or not given or any(not isinstance(one, list) or len(one) != 2 for one in given):
        entry.fail(f"{name} is no list of points [x, y]")
    return [entry.numbers_of(name, one) for one in given]


def _splits_in(path: Path) -> list[Path]:
    return [folder for own in folders_of_splits(path).values() for folder in own]


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _split_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts[:-1]
    return next((split for part in parts if (split := split_of(part))), None) or plain_split_of(file.stem) or "train"

"""The headers of pictures: size and EXIF orientation, without decoding; boxes and masks turned as a picture is."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from modelpatch.backbone.preprocessing import ORIENTATION, UNREADABLE, ImageSource, open_image
from modelpatch.errors import DataError

UPRIGHT = 1
EXIF_MARKS = (b"eXIf", b"exif", b"tiff:Orientation")  # in a PNG, which Pillow decodes to look for one
Size = tuple[int, int]
Corners = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Orientation:
    """The size of a picture as it is shown, and the EXIF orientation (1 to 8) that turns its stored pixels so."""

    size: Size
    orientation: int = UPRIGHT

    @property
    def stored(self) -> Size:
        """Width and height of the stored pixels."""
        return self.size[::-1] if self.orientation >= 5 else self.size

    def turn_box(self, corners: Corners) -> Corners:
        """A box of the stored pixels in the picture as it is shown."""
        (width, height), (left, top, right, bottom) = self.stored, corners
        if self.orientation in (2, 3, 7, 8):
            left, right = width - right, width - left
        if self.orientation in (3, 4, 6, 7):
            top, bottom = height - bottom, height - top
        return (left, top, right, bottom) if self.orientation < 5 else (top, left, bottom, right)


def read_header(source: ImageSource) -> Orientation | None:
    """The header of a picture, None for one that cannot be read."""
    if isinstance(source, np.ndarray):
        return Orientation((source.shape[1], source.shape[0]))
    try:
        if isinstance(source, Image.Image):
            return _header_of(source, source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.format == "PNG" and not _marked(source):
                return Orientation(picture.size)
            return _header_of(picture, source)
    except (*UNREADABLE, DataError):
        return None


def _header_of(picture: Image.Image, source: ImageSource) -> Orientation:
    orientation = picture.getexif().get(ORIENTATION, UPRIGHT)
    if orientation == UPRIGHT or orientation not in range(1, 9):
        return Orientation(picture.size)
    return Orientation(
        open_image(source).size, orientation
    )  # formats differ in which of the two sizes their header tells


def _marked(source: ImageSource) -> bool:
    content = Path(source).read_bytes() if isinstance(source, str | Path) else source
    return isinstance(content, bytes) and any(mark in content for mark in EXIF_MARKS)


def find_stored(headers: Sequence[Orientation], recorded: Sequence[Size | None]) -> tuple[list[bool], list[int]]:
    """For each picture, True where what describes it is of its stored pixels; and the rows that nothing decides.

    A recorded size that is the stored one, and not the shown one, says so. Turned pictures whose two sizes are equal, or of
    which none is recorded, follow the others; without any, they are described as they are shown.
    """
    known: dict[int, bool] = {}
    turned = [row for row, header in enumerate(headers) if header.orientation != UPRIGHT]
    for row in turned:
        header, size = headers[row], recorded[row]
        if header.stored != header.size and size in (header.stored, header.size):
            known[row] = size == header.stored
    rest = len(set(known.values())) == 1 and next(iter(known.values()))
    open_rows = [row for row in turned if row not in known]
    stored = [False] * len(headers)
    for row in turned:
        stored[row] = known.get(row, rest)
    return stored, open_rows

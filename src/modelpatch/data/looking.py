"""A look at single pictures: size, mode, orientation, hashes of their pixels, and the facts of their targets.

Nothing of a picture is kept but these facts, so that a look at many takes little memory.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from modelpatch.backbone.preprocessing import ORIENTATION, ImageSource, open_image
from modelpatch.data.seeding import seeded
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.kind import Kind, TargetFacts
from modelpatch.text import first_line

SMALL, COARSE, WAVES = 32, 16, 8  # sides of the grey picture, of its average, and of its lowest frequencies
GREY_STEP = 2  # of 255: differences of channels that are noise
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "MPO")
COSINES = np.cos(np.pi * np.outer(np.arange(WAVES), 2 * np.arange(SMALL) + 1) / (2 * SMALL))
WAVES_APART, ALIKE = 6, 0.985  # bits, and correlation of grey values, up to and from which pictures look alike
AT_ONCE = 256  # pictures that threads are given


class PictureHeader(NamedTuple):
    """Facts of a picture that its file states: format, mode, and signs of what a conversion to RGB changes."""

    format: str
    mode: str
    turned: bool = False
    deep: bool = False
    alpha: bool = False
    moving: bool = False


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """Facts of one picture; width and height in pixels are those of the upright picture.

    `brightest` is the largest value, 0 to 255, of the picture in 32 x 32 pixels. `pixels` is a hash of the RGB pixels. `waves`
    are 64 bits, the signs of the lowest frequencies of its cosine transform (a perceptual hash), and `coarse` is the picture
    in 16 x 16 grey values.
    """

    width: int
    height: int
    header: PictureHeader
    grey: bool
    blank: bool
    brightest: int
    pixels: bytes
    waves: int
    coarse: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """One row of a split that was looked at. `problem` says what cannot be read, the picture or its target."""

    row: int
    picture: PictureFacts | None = None
    target: TargetFacts | None = None
    problem: str = ""


def look_at(source: ImageSource) -> PictureFacts:
    """The facts of a picture. Raises `DataError` for one that cannot be read."""
    header = read_header(source)
    image = open_image(source)
    small = image.resize((SMALL, SMALL), Image.Resampling.BOX, reducing_gap=2.0)
    colors = np.asarray(small, dtype=np.int16)
    values = np.asarray(small.convert("L"), dtype=np.float64)
    low = (COSINES @ values @ COSINES.T).ravel()
    coarse = values.reshape(COARSE, 2, COARSE, 2).mean((1, 3)).round().astype(np.uint8)
    return PictureFacts(
        *image.size,
        header,
        grey=int(np.ptp(colors, axis=2).max()) <= GREY_STEP,
        blank=int(np.ptp(colors, axis=(0, 1)).max()) == 0,
        brightest=int(colors.max()),
        pixels=hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest(),
        waves=int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big"),
        coarse=coarse.tobytes(),
    )


def read_header(source: ImageSource) -> PictureHeader:
    """The facts that a picture's file states. A source that Pillow does not open has no mode of its own."""
    if isinstance(source, np.ndarray):
        channels = source.shape[2] if source.ndim == 3 else 1
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")
        return PictureHeader("array", mode, deep=source.dtype.itemsize > 1, alpha=channels == 4)
    if isinstance(source, Image.Image):
        return _header(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    with suppress(Exception), Image.open(opened) as image:  # `open_image` says what is wrong with one that fails
        return _header(image)
    suffix = "" if isinstance(source, bytes) else Path(source).suffix
    return PictureHeader(suffix.lstrip(".").upper() or "unknown", "")


def _header(image: Image.Image) -> PictureHeader:
    stored = str(getattr(image, "tile", ""))  # names the layout of the file's numbers, such as RGB;16B
    moving = image.format in ANIMATED and bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    deep = image.mode == "F" or image.mode.startswith("I") or ";16" in stored
    alpha = image.mode in ALPHA_MODES or "transparency" in image.info
    turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
    return PictureHeader(image.format or "memory", image.mode, turned, deep, alpha, moving)


def look_through(
    split: Split, rows: Sequence[int], kind: Kind, advance: Callable[[int], object] = lambda _: None
) -> Iterator[Seen]:
    """Look at these rows of a split, in threads where it can be read in threads."""

    def look(row: int) -> Seen:
        try:
            source, target = split[row]
            picture = look_at(source)
        except DataError as error:
            return Seen(row, problem=first_line(error))
        try:
            return Seen(row, picture, kind.examine(target, (picture.width, picture.height)))
        except DataError as error:
            return Seen(row, picture, problem=first_line(error))

    if not split.reads_in_threads:
        for row in rows:
            with seeded(0, row):
                seen = look(row)
            advance(1)
            yield seen
        return
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), AT_ONCE):  # Ctrl-C waits for these alone
            for seen in pool.map(look, rows[start : start + AT_ONCE]):
                advance(1)
                yield seen


def find_alike(first: Sequence[PictureFacts], second: Sequence[PictureFacts]) -> list[tuple[int, int]]:
    """Pairs of numbers of pictures of two lists that look alike but differ in pixels: the closest one for each of `second`.

    Pairs differ in at most 6 of 64 bits of their perceptual hashes, and their 16 x 16 grey values correlate by at least 0.985.
    """
    if not first or not second:
        return []
    ours, patterns = _signs(first), _patterns(first)
    pairs = []
    for start in range(0, len(second), AT_ONCE):
        theirs = second[start : start + AT_ONCE]
        apart = np.bitwise_count(ours[None, :] ^ _signs(theirs)[:, None])
        likeness = np.where(apart <= WAVES_APART, _patterns(theirs) @ patterns.T, -1)
        for number, own in enumerate(theirs):
            other = int(likeness[number].argmax())
            if likeness[number, other] >= ALIKE and first[other].pixels != own.pixels:
                pairs.append((other, start + number))
    return pairs


def _signs(pictures: Sequence[PictureFacts]) -> np.ndarray:
    return np.array([picture.waves for picture in pictures], dtype=np.uint64)


def _patterns(pictures: Sequence[PictureFacts]) -> np.ndarray:
    """Grey values (N, 256) with mean 0 and length 1, zero for a picture of one value."""
    values = np.frombuffer(b"".join(one.coarse for one in pictures), dtype=np.uint8).reshape(len(pictures), -1)
    centred = values - values.mean(1, dtype=np.float32, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(length, 1e-6), dtype=np.float32)

"""Pictures of other channels than colour's three: arrays and TIFF files of several bands, resized and cropped as Pillow does.

A band is a grey picture of its own; what is done to a picture is done to each.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelpatch.errors import DataError

NUMPY = b"\x93NUMPY"
Range = tuple[float, float] | None


class Bands:
    """A picture of any number of 8-bit bands, with the part of Pillow's interface that framing uses."""

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = tuple(bands)
        self.size: tuple[int, int] = self.bands[0].size
        self.width, self.height = self.size

    def resize(self, size: tuple[int, int], method: Any) -> "Bands":
        return Bands([band.resize(size, method) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        return Bands([band.crop(box) for band in self.bands])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """uint8 (H, W, C)."""
        return np.stack([np.asarray(band) for band in self.bands], -1).astype(dtype or np.uint8)


def bordered(picture: Any, side: int, at: tuple[int, int], fill: Sequence[int]) -> Any:
    """A square of `side` pixels of the colour `fill` with a picture pasted into it."""
    if isinstance(picture, Bands):
        return Bands([bordered(one, side, at, [value]) for one, value in zip(picture.bands, fill, strict=True)])
    square = Image.new(picture.mode, (side, side), fill[0] if len(fill) == 1 else tuple(fill))
    square.paste(picture, at)
    return square


def name_of(source: Any) -> str:
    """The path of a source, for error messages."""
    return str(source) if isinstance(source, str | Path) else "the image"


def read_array(source: Any) -> np.ndarray | None:
    """The array of a `.npy` file or its bytes, or the array that is given; None for another source. Raises `DataError`."""
    if isinstance(source, np.ndarray):
        return source
    try:
        if isinstance(source, str | Path) and str(source).lower().endswith(".npy"):
            return np.load(source, allow_pickle=False)
        if isinstance(source, bytes) and source.startswith(NUMPY):
            return np.load(io.BytesIO(source), allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise DataError(
            f"{name_of(source)} cannot be read as an array: {error}. Expected numbers, as numpy.save writes them."
        ) from error
    return None


def range_of(values: np.ndarray | None) -> Range:
    """The least and the largest of an array's numbers, where its type has no range of its own; None for others."""
    if values is None or values.dtype.kind not in "if" or not values.size:
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return (low, high) if low < high else (low, low + 1)


def to_bytes(values: np.ndarray, given: Range, name: str) -> np.ndarray:
    """Numbers as uint8: from a stated range, else 8 bits as they are, 16 bits by their own. Raises `DataError` for others."""
    if given is None and values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if given is None and values.dtype == np.uint8:
        return values
    if given is None and values.dtype == np.uint16:
        return (values // 257).astype(np.uint8)
    if values.dtype.kind not in "uif":
        raise DataError(f"{name} holds {values.dtype} values; expected numbers.")
    if given is None:
        raise DataError(
            f"{name} holds {values.dtype} values, which have no range of their own. State it: "
            "Preprocessing(value_range=(black, white))."
        )
    low, high = given
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.clip(np.nan_to_num(scaled), 0, 255).astype(np.uint8)


def open_bands(source: Any, channels: int, given: Range, open_file: Callable[[Any], Image.Image]) -> Bands:
    """A picture of `channels` bands from an array (H, W, C) or (C, H, W), a `.npy` file, or a TIFF file of bands or pages.

    Raises `DataError` for another number of bands.
    """
    name, values = name_of(source), read_array(source)
    if values is None:
        values = _read_pages(open_file(source))
    if values.ndim == 3 and values.shape[-1] != channels and values.shape[0] == channels:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[-1] != channels or 0 in values.shape:
        raise DataError(f"{name} has the shape {values.shape}; expected {channels} channels: (H, W, {channels}).")
    planes = to_bytes(values, given, name)
    return Bands([Image.fromarray(np.ascontiguousarray(planes[..., band])) for band in range(channels)])


def _read_pages(image: Image.Image) -> np.ndarray:
    """The bands of a picture, and of all its pages, side by side (H, W, C). Raises `DataError` for pages of several sizes."""
    pages = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        page = np.asarray(image)
        pages.append(page[:, :, None] if page.ndim == 2 else page)
    if len({page.shape[:2] for page in pages}) > 1:
        raise DataError("the pages of the image have several sizes; expected one, a page a channel.")
    return np.concatenate(pages, -1)

"""Images of requests: formats on a list, pixels counted before they are decoded, a clear error for anything else."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.serve.problems import Problem

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")


@dataclass(frozen=True)
class Decoded:
    """uint8 crops (3, S, S) of an image, one for every preprocessing, and its own width and height, upright."""

    crops: Mapping[Preprocessing, Tensor]
    size: tuple[int, int]


def decode(data: bytes, kinds: Iterable[Preprocessing], pixels: int) -> Decoded:
    """An encoded image as every preprocessing sees it.

    Only the first frame of an animation is read. Raises `Problem`: 413 for more than `pixels`, in the file or as resized,
    422 for anything but an image of a known format.
    """
    wanted = list(dict.fromkeys(kinds))
    if not data:
        raise Problem("unreadable-image", "The image is empty: 0 bytes.", "Send the bytes of the file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below it
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, wanted, pixels)
        ImageOps.exif_transpose(image, in_place=True)  # so that the image as it was is not kept beside
        whole = open_image(image)
        return Decoded({kind: kind.center_crop(kind.decode(whole)) for kind in wanted}, whole.size)
    except Problem:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Problem("too-large", f"The image is too large: {error}.", "Send a smaller one.") from error
    except UnidentifiedImageError as error:
        said = f"The image's format is not known. Expected {', '.join(FORMATS)}."
        raise Problem("unreadable-image", said, "Convert it.") from error
    except Exception as error:  # Pillow's parsers raise dozens of kinds for files that were made to hurt
        said = f"{type(error).__name__}: {error}"[:200]
        raise Problem("unreadable-image", f"The image cannot be decoded: {said}.", "Save it again.") from error


def _check_size(image: Image.Image, kinds: Iterable[Preprocessing], pixels: int) -> None:
    width, height = image.size
    short, long = max(1, min(width, height)), max(width, height)
    sizes = {"": width * height}  # the shorter side becomes `resize_to`, which makes a long strip enormous
    sizes |= {f" as resized to {kind.resize_to} px": kind.resize_to**2 * long // short for kind in kinds}
    for how, count in sizes.items():
        if count > pixels:
            said = f"The image of {width} x {height} has {count:,} pixels{how}; this server takes {pixels:,}."
            raise Problem("too-large", said, "Resize or crop it first.")

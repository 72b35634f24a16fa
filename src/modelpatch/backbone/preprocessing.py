"""From an image to the tensor a backbone expects: one way to decode, resize, crop and normalise, used everywhere."""

import io
import math
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from torch import Tensor

from modelpatch.errors import BackboneError, DataError

ImageSource = str | Path | bytes | Image.Image | np.ndarray
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Framing = Literal["crop", "stretch"]
Three = tuple[float, float, float]
MAX_PIXELS = 8192
LONGEST = 64
ORIENTATION = 0x0112  # the EXIF tag
STRIP = 2**18  # pixels that are converted at once
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif"})


class Preprocessing(BaseModel, frozen=True, extra="forbid"):
    """The preprocessing of a backbone's images. `input_size` is (channels, height, width), in pixels, square.

    With the framing `crop` an image is resized so that its shorter side is `resize_to` = floor(size / crop_pct) pixels and its
    centre is cropped to `input_size`; `stretch` resizes the whole image to `input_size`, so that nothing of it is lost. Its
    values in [0, 1] become (value - mean) / std.
    """

    input_size: tuple[Literal[3], int, int] = (3, 224, 224)
    mean: Three = (0.485, 0.456, 0.406)
    std: Three = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    framing: Framing = "crop"

    @field_validator("input_size")
    @classmethod
    def _square(cls, size: tuple[int, int, int]) -> tuple[int, int, int]:
        if size[1] != size[2] or not 0 < size[1] <= MAX_PIXELS:
            raise ValueError(f"images of {size[1]} x {size[2]} pixels; expected squares of 1 to {MAX_PIXELS}")
        return size

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, values: Three, info: ValidationInfo) -> Three:
        if not all(map(math.isfinite, values)) or (info.field_name == "std" and min(values) <= 0):
            raise ValueError(f"{info.field_name} {values} cannot normalise an image")
        return values

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.input_size[1]

    @property
    def resize_to(self) -> int:
        """Length of the shorter side before the centre crop, in pixels."""
        return self.image_size if self.framing == "stretch" else math.floor(self.image_size / self.crop_pct)

    def with_image_size(self, pixels: int | None) -> Self:
        """The same preprocessing at another resolution; None keeps it. Raises `BackboneError` for a size out of range."""
        if pixels is None:
            return self
        if type(pixels) is not int or not 0 < pixels <= MAX_PIXELS:
            raise BackboneError(f"the image size is {pixels!r}; expected a whole number from 1 to {MAX_PIXELS}.")
        return self.model_copy(update={"input_size": (3, pixels, pixels)})

    def decode(self, source: ImageSource) -> Tensor:
        """uint8 (3, R, R) with R = `resize_to`: decoded, turned upright, framed. Raises `DataError` for what is no image."""
        pixels = np.array(self.frame(open_image(source)))
        # numpy copies in this thread alone: torch would give each thread that decodes OpenMP helpers, which slow all others
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def frame(self, image: Image.Image, interpolation: Interpolation | None = None) -> Image.Image:
        """The picture as a square of `resize_to` pixels a side: resized, and its centre cropped unless it is stretched.

        Another `interpolation` than the backbone's is for what lies over an image: a mask. Raises `DataError` for strips.
        """
        side = self.resize_to
        if max(image.size) > LONGEST * min(image.size):  # resized, such a strip takes any amount of memory
            given = f"{image.width} x {image.height}"
            raise DataError(f"an image of {given} pixels is more than {LONGEST} times as long as wide. Crop it first.")
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        if self.framing == "stretch":
            size = (side, side)
        if size != image.size:
            image = image.resize(size, getattr(Image.Resampling, (interpolation or self.interpolation).upper()))
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return image.crop((left, top, left + side, top + side))

    def framed_area(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image of this size that the network sees: (left, top, width, height) in the image's own pixels."""
        if self.framing == "stretch":
            return 0.0, 0.0, float(width), float(height)
        side = min(width, height) * self.image_size / self.resize_to
        return (width - side) / 2, (height - side) / 2, side, side

    def center_crop(self, images: Tensor) -> Tensor:
        """(..., R, R) to (..., size, size)."""
        top = (images.shape[-2] - self.image_size) // 2
        return images[..., top : top + self.image_size, top : top + self.image_size]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 255], (B, 3, H, W) to float32 with the backbone's mean and deviation."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1) * 255
        return (images.float() - mean) / std

    def __call__(self, *sources: ImageSource) -> Tensor:
        """Images to a float32 batch (B, 3, H, W)."""
        return self.normalize(self.center_crop(torch.stack([self.decode(source) for source in sources])))


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def image_bytes(source: ImageSource) -> bytes:
    """The identity of an image: the bytes of its file, or of its pixels in memory. Raises `DataError`."""
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"{source} cannot be read as an image: {error}") from error
    return source if isinstance(source, bytes) else source.tobytes()


def open_image(source: ImageSource) -> Image.Image:
    """An RGB image from a path, encoded bytes, an array (H, W[, 3]) uint8 or a Pillow image.

    Raises `DataError` for what is not an image, is truncated, or has more pixels than Pillow's safety limit.
    """
    name = str(source) if isinstance(source, str | Path) else "the image"
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        elif isinstance(source, Image.Image):
            image = source
        elif not isinstance(source, str | Path | bytes):
            raise TypeError(f"a {type(source).__name__} is no path, bytes, array or Pillow image")
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return _to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright and RGB, a strip at a time: beside the image and its result nothing of their size is made."""
    if image.getexif().get(ORIENTATION, 1) != 1:  # asked here, as Pillow copies an image that is upright
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    brightest = max(float(image.getextrema()[1]), 1.0) if image.mode == "F" else 0.0  # type: ignore[arg-type]
    result = Image.new("RGB", image.size)
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_strip_to_rgb(strip, brightest), (0, top))
    return result


def _strip_to_rgb(image: Image.Image, brightest: float) -> Image.Image:
    if image.mode == "F":
        image = Image.fromarray(np.clip(np.asarray(image) / brightest * 255, 0, 255).astype(np.uint8))
    elif image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

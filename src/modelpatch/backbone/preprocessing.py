"""From an image to the tensor a backbone expects: one way to decode, resize, crop and normalise, used everywhere."""

import io
import math
import os
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from modelpatch.backbone.bands import Bands, Range, bordered, name_of, open_bands, range_of, read_array, to_bytes
from modelpatch.backbone.framing import Framing, Rounding, edge_of, place
from modelpatch.backbone.listing import list_folder
from modelpatch.errors import BackboneError, DataError, DepthWarning
from modelpatch.plain_files import check_plain, read_plain

ImageSource = str | Path | bytes | Image.Image | np.ndarray
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Picture = Image.Image | Bands
P = TypeVar("P", bound=Picture)
Numbers = tuple[float, ...]
MAX_PIXELS = 8192
MAX_CHANNELS = 256
LONGEST = 64
ORIENTATION = 0x0112  # the EXIF tag
DEEP = 2**14  # a 16-bit picture without values beyond it has 14 bits or fewer
UNREADABLE = (  # what Pillow's decoders raise for files that are damaged, or no pictures
    UnidentifiedImageError,
    OSError,
    EOFError,
    SyntaxError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
STRIP = 2**18  # pixels that are converted at once
IMAGE_SUFFIXES = frozenset(  # of the formats that Pillow decodes by itself
    str.split(
        ".jpg .jpeg .jpe .jfif .jfi .jif .mpo .png .apng .gif .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .icb "
        ".vda .vst .jp2 .j2k .j2c .jpc .jpf .jpx .ico .cur .pcx .dds .sgi .rgb .rgba .bw .ras .xbm .xpm .qoi .fits .psd"
    )
) | frozenset(str.split(".avif .avifs") if find_spec("PIL._avif") else ())


class Preprocessing(BaseModel, frozen=True, extra="forbid"):
    """The preprocessing of a backbone's images. `input_size` is (channels, height, width), in pixels, square.

    With the framing `crop` an image is resized so that its shorter side is floor(size / crop_pct) pixels and its centre is
    cropped to `input_size` (for a crop_pct beyond 1 a border is added); `stretch` resizes the whole image to `input_size`, so
    that nothing of it is lost; `squash` resizes both sides to floor(size / crop_pct) pixels and crops; `border` resizes the
    longer side and fills up with `fill`, by default the mean (see `framing.py`). Its values in [0, 1] become
    (value - mean) / std, one of each a channel.

    `value_range` are the values that become 0 and 1 in pictures of more than 8 bits (12 bits in 16-bit files: (0, 4095));
    without it those of 16 bits are (0, 65535). `rounding` is `first` in the patch files of the first edition.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: Numbers = (0.485, 0.456, 0.406)
    std: Numbers = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    crop_pct: float = Field(default=0.875, gt=0, le=1.25)
    framing: Framing = "crop"
    fill: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    rounding: Rounding = "exact"

    @field_validator("input_size")
    @classmethod
    def _square(cls, size: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 0 < size[0] <= MAX_CHANNELS:
            raise ValueError(f"images of {size[0]} channels; expected 1 to {MAX_CHANNELS}")
        if size[1] != size[2] or not 0 < size[1] <= MAX_PIXELS:
            raise ValueError(f"images of {size[1]} x {size[2]} pixels; expected squares of 1 to {MAX_PIXELS}")
        return size

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, values: Numbers, info: ValidationInfo) -> Numbers:
        if not all(map(math.isfinite, values)) or (info.field_name == "std" and min(values, default=0) <= 0):
            raise ValueError(f"{info.field_name} {values} cannot normalise an image")
        return values

    @field_validator("value_range")
    @classmethod
    def _rising(cls, values: tuple[float, float] | None) -> tuple[float, float] | None:
        if values is not None and not (all(map(math.isfinite, values)) and values[0] < values[1]):
            raise ValueError(f"value_range {values}; expected the values of black and of white")
        return values

    @model_validator(mode="after")
    def _one_a_channel(self) -> Self:
        channels = self.channels
        for name in ("mean", "std"):
            if len(getattr(self, name)) != channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers for {channels} channels; expected one each"
                )
        if self.fill is not None and (len(self.fill) != channels or not all(0 <= one <= 255 for one in self.fill)):
            raise ValueError(f"fill {self.fill}; expected {channels} numbers from 0 to 255")
        return self

    @property
    def channels(self) -> int:
        """Channels of an image: 3 for colour, 1 for grey."""
        return self.input_size[0]

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.input_size[1]

    @property
    def scale_to(self) -> int:
        """Pixels that a side of the image becomes."""
        return self.image_size if self.framing == "stretch" else math.floor(self.image_size / self.crop_pct)

    @property
    def resize_to(self) -> int:
        """Side of the frame before the centre crop, R, in pixels."""
        return max(self.scale_to, self.image_size)

    def with_image_size(self, pixels: int | None) -> Self:
        """The same preprocessing at another resolution; None keeps it. Raises `BackboneError` for a size out of range."""
        if pixels is None:
            return self
        if type(pixels) is not int or not 0 < pixels <= MAX_PIXELS:
            raise BackboneError(f"the image size is {pixels!r}; expected a whole number from 1 to {MAX_PIXELS}.")
        return self.model_copy(update={"input_size": (self.channels, pixels, pixels)})

    @property
    def edge(self) -> int:
        """Pixels at the left and at the top of a frame that the centre crop leaves out."""
        return edge_of(self.resize_to, self.image_size, self.rounding)

    def open(self, source: ImageSource | Bands) -> Picture:
        """The picture with the network's channels, upright: a Pillow image for one or three. Raises `DataError`."""
        return open_picture(source, self.channels, self.value_range)

    def decode(self, source: ImageSource | Bands) -> Tensor:
        """uint8 (C, R, R) with R = `resize_to`: decoded, turned upright, framed. Raises `DataError` for what is no image."""
        pixels = np.array(self.frame(self.open(source)))
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        # numpy copies in this thread alone: torch would give each thread that decodes OpenMP helpers, which slow all others
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def frame(self, image: P, interpolation: Interpolation | None = None, fill: int | None = None) -> P:
        """The picture as a square of `resize_to` pixels a side.

        Another `interpolation` than the backbone's, and another `fill` of borders, are for what lies over an image: a mask.
        Raises `DataError` for strips.
        """
        if max(image.size) > LONGEST * min(image.size):  # resized, such a strip takes any amount of memory
            given = f"{image.width} x {image.height}"
            raise DataError(f"an image of {given} pixels is more than {LONGEST} times as long as wide. Crop it first.")
        side = self.resize_to
        width, height, left, top = place(*image.size, self.scale_to, self.image_size, self.framing, self.rounding)
        if (width, height) != image.size:
            method = getattr(Image.Resampling, (interpolation or self.interpolation).upper())
            image = image.resize((width, height), method)  # type: ignore[assignment]
        box = (left, top, left + side, top + side)
        if box == (0, 0, width, height):
            return image
        if min(box[:2]) >= 0 and box[2] <= width and box[3] <= height:
            return image.crop(box)  # type: ignore[return-value]
        colour = (fill,) if fill is not None else self.fill or tuple(round(255 * value) for value in self.mean)
        return bordered(image, side, (-left, -top), colour)

    def framed_area(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image of this size that the network sees: (left, top, width, height) in the image's own pixels.

        With borders it is larger than the image.
        """
        side = self.image_size
        if self.framing == "crop":
            seen = min(width, height) * side / self.scale_to
            return (width - seen) / 2, (height - seen) / 2, seen, seen
        at = place(width, height, self.scale_to, side, self.framing, self.rounding)
        across, down = width / at.width, height / at.height
        return (at.left + self.edge) * across, (at.top + self.edge) * down, side * across, side * down

    def center_crop(self, images: Tensor) -> Tensor:
        """(..., R, R) to (..., size, size)."""
        top = edge_of(images.shape[-2], self.image_size, self.rounding)
        return images[..., top : top + self.image_size, top : top + self.image_size]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 255], (B, C, H, W) to float32 with the backbone's mean and deviation."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1) * 255
        return (images.float() - mean) / std

    def __call__(self, *sources: ImageSource) -> Tensor:
        """Images to a float32 batch (B, C, H, W)."""
        return self.normalize(self.center_crop(torch.stack([self.decode(source) for source in sources])))


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; hidden ones are passed over."""
    files = [file for listing in list_folder(folder).below() for file in listing.files]
    return sorted(file for file in files if is_picture(file.name))


def is_picture(name: str) -> bool:
    """Return True for a file's name that ends as those of pictures do."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_bytes(source: ImageSource) -> bytes:
    """The identity of an image: the bytes of its file, or of its pixels in memory. Raises `DataError`."""
    if isinstance(source, str | Path):
        try:
            return read_plain(source)
        except OSError as error:
            raise DataError(f"{source} cannot be read as an image: {error}") from error
    return source if isinstance(source, bytes) else source.tobytes()


def open_picture(source: Any, channels: int, value_range: Range = None) -> Picture:
    """A picture with this number of channels: RGB, grey (`L`), or bands. Raises `DataError`."""
    if isinstance(source, Bands):
        return source
    if channels == 3:
        return open_image(source, value_range)
    if channels == 1:
        grey = isinstance(source, Image.Image) and source.mode == "L"
        return source if grey else open_image(source, value_range).convert("L")
    try:
        return open_bands(source, channels, value_range, _open_file)
    except UNREADABLE as error:
        raise DataError(
            f"{name_of(source)} cannot be read as an image: {str(error) or type(error).__name__}"
        ) from error


def open_any(source: Any) -> Picture:
    """A picture for its size and its content, whatever channels and values it has: RGB, or bands. Raises `DataError`."""
    values = read_array(source)
    if values is None or values.ndim != 3 or values.shape[2] in (1, 3, 4):
        return open_image(source if values is None else values, range_of(values))
    return open_bands(values, values.shape[2], range_of(values), _open_file)


def open_image(source: ImageSource, value_range: Range = None) -> Image.Image:
    """An RGB image from a path, encoded bytes, an array (H, W[, 1 or 3 or 4]) or a Pillow image.

    `value_range` are the values of black and white in pictures of more than 8 bits. Raises `DataError` for what is not an
    image, is truncated, or has more pixels than Pillow's safety limit.
    """
    name = name_of(source)
    values = read_array(source)
    if values is not None and values.dtype != np.uint8 and values.ndim in (2, 3):
        values = to_bytes(values, value_range, name)
    if values is not None and values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    try:
        return _to_rgb(_open_file(source) if values is None else Image.fromarray(values), value_range)
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error


def _open_file(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path | bytes):
        raise TypeError(f"a {type(source).__name__} is no path, bytes, array or Pillow image")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else check_plain(source))


def _to_rgb(image: Image.Image, given: Range) -> Image.Image:
    """Upright and RGB, a strip at a time: beside the image and its result nothing of their size is made."""
    if image.getexif().get(ORIENTATION, 1) != 1:  # asked here, as Pillow copies an image that is upright
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if given is None and image.mode == "F":
        given = 0.0, max(float(image.getextrema()[1]), 1.0)  # type: ignore[arg-type]
    elif given is None and image.mode.startswith("I"):
        given = 0.0, 65535.0
        _warn_of_depth(image)
    result = Image.new("RGB", image.size)
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_strip_to_rgb(strip, given), (0, top))
    return result


def _warn_of_depth(image: Image.Image) -> None:
    """Warn of 16-bit pictures whose values are of fewer bits: they come out nearly black."""
    if 255 < float(image.getextrema()[1]) < DEEP:  # type: ignore[arg-type]
        warnings.warn(
            f"a 16-bit picture has no value beyond {DEEP - 1:,} of 65,535. If its values have fewer bits, state their range: "
            "Preprocessing(value_range=(0, 4095)) for 12.",
            DepthWarning,
            stacklevel=2,
        )


def _strip_to_rgb(image: Image.Image, given: Range) -> Image.Image:
    if given == (0.0, 65535.0) and image.mode.startswith("I"):  # Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(to_bytes(np.asarray(image), given, "the image"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

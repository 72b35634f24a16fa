"""The common corruptions of CIFAR-10-C and ImageNet-C: 15 kinds at 5 severities, and tasks whose images are corrupted.

    noise      gaussian_noise, shot_noise, impulse_noise
    blur       defocus_blur, glass_blur, motion_blur, zoom_blur
    weather    snow, frost, fog, brightness
    digital    contrast, elastic_transform, pixelate, jpeg_compression

Hendrycks and Dietterich: *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations* (ICLR 2019). Images
whose shorter side is at most 64 pixels take the constants of CIFAR-10-C, larger ones those of ImageNet-C; lengths in pixels
are for sides of 32 and 224 and grow with the image. Two kinds differ from the published ones: frost lies on the image as a
made-up texture instead of photographs, and motion is blurred along a line without ImageMagick.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from modelpatch import Task
from modelpatch.backbone import open_image
from modelpatch.data import Split
from modelpatch.errors import DataError

SMALL = 64  # pixels: the shorter side up to which an image counts as small
SIDES = (32, 224)  # of the images that the constants of small and of large images are for
SEVERITIES = (1, 2, 3, 4, 5)

Pixels = np.ndarray  # float64 (H, W, 3) in [0, 1]


# filters ------------------------------------------------------------------------------------------------------------


def _mirrored(places: np.ndarray, size: int) -> np.ndarray:
    """Whole places brought into [0, size) by mirroring at the borders."""
    places = places % (2 * size)
    return np.minimum(places, 2 * size - 1 - places)


@lru_cache(maxsize=64)
def _gaussian(size: int, sigma: float) -> np.ndarray:
    """The matrix (size, size) that blurs a line of pixels, mirrored at its ends."""
    if sigma <= 0:
        return np.eye(size)
    reach = max(math.ceil(4 * sigma), 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((size, size))
    for offset, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(size), _mirrored(np.arange(size) + offset, size)), weight)
    return matrix


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of the first two axes."""
    rows, columns = _gaussian(values.shape[0], sigma), _gaussian(values.shape[1], sigma)
    return np.moveaxis(np.tensordot(columns, np.tensordot(rows, values, (1, 0)), (1, 1)), 0, 1)


def _convolve(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolution of the first two axes with a kernel of odd size, mirrored at the borders."""
    reach = kernel.shape[0] // 2
    padded = np.pad(values, [(reach, reach)] * 2 + [(0, 0)] * (values.ndim - 2), mode="symmetric")
    size = (padded.shape[0] + 2 * reach, padded.shape[1] + 2 * reach)
    spectrum = np.fft.rfft2(kernel, size)
    product = np.fft.rfft2(padded, size, axes=(0, 1)) * spectrum.reshape(spectrum.shape + (1,) * (values.ndim - 2))
    whole = np.fft.irfft2(product, size, axes=(0, 1))
    return whole[2 * reach : 2 * reach + values.shape[0], 2 * reach : 2 * reach + values.shape[1]]


def _disk(radius: float, sigma: float) -> np.ndarray:
    """A disk with an edge blurred by `sigma`, adding up to 1."""
    reach = math.ceil(radius) + 2
    grid = np.arange(-reach, reach + 1)
    disk = 1.0 * (grid[:, None] ** 2 + grid**2 <= radius**2)
    return _blur(disk, sigma) / disk.sum()


def _line(radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Half a Gaussian from the centre on along a line of 2 radius pixels, adding up to 1."""
    steps = np.arange(0, 2 * radius + 1)
    reach = math.ceil(2 * radius) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    angle = math.radians(degrees)
    y, x = reach + steps * math.sin(angle), reach + steps * math.cos(angle)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    for more_y, more_x in itertools.product((0, 1), (0, 1)):
        share = np.abs(1 - more_y - (y - low_y)) * np.abs(1 - more_x - (x - low_x))
        places = np.minimum(low_y + more_y, 2 * reach), np.minimum(low_x + more_x, 2 * reach)
        np.add.at(kernel, places, share * weights)
    return kernel / kernel.sum()


def _sample(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values at places (H, W) between pixels, bilinear, mirrored at the borders."""
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    part_y, part_x = (
        (one - low).reshape(one.shape + (1,) * (values.ndim - 2)) for one, low in ((y, low_y), (x, low_x))
    )
    rows = [_mirrored(low_y + more, values.shape[0]) for more in (0, 1)]
    columns = [_mirrored(low_x + more, values.shape[1]) for more in (0, 1)]
    upper = values[rows[0], columns[0]] * (1 - part_x) + values[rows[0], columns[1]] * part_x
    lower = values[rows[1], columns[0]] * (1 - part_x) + values[rows[1], columns[1]] * part_x
    return upper * (1 - part_y) + lower * part_y


def _zoom(values: np.ndarray, factor: float) -> np.ndarray:
    """The middle of the picture enlarged to its size."""
    height, width = values.shape[:2]
    y, x = ((np.arange(size) - (size - 1) / 2) / factor + (size - 1) / 2 for size in (height, width))
    return _sample(values, *np.meshgrid(y, x, indexing="ij"))


def _clouds(height: int, width: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """Fractal clouds (H, W) in [0, 1]: diamonds and squares whose noise falls by `decay` squared from a size to its half."""
    size = 1 << max(height - 1, width - 1, 1).bit_length()
    clouds, step, noise = np.zeros((size, size)), size, 1.0

    def jitter() -> np.ndarray:
        return random.uniform(-noise, noise, (size // step, size // step))

    while step > 1:
        half = step // 2
        corners = clouds[::step, ::step]
        beside = corners + np.roll(corners, -1, 0)
        centres = (beside + np.roll(beside, -1, 1)) / 4 + jitter()
        clouds[half::step, half::step] = centres
        clouds[half::step, ::step] = (beside + centres + np.roll(centres, 1, 1)) / 4 + jitter()
        clouds[::step, half::step] = (
            corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 0)
        ) / 4 + jitter()
        step, noise = half, noise / decay**2
    clouds = clouds[:height, :width] - clouds[:height, :width].min()
    return clouds / max(clouds.max(), 1e-12)


# kinds --------------------------------------------------------------------------------------------------------------


def _gaussian_noise(x: Pixels, scale: float, random: np.random.Generator, deviation: float) -> Pixels:
    return x + random.normal(0, deviation, x.shape)


def _shot_noise(x: Pixels, scale: float, random: np.random.Generator, photons: float) -> Pixels:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, scale: float, random: np.random.Generator, share: float) -> Pixels:
    return np.where(random.random(x.shape) < share, random.integers(0, 2, x.shape), x)


def _defocus_blur(x: Pixels, scale: float, random: np.random.Generator, radius: float, edge: float) -> Pixels:
    return _convolve(x, _disk(radius * scale, edge))


def _glass_blur(x: Pixels, scale: float, random: np.random.Generator, sigma: float, reach: int, times: int) -> Pixels:
    """Pixels change places with others near by: those of one `phase` together, whose neighbourhoods do not touch."""
    reach = max(round(reach * scale), 1)
    shuffled, step = _blur(x, sigma * scale), 2 * reach + 1
    for phase in np.tile(np.arange(step * step), times):
        rows = np.arange(reach + phase // step, x.shape[0] - reach, step)
        columns = np.arange(reach + phase % step, x.shape[1] - reach, step)
        y, x_ = (places.ravel() for places in np.meshgrid(rows, columns, indexing="ij"))
        other_y, other_x = (places + random.integers(-reach, reach + 1, len(places)) for places in (y, x_))
        shuffled[y, x_], shuffled[other_y, other_x] = shuffled[other_y, other_x], shuffled[y, x_]
    return _blur(shuffled, sigma * scale)


def _motion_blur(x: Pixels, scale: float, random: np.random.Generator, radius: float, sigma: float) -> Pixels:
    return _convolve(x, _line(radius * scale, sigma * scale, random.uniform(-45, 45)))


def _zoom_blur(x: Pixels, scale: float, random: np.random.Generator, most: float, step: float) -> Pixels:
    factors = np.arange(1, most, step)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(
    x: Pixels, scale: float, random: np.random.Generator, mean: float, deviation: float, size: float, least: float,
    radius: float, sigma: float, kept: float,
) -> Pixels:  # fmt: skip
    flakes = _zoom(random.normal(mean, deviation, x.shape[:2]), max(size * scale, 1))
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _convolve(flakes, _line(radius * scale, sigma * scale, random.uniform(-135, -45)))[..., None]
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


def _frost(x: Pixels, scale: float, random: np.random.Generator, kept: float, laid: float) -> Pixels:
    """Crystals are the ridges of clouds, thick where other clouds are, a little blue."""
    height, width = x.shape[:2]
    ridges = 1 - np.abs(2 * _clouds(height, width, 1.3, random) - 1)
    ice = ridges**3 * 0.6 + 0.6 * _clouds(height, width, 1.6, random)
    return kept * x + laid * np.clip(ice[..., None] * np.array([0.88, 0.96, 1.0]), 0, 1)


def _fog(x: Pixels, scale: float, random: np.random.Generator, density: float, decay: float) -> Pixels:
    brightest = x.max()
    fog = density * _clouds(x.shape[0], x.shape[1], decay, random)[..., None]
    return (x + fog) * brightest / (brightest + density)


def _brightness(x: Pixels, scale: float, random: np.random.Generator, more: float) -> Pixels:
    """The value of hue, saturation, value."""
    value = x.max(2, keepdims=True)
    brighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def _contrast(x: Pixels, scale: float, random: np.random.Generator, kept: float) -> Pixels:
    mean = x.mean((0, 1))
    return (x - mean) * kept + mean


def _elastic_transform(
    x: Pixels, scale: float, random: np.random.Generator, strength: float, sigma: float, shift: float
) -> Pixels:
    """Three corners of a square in the middle are shifted, then every pixel is by blurred noise."""
    height, width = x.shape[:2]
    middle, arm = np.array([height, width]) / 2, min(height, width) / 3
    corners = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + random.uniform(-shift * scale, shift * scale, corners.shape)
    ones = np.ones((3, 1))
    back = np.linalg.lstsq(np.hstack([moved, ones]), corners, rcond=None)[0]
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    noise = _blur(random.uniform(-1, 1, (height, width, 2)), sigma * scale) * strength * scale
    y, x_ = np.moveaxis((places + noise) @ back[:2] + back[2], -1, 0)
    return _sample(x, y, x_)


def _pixelate(x: Pixels, scale: float, random: np.random.Generator, share: float) -> Pixels:
    image = Image.fromarray(_rounded(x))
    size = max(int(image.width * share), 1), max(int(image.height * share), 1)
    small = image.resize(size, Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def _jpeg_compression(x: Pixels, scale: float, random: np.random.Generator, quality: int) -> Pixels:
    file = BytesIO()
    Image.fromarray(_rounded(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _rounded(x: Pixels) -> np.ndarray:
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Corruption:
    """One kind: what it does to pixels, and its constants at severities 1 to 5 for small and for large images."""

    apply: Callable[..., Pixels]
    small: tuple[tuple[Any, ...], ...]
    large: tuple[tuple[Any, ...], ...]


def _single(*values: float) -> tuple[tuple[float], ...]:
    return tuple((value,) for value in values)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        _gaussian_noise, _single(0.04, 0.06, 0.08, 0.09, 0.10), _single(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(_shot_noise, _single(500, 250, 100, 75, 50), _single(60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(
        _impulse_noise, _single(0.01, 0.02, 0.03, 0.05, 0.07), _single(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": Corruption(
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        _motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
    ),
    "zoom_blur": Corruption(
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        _frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(_brightness, _single(0.05, 0.1, 0.15, 0.2, 0.3), _single(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, _single(0.75, 0.5, 0.4, 0.3, 0.15), _single(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": Corruption(_pixelate, _single(0.95, 0.9, 0.85, 0.75, 0.65), _single(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, _single(80, 65, 58, 50, 40), _single(25, 18, 15, 10, 7)),
}
KINDS = tuple(CORRUPTIONS)


# images and tasks -----------------------------------------------------------------------------------------------------


def corrupt(image: Any, kind: str, severity: int = 5, seed: int | Sequence[int] = 0) -> np.ndarray:
    """The image as uint8 (H, W, 3), corrupted, its randomness by `seed`. Raises `DataError` for no such kind or severity."""
    _check(kind, severity)
    pixels = np.asarray(open_image(image)) / 255
    side, corruption = min(pixels.shape[:2]), CORRUPTIONS[kind]
    small = side <= SMALL
    constants = (corruption.small if small else corruption.large)[severity - 1]
    scale = side / SIDES[0 if small else 1]
    return _rounded(corruption.apply(pixels, scale, np.random.default_rng(seed), *constants))


class CorruptedImages(Sequence[Any]):
    """Images that are corrupted whenever they are read, each always in the same way."""

    def __init__(self, images: Sequence[Any], kind: str, severity: int, seed: Sequence[int]) -> None:
        self.images, self.kind, self.severity, self.seed = images, kind, severity, tuple(seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        place = range(len(self))[row]
        return corrupt(self.images[place], self.kind, self.severity, (*self.seed, place))


def corrupted(data: Task, kind: str, severity: int = 5, seed: int = 0) -> Task:
    """The task with the images of all its splits corrupted, as they are read. Raises `DataError`.

    Every image has randomness of its own, which follows `seed`. Reading twice corrupts twice: `list(split.images)` keeps them.
    """
    if data.task.kind != "classification":
        raise DataError(f"{data.task.name} is a {data.task.kind} task. Expected images with one class each.")
    _check(kind, severity)

    def changed(split: Split, number: int) -> Split:
        return Split(CorruptedImages(split.images, kind, severity, (seed, number)), split.labels, split.targets)

    validation = None if data.validation is None else changed(data.validation, 2)
    task = data.task.model_copy(update={"name": f"{data.task.name}, {kind} {severity}"})
    facts = {**data.facts, "corruption": kind, "severity": severity, "corruption_seed": seed}
    return Task(task, changed(data.train, 0), changed(data.test, 1), validation, facts)


def _check(kind: str, severity: int) -> None:
    if kind not in CORRUPTIONS:
        raise DataError(f"there is no corruption {kind!r}. Expected one of: {', '.join(KINDS)}.")
    if severity not in SEVERITIES:
        raise DataError(f"the severity is {severity!r}; expected 1 to 5.")

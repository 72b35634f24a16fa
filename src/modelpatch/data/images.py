"""Decoded images in memory, or on disk when they would not fit, and the augmentation they are seen through."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.data.task import Split, source_size
from modelpatch.errors import TrainingError

SMALL_SOURCE = 64
PIECE = 2**17  # pixels
AugmentName = Literal["auto", "none", "light", "standard"]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, memory: int) -> Tensor:
    """An empty tensor of at most `memory` bytes in memory; a larger one lies in a file that vanishes with it.

    Raises `TrainingError` where the disk has no room for the file.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= memory:
        return torch.empty(shape, dtype=dtype)
    descriptor, path = tempfile.mkstemp(prefix="modelpatch-", suffix=".cache")
    try:
        _reserve(descriptor, size)
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(descriptor)
        os.unlink(path)  # the mapping keeps the bytes; a killed process leaves nothing behind
    return flat.view(dtype).view(shape)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, with room on the disk for all of them where the system can promise it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise TrainingError(
            f"the cache needs {size / 1e9:.2f} GB in {tempfile.gettempdir()}: {error.strerror}. Point TMPDIR to a larger "
            "disk, raise memory, lower views, or set cache=False."
        ) from error


class Images(Protocol):
    """Decoded images with their labels."""

    labels: Tensor

    def __len__(self) -> int: ...

    def plain(self, rows: Tensor) -> Tensor: ...

    def augmented(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Tensor: ...

    def targets(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Any: ...


class ImageStore:
    """The images of a split, decoded once to uint8 (N, 3, R, R), R = `preprocessing.resize_to`, and the targets beside them.

    At most `memory` bytes are kept in memory; beyond that they lie in a temporary file. `advance(n)` is called as
    images are decoded.
    """

    def __init__(
        self, split: Split, preprocessing: Preprocessing, memory: int, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        side = preprocessing.resize_to
        self.preprocessing = preprocessing
        self.labels = torch.from_numpy(split.labels)
        self.pixels = allocate((len(split), 3, side, side), torch.uint8, memory)
        self._targets = (
            type(split.targets[0]).open(
                split.targets, preprocessing, lambda shape: allocate(shape, torch.uint8, memory)
            )
            if split.targets is not None and len(split)
            else None
        )

        def decode(row: int) -> None:
            image = open_image(split.images[row])
            if self._targets is not None:
                self._targets.add(row, image)
            self.pixels[row] = preprocessing.decode(image)
            advance(1)

        with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
            for _ in pool.map(decode, range(len(split))):
                pass

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, rows: Tensor) -> Tensor:
        """Normalised centre crops (B, 3, S, S) float32: what the model sees in use."""
        return self.preprocessing.normalize(self.preprocessing.center_crop(self.pixels[rows]))

    def augmented(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Tensor:
        """Normalised random views (B, 3, S, S) float32 that follow `seed`."""
        if augmentation.name == "none":
            return self.plain(rows)
        views = augmentation(self.pixels[rows].float(), self.preprocessing.image_size, _generator(seed))
        return self.preprocessing.normalize(views)

    def targets(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Any:
        """What a dense task asks about the views that `augmented` gives for the same arguments: masks int64 (B, S, S)."""
        assert self._targets is not None, "the task has no targets but labels"
        if augmentation.name == "none":
            return self._targets.plain(rows)
        return self._targets.augmented(rows, augmentation.matrices(len(rows), _generator(seed)))


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def pieces(images: Tensor) -> tuple[Tensor, ...]:
    """A batch (B, C, H, W) in pieces whose activations stay in a processor's caches; on other devices, as it is.

    With 8 images of 128 px instead of 64 at a time, MobileNetV2 took half the time.
    """
    if images.device.type != "cpu":
        return (images,)
    return images.split(max(PIECE // (images.shape[-1] * images.shape[-2]), 1))


@dataclass(frozen=True)
class Augmentation:
    """A random crop of relative area within `area` and aspect ratio up to `stretch`, flipped half the time if `flip`."""

    name: str
    area: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    flip: bool = False

    def __call__(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Float (B, 3, R, R) to (B, 3, size, size), each image cropped on its own; values keep their range."""
        grid = F.affine_grid(self.matrices(len(images), generator), [len(images), 3, size, size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def matrices(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2, 3): where each view's places, in [-1, 1], lie in its image. Diagonal, but for the shift."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        side = uniform(*self.area).sqrt()
        ratio = torch.exp(uniform(-np.log(self.stretch), np.log(self.stretch)) / 2)
        width, height = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
        left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
        sign = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if self.flip else torch.ones(count)
        zero = torch.zeros(count)
        return torch.stack([torch.stack([width * sign, zero, left], 1), torch.stack([zero, height, top], 1)], 1)


AUGMENTATIONS = {
    "none": Augmentation("none"),
    "light": Augmentation("light", area=(0.6, 1.0), stretch=1.15),
    "standard": Augmentation("standard", area=(0.35, 1.0), stretch=4 / 3, flip=True),
}


def choose_augmentation(name: AugmentName, split: Split) -> Augmentation:
    """`auto` is `light` for small pictures (digits, signs: a flip may change the answer), `standard` for photos."""
    if name == "auto":
        name = "light" if source_size(split) <= SMALL_SOURCE else "standard"
    return AUGMENTATIONS[name]

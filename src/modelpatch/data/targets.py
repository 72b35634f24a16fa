"""What dense tasks ask for an image: the class of every pixel, or boxes; framed and augmented with the image.

    image  ─ resize, crop ─ random view ─ network ─ answer ─┐
    mask   ─ the same, nearest neighbour ───────────────────┴ loss
    boxes  ─ the same, their corners ───────────────────────┘

Whatever is not read yet lies on disk; a store holds what is.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing, image_bytes
from modelpatch.errors import DataError

IGNORED = 255  # the class of pixels that are neither trained on nor measured
UNKNOWN = -1
SMALLEST = 1.0  # pixels a side that a box must have to be seen
SHOWN = 0.3  # the share of a box that a random view must show for the box to be looked for


@dataclass(frozen=True)
class Mask:
    """The class of every pixel: a picture of one channel of whole numbers, and which class (256,) every number stands for."""

    source: ImageSource
    table: np.ndarray = field(repr=False)

    def read(self) -> Image.Image:
        """Class indices as a grey picture, `IGNORED` where there is none. Raises `DataError` for what is no such mask."""
        values = read_values(self.source)
        found = self.table[values]
        if (found == UNKNOWN).any():
            value = int(values[found == UNKNOWN].min())
            raise DataError(
                f"{_name(self.source)} holds the value {value}, which stands for no class. Name a class for it (--classes, "
                f"classes=[...]) or ignore it (--ignore {value}, ignore={value})."
            )
        return Image.fromarray(found.astype(np.uint8))

    def content(self) -> bytes:
        """What identifies the mask."""
        return image_bytes(self.source) + self.table.tobytes()


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of an image: `corners` (N, 4) float64, left, top, right, bottom in the image's own pixels.

    `labels` (N,) int64 are their classes. Objects that are `difficult` (N,) are neither looked for nor counted as wrong when
    they are found.
    """

    corners: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray

    def content(self) -> bytes:
        """What identifies the boxes."""
        return self.corners.tobytes() + self.labels.tobytes() + self.difficult.tobytes()


Target = Mask | Boxes
Room = Callable[[tuple[int, ...]], Tensor]  # makes an empty uint8 tensor


class TargetStore(Protocol):
    """The targets of a split, as its images are seen. `matrices` (B, 2, 3) are those of `Augmentation.matrices`."""

    def add(self, row: int, image: Image.Image) -> None:
        """Read what belongs to an image, which is given upright and in its own size."""

    def plain(self, rows: Tensor) -> Any: ...

    def augmented(self, rows: Tensor, matrices: Tensor) -> Any: ...


def make_store(targets: Sequence[Target], preprocessing: Preprocessing, room: Room) -> TargetStore:
    """A store for targets of one kind."""
    if isinstance(targets[0], Mask):
        return MaskStore(targets, preprocessing, room)  # type: ignore[arg-type]
    return BoxStore(targets, preprocessing)  # type: ignore[arg-type]


class MaskStore:
    """Masks as uint8 (N, R, R); batches are int64 (B, S, S)."""

    def __init__(self, masks: Sequence[Mask], preprocessing: Preprocessing, room: Room) -> None:
        self.masks, self.preprocessing = masks, preprocessing
        self.pixels = room((len(masks), preprocessing.resize_to, preprocessing.resize_to))

    def add(self, row: int, image: Image.Image) -> None:
        """Raises `DataError` for a mask of another size than its image."""
        mask = self.masks[row].read()
        if mask.size != image.size:
            raise DataError(
                f"{_name(self.masks[row].source)} is {mask.width} x {mask.height} pixels, its image {image.width} x "
                f"{image.height}. Expected one class for every pixel."
            )
        self.pixels[row] = torch.from_numpy(np.array(self.preprocessing.frame(mask, "nearest")))

    def plain(self, rows: Tensor) -> Tensor:
        return self.preprocessing.center_crop(self.pixels[rows]).long()

    def augmented(self, rows: Tensor, matrices: Tensor) -> Tensor:
        size = self.preprocessing.image_size
        grid = F.affine_grid(matrices, [len(rows), 1, size, size], align_corners=False)
        views = F.grid_sample(
            self.pixels[rows].float()[:, None], grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        return views[:, 0].long()


class BoxStore:
    """Boxes in pixels of what the network sees; a batch is a list of {"boxes": (N, 4), "labels": (N,), "difficult": (N,)}."""

    def __init__(self, boxes: Sequence[Boxes], preprocessing: Preprocessing) -> None:
        self.boxes, self.preprocessing = boxes, preprocessing
        self.framed: list[Tensor] = [torch.zeros(0, 4)] * len(boxes)  # in the store's R x R pixels

    def add(self, row: int, image: Image.Image) -> None:
        left, top, width, height = self.preprocessing.framed_area(image.width, image.height)
        shift = np.array([left, top] * 2)
        size = np.array([width, height] * 2) / self.preprocessing.image_size
        edge = (self.preprocessing.resize_to - self.preprocessing.image_size) // 2
        corners = (self.boxes[row].corners - shift) / size + edge
        self.framed[row] = torch.from_numpy(corners).float()

    def plain(self, rows: Tensor) -> list[dict[str, Tensor]]:
        edge = (self.preprocessing.resize_to - self.preprocessing.image_size) // 2
        return [self._seen(row, self.framed[row] - edge) for row in rows.tolist()]

    def augmented(self, rows: Tensor, matrices: Tensor) -> list[dict[str, Tensor]]:
        whole, size = self.preprocessing.resize_to, self.preprocessing.image_size
        found = []
        for row, matrix in zip(rows.tolist(), matrices, strict=True):
            places = 2 * self.framed[row].view(-1, 2, 2) / whole - 1  # corners in [-1, 1]
            places = (places - matrix[:, 2]) / matrix.diagonal()  # the grid maps what is seen to the image
            corners = torch.cat([places.min(1).values, places.max(1).values], 1)
            found.append(self._seen(row, (corners + 1) / 2 * size))
        return found

    def _seen(self, row: int, corners: Tensor) -> dict[str, Tensor]:
        """Boxes cut at the edges of what is seen, without those of which too little is left."""
        cut = corners.clamp(0, self.preprocessing.image_size)
        sides, whole = cut[:, 2:] - cut[:, :2], corners[:, 2:] - corners[:, :2]
        kept = (sides >= SMALLEST).all(1) & (sides.prod(1) >= SHOWN * whole.prod(1))
        boxes = self.boxes[row]
        labels, difficult = torch.from_numpy(boxes.labels), torch.from_numpy(boxes.difficult)
        return {"boxes": cut[kept], "labels": labels[kept], "difficult": difficult[kept]}


def read_values(source: ImageSource) -> np.ndarray:
    """The whole numbers (H, W) uint8 of a mask's picture. Raises `DataError` for what holds no such numbers."""
    try:
        if isinstance(source, np.ndarray | Image.Image):
            values = np.asarray(source)
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                values = np.asarray(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{_name(source)} cannot be read as a mask: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "uib" or values.size == 0:
        raise DataError(
            f"{_name(source)} is a picture of shape {values.shape} and {values.dtype}; expected a mask of one channel whose "
            "values are classes, such as a grey or palette PNG."
        )
    if int(values.max()) > IGNORED or int(values.min()) < 0:
        raise DataError(f"{_name(source)} holds the value {int(values.max())}; classes are 0 to {IGNORED - 1}.")
    return values.astype(np.uint8)


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | Path) else "the mask"

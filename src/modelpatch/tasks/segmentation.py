"""Segmentation: one class a pixel.

    answers   logits (B, K, H, W)                     loss      cross entropy, the mean over pixels that have a class
    targets   classes (B, H, W) int64, 255 for none   metrics   IoU_c = right / (answered or asked), its mean over classes;
                                                                pixel accuracy (torchmetrics, extra `dense`)

An answer is told as the share of each class and shown as an overlay of colours with a legend.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modelpatch.backbone.preprocessing import UNREADABLE, ImageSource, Preprocessing, image_bytes
from modelpatch.errors import DataError
from modelpatch.tasks.decoding import Decoding, coarsest, fine_and_coarse
from modelpatch.tasks.drawing import add_legend, encode_png, fit_into, named_colors, palette
from modelpatch.tasks.kind import Facts, Kind, Meter, Result, Target, TargetFacts, View, register_kind
from modelpatch.tasks.scores import Interval, bootstrap_interval

IGNORED = 255  # the class of pixels that are neither trained on nor measured
UNKNOWN = -1
LARGEST = 2**16 - 1  # value of a mask
OPACITY = 140  # of 255
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PixelMask(Target):
    """The class of every pixel: a picture of whole numbers, and a table from these to class indices.

    The picture has one channel, or the colours (N, 3) that stand for the numbers 0 to N - 1. `orientation` is the EXIF
    orientation by which its stored pixels are turned with its image.
    """

    source: ImageSource
    table: np.ndarray = field(repr=False)
    colors: np.ndarray | None = field(default=None, repr=False)
    orientation: int = 1

    def read(self) -> Image.Image:
        """Class indices as a grey picture, `IGNORED` where there is none. Raises `DataError` for another picture."""
        values = read_values(self.source, self.colors)
        known = values < len(self.table)
        found = np.where(known, self.table[np.where(known, values, 0)], UNKNOWN)
        if (found == UNKNOWN).any():
            value = int(values[found == UNKNOWN].min())
            raise DataError(
                f"{source_name(self.source)} holds the value {value}, which stands for no class. Name a class for it "
                f"(--classes, classes=[...]) or ignore it (--ignore {value}, ignore={value})."
            )
        mask = Image.fromarray(found.astype(np.uint8))
        return mask if self.orientation == 1 else mask.transpose(TURNS[self.orientation])

    def content(self) -> bytes:
        turned = b"" if self.orientation == 1 else bytes([self.orientation])
        colors = b"" if self.colors is None else self.colors.tobytes()
        return image_bytes(self.source) + self.table.tobytes() + colors + turned

    def frame(self, image: Image.Image, preprocessing: Preprocessing) -> Tensor:
        """Class indices uint8 (R, R). Raises `DataError` for a mask of another size than its image."""
        mask = self.read()
        if mask.size != image.size:
            raise DataError(
                f"{source_name(self.source)} is {mask.width} x {mask.height} pixels, its image {image.width} x "
                f"{image.height}. Expected one class for every pixel."
            )
        return torch.from_numpy(np.array(preprocessing.frame(mask, "nearest", IGNORED)))

    @staticmethod
    def batch(framed: Sequence[Tensor], preprocessing: Preprocessing, matrices: Tensor | None) -> Tensor:
        """Class indices int64 (B, S, S)."""
        masks = torch.stack(list(framed))
        if matrices is None:
            return preprocessing.center_crop(masks).long()
        size = preprocessing.image_size
        grid = F.affine_grid(matrices, [len(masks), 1, size, size], align_corners=False)
        views = F.grid_sample(
            masks.float()[:, None], grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        return views[:, 0].long()


def source_name(source: ImageSource) -> str:
    """The name of a target's file for messages."""
    return str(source) if isinstance(source, str | Path) else "the mask"


def read_values(source: ImageSource, colors: np.ndarray | None = None) -> np.ndarray:
    """The whole numbers (H, W), from 0 on, of a mask's picture: its values, or the rows of its colours among `colors` (N, 3).

    A picture of equal channels is one of one channel. Raises `DataError` for another picture.
    """
    try:
        if isinstance(source, np.ndarray | Image.Image):
            values = _pixels(source, colors is not None)
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                values = _pixels(picture, colors is not None)
    except UNREADABLE as error:
        raise DataError(
            f"{source_name(source)} cannot be read as a mask: {str(error) or type(error).__name__}"
        ) from error
    if colors is not None:
        return _rows_of(values, colors, source)
    if values.ndim == 3:  # the last channel of two or four is how opaque a pixel is
        shades = values[..., : 3 if values.shape[2] >= 3 else 1]
        values = shades[..., 0] if (shades == shades[..., :1]).all() else values
    if values.ndim != 2 or values.dtype.kind not in "uib" or values.size == 0:
        raise DataError(
            f"{source_name(source)} is a picture of shape {values.shape} and {values.dtype}; expected a mask of one channel "
            "whose values are classes, such as a grey or palette PNG. Colours need a file that names them: class_dict.csv "
            "with the columns name, r, g, b, or labelmap.txt."
        )
    if int(values.min()) < 0:
        raise DataError(f"{source_name(source)} holds the value {int(values.min())}; classes are from 0 on.")
    if int(values.max()) > LARGEST:
        raise DataError(f"{source_name(source)} holds the value {int(values.max())}; expected values up to {LARGEST}.")
    return values.astype(np.uint8 if values.dtype.itemsize == 1 else np.uint16)


def _pixels(source: np.ndarray | Image.Image, colored: bool) -> np.ndarray:
    picture = source if not colored else Image.fromarray(source) if isinstance(source, np.ndarray) else source
    return np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) and colored else picture)


def pack_colors(colors: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as whole numbers."""
    parts = colors.astype(np.int32)
    return (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2]


def _rows_of(pixels: np.ndarray, colors: np.ndarray, source: ImageSource) -> np.ndarray:
    packed, known = pack_colors(pixels), pack_colors(colors)
    order = np.argsort(known, kind="stable")
    places = np.searchsorted(known[order], packed).clip(max=len(known) - 1)
    rows = order[places]
    if (strange := known[rows] != packed).any():
        color = tuple(int(part) for part in pixels[strange][0])
        raise DataError(
            f"{source_name(source)} holds the colour {color}, which the list of colours lacks. Add it there."
        )
    return rows.astype(np.uint16)


@dataclass(frozen=True)
class SegmentationResult(Result):
    """Shares of pixels in [0, 1]. `per_class` are intersections over unions of the classes that occur; `confusion[i][j]`
    counts pixels of class i that were answered as class j."""

    miou: float
    pixel_accuracy: float
    images: int
    per_class: dict[str, float]
    confusion: list[list[int]]
    interval: Interval | None = None


class MaskMeter(Meter):
    """Collects logits (B, K, H, W) and masks (B, H, W), in which `IGNORED` counts for nothing."""

    def __init__(self, classes: Sequence[str]) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        super().__init__(classes)
        self.images = 0
        self._matrix = MulticlassConfusionMatrix(max(len(classes), 2), ignore_index=IGNORED)
        self._counts: list[Tensor] = []  # (3, K) of each image: pixels that are right, asked and answered

    def update(self, answers: Tensor, targets: Tensor) -> None:
        found, count = answers.argmax(1), len(self.classes)
        self._matrix.update(found, targets)
        self.images += len(answers)
        for answer, target in zip(found, targets, strict=True):
            answer, target = answer[target != IGNORED], target[target != IGNORED]
            parts = (target[answer == target], target, answer)
            self._counts.append(torch.stack([torch.bincount(part, minlength=count)[:count] for part in parts]))

    def interval(self) -> Interval | None:
        """The bootstrap's, over images."""
        counts = torch.stack(self._counts).double().numpy().reshape(self.images, -1)

        def measure(times: np.ndarray) -> float:
            right, asked, answered = (times @ counts).reshape(3, -1)
            union = asked + answered - right
            return float((right[union > 0] / union[union > 0]).mean()) if union.any() else 0.0

        return bootstrap_interval(self.images, measure)

    def result(self) -> SegmentationResult:
        counts = self._matrix.compute().long()[: len(self.classes), : len(self.classes)]
        right, asked, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = asked + answered - right
        shares = {name: r / u for name, r, u in zip(self.classes, right.tolist(), union.tolist(), strict=True) if u}
        return SegmentationResult(
            miou=sum(shares.values()) / max(len(shares), 1),
            pixel_accuracy=float(right.sum()) / max(int(counts.sum()), 1),
            images=self.images,
            per_class=shares,
            confusion=counts.tolist(),
        )


@register_kind
class Segmentation(Kind):
    """One class a pixel; answers are logits (B, K, H, W)."""

    name: ClassVar[str] = "segmentation"
    metrics: ClassVar[Mapping[str, str]] = {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
    meter_type = MaskMeter
    per_class = "IoU"
    target = PixelMask
    draws = True
    framing = "stretch"
    decoders: ClassVar[Mapping[str, Decoding]] = {
        "deeplab": Decoding("deeplab", fine_and_coarse),
        "fcn32": Decoding("fcn", coarsest(1), hidden=0),  # FCN, section 4.2
        "fcn16": Decoding("fcn", coarsest(2), hidden=0),
    }
    libraries = ("torchmetrics",)
    counted = "pixels"

    def examine(self, target: PixelMask, size: tuple[int, int] | None = None) -> TargetFacts:
        mask = target.read()
        counts = np.bincount(np.asarray(mask).ravel(), minlength=IGNORED + 1)[:IGNORED]
        wrong = {
            "masks of another size than their image": size is not None and mask.size != size,
            "masks whose pixels are all ignored": not counts.any(),
        }
        present = {int(index): int(counts[index]) for index in np.flatnonzero(counts)}
        return TargetFacts(present, tuple(text for text, found in wrong.items() if found))

    def caption(self, target: PixelMask, classes: Sequence[str]) -> str:
        shares = [(index, share) for index, share in areas(np.asarray(target.read())) if index != IGNORED]
        return ", ".join(f"{classes[index]} {share:.0%}" for index, share in shares[:3]) or "ignored"

    def illustrate(self, image: Image.Image, target: PixelMask, classes: Sequence[str], side: int) -> Image.Image:
        small = fit_into(image, side).convert("RGBA")
        mask = np.asarray(target.read().resize(small.size, Image.Resampling.NEAREST))
        colors = np.zeros((IGNORED + 1, 4), dtype=np.uint8)
        colors[: len(classes), :3], colors[: len(classes), 3] = palette(len(classes)), OPACITY
        return Image.alpha_composite(small, Image.fromarray(colors[mask])).convert("RGB")

    def count_classes(self, targets: Tensor, classes: int) -> Tensor:
        return torch.bincount(targets.flatten(), minlength=IGNORED + 1)[:classes]

    def weigh_images(self, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
        seen = targets != IGNORED
        if class_weights is None:
            return seen.sum((1, 2)).float()
        return torch.where(seen, class_weights[targets.clamp(max=len(class_weights) - 1)], 0.0).sum((1, 2))

    def loss(
        self, output: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        logits = output.float()
        total = F.cross_entropy(
            logits, targets, class_weights, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
        return total / self.weigh_images(targets, class_weights).sum().clamp(min=1e-12)

    def reduce(self, answers: Tensor, top: int = 5) -> list[np.ndarray]:
        """The best class of every pixel, uint8 (H, W), for each image."""
        return list(answers.argmax(1).byte().cpu().numpy())

    def describe(self, answer: np.ndarray, view: View, top: int = 5) -> list[Facts]:
        return [{"label": view.name(index), "share": share} for index, share in areas(answer)[:top]]

    def to_json(self, answer: np.ndarray, view: View, top: int = 5) -> Facts:
        """All areas, the largest first, and a PNG to lay over `place`: left, top, width and height in shares of the image."""
        named, (across, down), (left, upper, width, height) = named_colors(view.classes), view.size, view.area
        place = [left / across, upper / down, width / across, height / down]
        png = base64.b64encode(encode_png(overlay(answer, len(view.classes)))).decode()
        return {
            "areas": [{**named[index], "share": round(share, 6)} for index, share in areas(answer)],
            "overlay": {"png": png, "place": [round(share, 6) for share in place]},
        }

    def draw(self, answer: np.ndarray, view: View) -> Image.Image:
        colors = [tuple(color) for color in palette(len(view.classes)).tolist()]
        entries = []
        for index, share in areas(answer):
            percent = "< 1 %" if share < 0.005 else f"{100 * share:.0f} %"
            entries.append((colors[index], f"{view.name(index)}: {percent}"))
        return add_legend(lay_over(answer, view), entries)


def areas(classes: np.ndarray) -> list[tuple[int, float]]:
    """The classes of a map (H, W) with the share of it that each covers, the largest first."""
    counts = np.bincount(classes.ravel())
    order = np.argsort(-counts, kind="stable")
    return [(int(index), float(counts[index] / classes.size)) for index in order if counts[index]]


def overlay(classes: np.ndarray, count: int) -> Image.Image:
    """A picture (RGBA) of a map (H, W) in half-transparent colours, for `count` classes."""
    colors = np.concatenate([palette(count), np.full((count, 1), OPACITY, dtype=np.uint8)], 1)
    return Image.fromarray(colors[classes])


def lay_over(classes: np.ndarray, view: View) -> Image.Image:
    """The image (RGB) under the map's colours, where the network saw it."""
    left, top, width, height = view.area
    over = overlay(classes, len(view.classes))
    over = over.resize((max(round(width), 1), max(round(height), 1)), Image.Resampling.NEAREST)
    whole = Image.new("RGBA", view.size)
    whole.paste(over, (round(left), round(top)))
    return Image.alpha_composite(view.image.convert("RGBA"), whole).convert("RGB")

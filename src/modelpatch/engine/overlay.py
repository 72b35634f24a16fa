"""What a dense answer says of an image: areas of classes or boxes, and a picture of them over the image.

    logits (K, H, W) -> class of every pixel (H, W) -> shares of the image, an overlay of colours
    boxes (N, 6)     -> those that are sure         -> boxes in the image's own pixels, frames of colours

The network sees an image cropped or stretched to a square (`Preprocessing.framed_area`); what is drawn lies where it belongs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from modelpatch.backbone import Preprocessing
from modelpatch.backbone.preprocess import ImageSource, open_image

OPACITY = 140  # of 255
SURE = 0.5  # the probability from which a box is told and drawn


@dataclass(frozen=True)
class Area:
    """A class and the share of what is seen that it covers, in [0, 1]."""

    index: int
    share: float


def class_map(logits: Tensor) -> np.ndarray:
    """Logits (K, H, W) to the best class of every pixel, uint8 (H, W)."""
    return logits.argmax(0).byte().cpu().numpy()


def areas(classes: np.ndarray) -> list[Area]:
    """The classes of a map (H, W), the largest first."""
    counts = np.bincount(classes.ravel())
    order = np.argsort(-counts, kind="stable")
    return [Area(int(index), float(counts[index] / classes.size)) for index in order if counts[index]]


def palette(count: int) -> np.ndarray:
    """Colours uint8 (count, 3) that differ well, those of Pascal VOC from its first object class on."""
    colors = np.zeros((count, 3), dtype=np.uint8)
    for number in range(count):
        bits = number + 1
        for place in range(7, -1, -1):
            for channel in range(3):
                colors[number, channel] |= ((bits >> channel) & 1) << place
            bits >>= 3
    return colors


def overlay(classes: np.ndarray, count: int) -> Image.Image:
    """A picture (RGBA) of a map (H, W) in half-transparent colours, for `count` classes."""
    colors = np.concatenate([palette(count), np.full((count, 1), OPACITY, dtype=np.uint8)], 1)
    return Image.fromarray(colors[classes])


def paint(image: Image.Image, classes: np.ndarray, count: int, preprocessing: Preprocessing) -> Image.Image:
    """The image (RGB) with the map laid over what the network saw of it."""
    left, top, width, height = preprocessing.framed_area(*image.size)
    over = overlay(classes, count).resize((max(round(width), 1), max(round(height), 1)), Image.Resampling.NEAREST)
    whole = Image.new("RGBA", image.size)
    whole.paste(over, (round(left), round(top)))
    return Image.alpha_composite(image.convert("RGBA"), whole).convert("RGB")


@dataclass(frozen=True)
class Drawing:
    """A dense answer for one image: facts, the largest first, and the picture of it, which is made when it is asked for."""

    said: list[dict[str, Any]]
    picture: Callable[[], Image.Image]


def draw_answer(
    kind: str, answer: Tensor, classes: Sequence[str], preprocessing: Preprocessing, source: ImageSource
) -> Drawing:
    """What a task of this kind answers for one image. Raises `DataError` for a source that is no image."""
    if kind == "detection":
        image = open_image(source)
        found = boxes(answer, preprocessing, image.size)
        told = [
            {"label": classes[one.index], "probability": one.probability, "box": list(one.corners)} for one in found
        ]
        return Drawing(told, lambda: draw_boxes(image, found, classes))
    best = class_map(answer)
    said = [{"label": classes[area.index], "share": area.share} for area in areas(best)]
    return Drawing(said, lambda: paint(open_image(source), best, len(classes), preprocessing))


@dataclass(frozen=True)
class Box:
    """An object: its class, how sure that is, and left, top, right, bottom in the image's own pixels."""

    index: int
    probability: float
    corners: tuple[float, float, float, float]


def boxes(answer: Tensor, preprocessing: Preprocessing, size: tuple[int, int], least: float = SURE) -> list[Box]:
    """The boxes of an answer (N, 6) of at least this probability, the surest first, for an image of this width and height."""
    left, top, width, height = preprocessing.framed_area(*size)
    across, down = width / preprocessing.image_size, height / preprocessing.image_size
    found = []
    for x0, y0, x1, y1, probability, index in answer[answer[:, 4] >= least].tolist():
        corners = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
        found.append(Box(int(index), probability, corners))
    return found


def draw_boxes(image: Image.Image, found: Sequence[Box], classes: Sequence[str]) -> Image.Image:
    """The image (RGB) with a frame and a name for every box."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    colors = palette(len(classes))
    for box in found:
        color = tuple(colors[box.index].tolist())
        pen.rectangle(box.corners, outline=color, width=max(round(min(image.size) / 150), 1))
        place = (box.corners[0] + 2, box.corners[1] + 1)
        label = f"{classes[box.index]} {100 * box.probability:.0f} %".encode("latin-1", "replace").decode("latin-1")
        pen.rectangle(pen.textbbox(place, label), fill=color)
        pen.text(place, label, fill="white")
    return drawn


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()

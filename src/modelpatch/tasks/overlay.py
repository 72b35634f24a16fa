"""What a dense answer says of an image: areas of classes or boxes, and a picture of them over the image.

    logits (K, H, W) -> class of every pixel (H, W) -> shares of the image, an overlay of colours, a legend
    boxes (N, 6)     -> those that are sure         -> boxes in the image's own pixels, frames of colours with names

The network sees an image cropped or stretched to a square (`Preprocessing.framed_area`); what is drawn lies where it belongs.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing, open_image

Corners = tuple[float, float, float, float]  # left, top, right, bottom
OPACITY = 140  # of 255
GOLDEN = 0.618034  # turns of the wheel of colours between neighbours: no two of the first dozens meet
LETTER = 30  # the shorter side of an image is this many letters high
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
    """Bright colours uint8 (count, 3) that differ well: around the wheel in golden steps, in three strengths in turn."""
    strengths = ((0.75, 0.95), (0.9, 0.7), (0.45, 1.0))
    colors = [colorsys.hsv_to_rgb(number * GOLDEN % 1, *strengths[number % 3]) for number in range(count)]
    return (255 * np.array(colors).reshape(count, 3)).round().astype(np.uint8)


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


def with_legend(picture: Image.Image, found: Sequence[Area], classes: Sequence[str]) -> Image.Image:
    """The picture (RGB) with a strip below it that names the classes found, each with its colour and share."""
    font = _font(picture.size)
    gap = round(font.size / 2)
    colors = [tuple(color) for color in palette(len(classes)).tolist()]
    entries = [(colors[one.index], f"{classes[one.index]}: {_percent(one.share)}") for one in found]
    places, x, y = [], gap, gap
    for _, text in entries:
        width = round(font.size * 1.5 + font.getlength(text))
        if x > gap and x + width > picture.width - gap:
            x, y = gap, y + round(1.5 * font.size)
        places.append((x, y))
        x += width + 2 * gap
    made = Image.new("RGB", (picture.width, picture.height + y + round(1.5 * font.size)), "white")
    made.paste(picture)
    pen = ImageDraw.Draw(made)
    for (color, text), (left, top) in zip(entries, places, strict=True):
        top += picture.height
        pen.rectangle((left, top, left + font.size, top + font.size), fill=color)
        pen.text((left + 1.5 * font.size, top + font.size / 2), text, fill="black", font=font, anchor="lm")
    return made


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.005 else f"{100 * share:.0f} %"


def _font(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """Letters that can be read in an image of this width and height."""
    font = ImageFont.load_default(max(min(size) / LETTER, 10))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


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
    covered = areas(best)
    said = [{"label": classes[area.index], "share": area.share} for area in covered]
    return Drawing(
        said, lambda: with_legend(paint(open_image(source), best, len(classes), preprocessing), covered, classes)
    )


@dataclass(frozen=True)
class Box:
    """An object: its class, how sure that is, and left, top, right, bottom in the image's own pixels."""

    index: int
    probability: float
    corners: Corners


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
    """The image (RGB) with a frame and a name for every box; names lie where they cover no surer box's name, if they can."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    font = _font(image.size)
    colors = [tuple(color) for color in palette(len(classes)).tolist()]
    taken: list[Corners] = []
    for box in found:
        pen.rectangle(box.corners, outline=colors[box.index], width=max(round(min(image.size) / 150), 1))
    for box in found:
        color = colors[box.index]
        text = f"{classes[box.index]} {100 * box.probability:.0f} %"
        place = _free_place(box.corners, (font.getlength(text) + 4, font.size + 4), image.size, taken)
        taken.append(place)
        pen.rectangle(place, fill=color)
        dark = np.dot(color, (0.299, 0.587, 0.114)) < 140
        pen.text(
            (place[0] + 2, (place[1] + place[3]) / 2), text, fill="white" if dark else "black", font=font, anchor="lm"
        )
    return drawn


def _free_place(box: Corners, size: tuple[float, float], image: tuple[int, int], taken: Sequence[Corners]) -> Corners:
    """Where a name of this size goes: above its box, within, below, or at its right; the first that meets no other name."""
    left, top, right, bottom = box
    width, height = size
    corners = [
        (left, top - height),
        (left, top),
        (left, bottom),
        (left, bottom - height),
        (right - width, top - height),
    ]
    places = []
    for x, y in corners:
        x, y = max(min(x, image[0] - width), 0), max(min(y, image[1] - height), 0)
        places.append((x, y, x + width, y + height))
    free = [place for place in places if not any(_meet(place, other) for other in taken)]
    return (free or places)[0]


def _meet(one: Corners, other: Corners) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()

"""Colours, fonts and names of pictures that show answers over an image."""

import colorsys
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Corners = tuple[float, float, float, float]  # left, top, right, bottom
Color = tuple[int, ...]
GOLDEN = 0.618034  # step on the wheel of colours: no two of the first dozens are alike
LETTER = 30  # the shorter side of an image is this many letters high


def palette(count: int) -> np.ndarray:
    """Bright colours uint8 (count, 3) that differ well: around the wheel in golden steps, in three strengths in turn."""
    strengths = ((0.75, 0.95), (0.9, 0.7), (0.45, 1.0))
    colors = [colorsys.hsv_to_rgb(number * GOLDEN % 1, *strengths[number % 3]) for number in range(count)]
    return (255 * np.array(colors).reshape(count, 3)).round().astype(np.uint8)


def named_colors(classes: Sequence[str]) -> list[dict[str, str | int]]:
    """The name, index and colour (#rrggbb) of every class, for JSON."""
    colors = ["#" + color.tobytes().hex() for color in palette(len(classes))]
    return [{"class": name, "index": index, "color": colors[index]} for index, name in enumerate(classes)]


def fit_into(image: Image.Image, side: int) -> Image.Image:
    """The image in a size whose longer side is `side` pixels; small ones are enlarged without smoothing."""
    scale = side / max(image.size)
    size = max(round(scale * image.width), 1), max(round(scale * image.height), 1)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def font_for(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """A font that can be read in an image of this width and height."""
    font = ImageFont.load_default(max(min(size) / LETTER, 10))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def add_legend(
    picture: Image.Image, entries: Sequence[tuple[Color, str]], font: ImageFont.FreeTypeFont | None = None
) -> Image.Image:
    """The picture (RGB) with a strip below it that has a coloured square and a text for each entry, in its font or another.

    It is widened with white where a text is wider than the picture.
    """
    font = font or font_for(picture.size)
    gap = round(font.size / 2)
    widths = [math.ceil(font.size * 1.5 + font.getlength(text)) for _, text in entries]
    whole = max([picture.width, *(width + 2 * gap for width in widths)])
    places, x, y = [], gap, gap
    for width in widths:
        if x > gap and x + width > whole - gap:
            x, y = gap, y + round(1.5 * font.size)
        places.append((x, y))
        x += width + 2 * gap
    made = Image.new("RGB", (whole, picture.height + y + round(1.5 * font.size)), "white")
    made.paste(picture)
    pen = ImageDraw.Draw(made)
    for (color, text), (left, top) in zip(entries, places, strict=True):
        top += picture.height
        pen.rectangle((left, top, left + font.size, top + font.size), fill=color)
        pen.text((left + 1.5 * font.size, top + font.size / 2), text, fill="black", font=font, anchor="lm")
    return made


def draw_frames(image: Image.Image, frames: Sequence[tuple[Corners, Color, str]]) -> Image.Image:
    """The image (RGB) with frames in their colours and texts, which do not cover those before them, if they can."""
    drawn = image.copy()
    pen, font = ImageDraw.Draw(drawn), font_for(image.size)
    taken: list[Corners] = []
    for corners, color, _ in frames:
        pen.rectangle(corners, outline=color, width=max(round(min(image.size) / 150), 1))
    for corners, color, text in frames:
        if not text:
            continue
        place = find_place(corners, (font.getlength(text) + 4, font.size + 4), image.size, taken)
        taken.append(place)
        pen.rectangle(place, fill=color)
        ink = "white" if np.dot(color, (0.299, 0.587, 0.114)) < 140 else "black"
        pen.text((place[0] + 2, (place[1] + place[3]) / 2), text, fill=ink, font=font, anchor="lm")
    return drawn


def find_place(box: Corners, size: tuple[float, float], image: tuple[int, int], taken: Sequence[Corners]) -> Corners:
    """A place for a text of this size: above its box, within, below, or at its right; the first that overlaps no other."""
    left, top, right, bottom = box
    width, height = size
    spots = [(left, top - height), (left, top), (left, bottom), (left, bottom - height), (right - width, top - height)]
    places = []
    for x, y in spots:
        x, y = max(min(x, image[0] - width), 0), max(min(y, image[1] - height), 0)
        places.append((x, y, x + width, y + height))
    free = [place for place in places if not any(overlap(place, other) for other in taken)]
    return (free or places)[0]


def overlap(one: Corners, other: Corners) -> bool:
    """True if two boxes share an area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()

"""Contact sheets: small pictures in rows, with a few words below each."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from modelpatch.atomic import write_bytes
from modelpatch.tasks.drawing import Color, font_for

COLUMNS, GAP = 8, 2  # tiles a row; pixels between a tile's picture and its edge
INK: Color = (0, 0, 0)
BAND: Color = (232, 236, 242)


@dataclass(frozen=True)
class Tile:
    """A picture (RGB) with lines of text below it, in a colour."""

    image: Image.Image
    lines: Sequence[str]
    color: Color = INK


@dataclass(frozen=True)
class Section:
    """Tiles under a title, which may be empty."""

    title: str
    tiles: Sequence[Tile]


def draw_sheet(sections: Sequence[Section], side: int = 128) -> Image.Image:
    """A picture of sections one below the other, with tiles `side` pixels wide; pictures are made smaller to fit them."""
    font = font_for((side * 2, side * 2))
    line, rows = round(font.size * 1.3), []
    columns = max(min(COLUMNS, max((len(section.tiles) for section in sections), default=1)), 1)
    for section in sections:
        titles = wrap(section.title, font, columns * side - 2 * GAP) if section.title else []
        height = len(titles) * line + 3 * GAP
        band = Image.new("RGB", (columns * side, height), "white") if titles else None
        if band is not None:
            band.paste(BAND, (0, GAP, band.width, band.height))
            for number, text in enumerate(titles):
                ImageDraw.Draw(band).text((GAP + 1, number * line + 2 * GAP), text, fill=INK, font=font)
            rows.append(band)
        for start in range(0, len(section.tiles), columns):
            rows.append(_draw_row(section.tiles[start : start + columns], side, columns, line, font))
    sheet = Image.new("RGB", (columns * side, max(sum(row.height for row in rows), 1)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _draw_row(tiles: Sequence[Tile], side: int, columns: int, line: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    small = [tile.image.copy() for tile in tiles]
    for image in small:
        image.thumbnail((side - 2 * GAP, side - 2 * GAP))
    tall = max(image.height for image in small) + 2 * GAP
    row = Image.new("RGB", (columns * side, tall + line * max(len(tile.lines) for tile in tiles) + 2 * GAP), "white")
    pen = ImageDraw.Draw(row)
    for number, (tile, image) in enumerate(zip(tiles, small, strict=True)):
        row.paste(image, (number * side + (side - image.width) // 2, (tall - image.height) // 2))
        for place, text in enumerate(tile.lines):
            cut = shorten(text, font, side - 2 * GAP - 2)
            pen.text((number * side + GAP + 1, tall + place * line), cut, fill=tile.color, font=font)
    return row


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with dots where it is wider than so many pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines that are at most so many pixels wide, if its words are."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return [shorten(line, font, width) for line in lines]


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, atomically. Raises `ModelpatchError` where it cannot be written."""
    stream = io.BytesIO()
    picture.save(stream, Image.registered_extensions()[path.suffix.lower()])
    write_bytes(path, stream.getvalue())

"""The place of a picture in the square that a network sees: cropped, stretched or bordered, as its library does it.

    crop      the shorter side becomes R pixels, the longer is cut:   torchvision's Resize(R) and CenterCrop(S)
    stretch   both sides become S pixels
    squash    both sides become R pixels, S of them are seen:         timm's crop_mode="squash"
    border    the longer side becomes R pixels, a border fills up:    timm's crop_mode="border", open_clip's "longest"

A picture is framed as R x R pixels, of which the middle S x S are seen: R = floor(S / crop_pct). Sides and offsets are rounded
as torchvision and timm round them; `first` is the rounding of the first edition, whose patch files do not say it.
"""

from typing import Literal, NamedTuple

Framing = Literal["crop", "stretch", "squash", "border"]
Rounding = Literal["exact", "first"]


class Placing(NamedTuple):
    """The size that a picture is resized to, and the corner of the frame in it; negative where a border is added."""

    width: int
    height: int
    left: int
    top: int


def edge_of(whole: int, seen: int, rounding: Rounding) -> int:
    """Pixels at the left and at the top of a frame of `whole` pixels that the crop of `seen` pixels leaves out."""
    return (whole - seen) // 2 if rounding == "first" else round((whole - seen) / 2)


def place(width: int, height: int, scale: int, seen: int, framing: Framing, rounding: Rounding) -> Placing:
    """The place of a picture of this size in its frame, if a side becomes `scale` pixels and `seen` of them are seen.

    The frame has the larger of the two: a picture that becomes smaller than what is seen has a border.
    """
    whole = max(scale, seen)
    if framing in ("stretch", "squash"):
        return Placing(scale, scale, *2 * (_offset(scale, whole, seen, rounding),))
    if framing == "border":
        ratio = max(width, height) / scale
        sides = max(round(width / ratio), 1), max(round(height / ratio), 1)
    elif rounding == "first":
        ratio = scale / min(width, height)
        sides = max(scale, round(width * ratio)), max(scale, round(height * ratio))
        return Placing(*sides, (sides[0] - whole) // 2, (sides[1] - whole) // 2)
    else:
        longer = int(scale * max(width, height) / min(width, height))
        sides = (scale, longer) if width <= height else (longer, scale)
    return Placing(*sides, *(_offset(side, whole, seen, rounding) for side in sides))


def _offset(side: int, whole: int, seen: int, rounding: Rounding) -> int:
    """The offset of the frame in a side that is filled up to what is seen, or cut to it."""
    edge = edge_of(whole, seen, rounding)
    return -(edge + (seen - side) // 2) if side < seen else round((side - seen) / 2) - edge

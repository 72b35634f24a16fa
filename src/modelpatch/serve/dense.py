"""Dense answers as JSON: areas of classes and a picture to lay over the image, or boxes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.tasks.overlay import areas, boxes, encode_png, overlay, palette


def tell_areas(
    classes: np.ndarray, names: Sequence[str], preprocessing: Preprocessing, size: tuple[int, int]
) -> dict[str, Any]:
    """The class of every pixel (H, W) of what the network saw of an image of this width and height."""
    named = _named(names)
    return {
        "areas": [{**named[area.index], "share": round(area.share, 6)} for area in areas(classes)],
        "overlay": {
            "png": base64.b64encode(encode_png(overlay(classes, len(names)))).decode(),
            "place": _place(preprocessing, size),
        },
    }


def tell_boxes(
    answer: Tensor, names: Sequence[str], preprocessing: Preprocessing, size: tuple[int, int]
) -> dict[str, Any]:
    """The boxes (N, 6) in an image of this width and height."""
    named = _named(names)
    return {
        "boxes": [
            {
                **named[box.index],
                "probability": round(box.probability, 6),
                "box": [round(corner, 2) for corner in box.corners],
            }
            for box in boxes(answer, preprocessing, size)
        ],
        "size": list(size),
    }


def _named(names: Sequence[str]) -> list[dict[str, Any]]:
    """Every class with its place and colour."""
    colors = ["#" + color.tobytes().hex() for color in palette(len(names))]
    return [{"class": name, "index": n, "color": colors[n]} for n, name in enumerate(names)]


def _place(preprocessing: Preprocessing, size: tuple[int, int]) -> list[float]:
    left, top, width, height = preprocessing.framed_area(*size)
    return [round(left / size[0], 6), round(top / size[1], 6), round(width / size[0], 6), round(height / size[1], 6)]

"""LabelMe: a JSON of shapes for each picture, beside it or in a folder of annotations."""

from collections.abc import Iterator
from pathlib import Path

from modelpatch.data.sources import base
from modelpatch.data.sources.annotated import AnnotatedPictures, NamedPictures, box_around, points_of
from modelpatch.data.sources.documents import Fields, read_json
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.scenes import Scene, SceneObject

FORM = "annotations of LabelMe"
BOXES, CIRCLE = ("rectangle",), "circle"


@base.register_source("labelme")
class LabelMe(AnnotatedPictures):
    """LabelMe's shapes, each as the box around it."""

    def begins(self, text: bytes) -> bool:
        return text.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").startswith(b"{") and b'"shapes"' in text

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        document = read_json(file, FORM)
        objects = []
        for shape in document.all("shapes"):
            kind = str(shape.values.get("shape_type") or "polygon")
            if kind not in BOXES:
                pictures.outlines.append(f"{kind} in {file.name}")
            objects.append(SceneObject(shape.text("label"), _corners(shape, kind), _is_hard(shape)))
        named = document.text("imagePath") if "imagePath" in document else file.stem
        sides = [document.values.get(name) or 0 for name in ("imageWidth", "imageHeight")]
        size = Fields({"width": sides[0], "height": sides[1]}, file).size()
        yield Scene(pictures.find(document, named, file.stem), objects, size)


def _corners(shape: Fields, kind: str) -> Corners:
    points = points_of(shape, "points")
    if kind == CIRCLE and len(points) == 2:  # its centre, and a point of its edge
        (x, y), (edge_x, edge_y) = points
        radius = ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
        return x - radius, y - radius, x + radius, y + radius
    return box_around(points)


def _is_hard(shape: Fields) -> bool:
    flags = shape.values.get("flags")
    return isinstance(flags, dict) and flags.get("difficult") is True

"""CVAT for images 1.1: one XML of pictures with boxes and outlines."""

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from modelpatch.data.sources import base
from modelpatch.data.sources.annotated import AnnotatedPictures, NamedPictures, box_around, turned_box
from modelpatch.data.sources.documents import Fields, read_xml
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.scenes import Scene, SceneObject
from modelpatch.errors import DataError

FORM = "annotations of CVAT"
SIDES = ("xtl", "ytl", "xbr", "ybr")
OUTLINES = ("polygon", "polyline", "points")


@base.register_source("cvat")
class Cvat(AnnotatedPictures):
    """CVAT's boxes, and the boxes around its outlines and masks."""

    suffix = ".xml"

    def begins(self, text: bytes) -> bool:
        return b"<annotations" in text and (b"<image" in text or b"<track" in text or b"<meta" in text)

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        root = read_xml(file, FORM)
        if next(root.iter("track"), None) is not None:
            raise DataError(
                f"{file} holds the tracks of a video, which are not read. Export the job as CVAT for images 1.1 or COCO."
            )
        tags = boxes = 0
        for number, image in enumerate(root.iter("image")):
            fields, objects = Fields(image.attrib, file, "image", number), []
            for place, element in enumerate(image):
                if element.tag == "tag":
                    tags += 1
                    continue
                one = Fields(element.attrib, file, "image", number, element.tag, place)
                if element.tag not in ("box", *OUTLINES, "ellipse", "mask"):
                    one.fail(f"it is a {element.tag}; expected a box, an outline or a mask")
                objects.append(SceneObject(one.text("label"), _corners(element.tag, one)))
                if element.tag != "box":
                    pictures.outlines.append(f"{element.tag} in {fields.text('name')}")
            boxes += len(objects)
            yield Scene(pictures.find(fields, fields.text("name")), objects, fields.size())
        if tags and not boxes:
            _refuse_tags(file)


def _refuse_tags(file: Path) -> NoReturn:
    raise DataError(
        f"{file} holds tags of whole pictures and no boxes. Export them as ImageNet, in folders of classes."
    )


def _corners(kind: str, one: Fields) -> Corners:
    degrees = one.number("rotation") if "rotation" in one else 0.0
    if kind == "ellipse":
        x, y, across, down = (one.number(name) for name in ("cx", "cy", "rx", "ry"))
        corners = (x - across, y - down, x + across, y + down)
    elif kind == "mask":
        left, top, width, height = (one.number(name) for name in ("left", "top", "width", "height"))
        return left, top, left + width, top + height
    elif kind in OUTLINES:
        pairs = [pair.split(",") for pair in one.text("points").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            one.fail("points are no pairs x,y with ; between them")
        return box_around([one.numbers_of("points", pair) for pair in pairs])
    else:
        left, top, right, bottom = (one.number(side) for side in SIDES)
        corners = (left, top, right, bottom)
    middle = ((corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2)
    return turned_box(corners, degrees, middle) if degrees else corners

"""CreateML: a JSON list of pictures with boxes, each by its middle, width and height in pixels, beside the pictures."""

from collections.abc import Iterator
from pathlib import Path

from modelpatch.data.sources import base
from modelpatch.data.sources.annotated import AnnotatedPictures, NamedPictures
from modelpatch.data.sources.documents import Fields, read_objects
from modelpatch.data.sources.scenes import Scene, SceneObject

FORM = "annotations of CreateML"


@base.register_source("createml")
class CreateML(AnnotatedPictures):
    """CreateML's boxes."""

    def begins(self, text: bytes) -> bool:
        return b'"coordinates"' in text and b'"annotations"' in text and text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        for entry in read_objects(file, FORM):
            objects = []
            for one in entry.all("annotations") if "annotations" in entry else ():
                place = Fields(one.value("coordinates"), file, *one.place, "coordinates")
                x, y, width, height = (place.number(name) for name in ("x", "y", "width", "height"))
                corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                objects.append(SceneObject(one.text("label"), corners))
            name = entry.text("image" if "image" in entry else "imagefilename")
            yield Scene(pictures.find(entry, name), objects)

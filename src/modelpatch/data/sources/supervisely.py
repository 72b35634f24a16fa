"""Supervisely: meta.json, and in each data set `img/` with the pictures and `ann/` with a JSON of objects for each."""

from collections.abc import Iterator
from pathlib import Path

from modelpatch.data.sources import base
from modelpatch.data.sources.annotated import AnnotatedPictures, NamedPictures, box_around, points_of
from modelpatch.data.sources.documents import Fields, read_json
from modelpatch.data.sources.scenes import Scene, SceneObject

FORM = "annotations of Supervisely"
META, ANNOTATIONS = "meta.json", "ann"
BOXES, OUTLINES = ("rectangle",), ("polygon", "line", "polyline")


@base.register_source("supervisely")
class Supervisely(AnnotatedPictures):
    """Supervisely's rectangles, and the boxes around its polygons."""

    def places(self, path: Path) -> list[Path]:
        """The folders `ann` of every data set of a project, or of the data set itself."""
        if not path.is_dir():
            return []
        found = [path, *(one for one in sorted(path.iterdir()) if one.is_dir())]
        return [one / ANNOTATIONS for one in found if (one / ANNOTATIONS).is_dir()]

    def begins(self, text: bytes) -> bool:
        return b'"objects"' in text and b'"size"' in text

    def scenes(self, file: Path, pictures: NamedPictures) -> Iterator[Scene]:
        document, objects = read_json(file, FORM), []
        for entry in document.all("objects"):
            kind = entry.text("geometryType") if "geometryType" in entry else BOXES[0]
            if kind not in (*BOXES, *OUTLINES):
                entry.fail(
                    f"it is a {kind}; expected a rectangle or polygon. Export masks as pictures, beside the images"
                )
            if kind in OUTLINES:
                pictures.outlines.append(f"{kind} in {file.name}")
            outer = points_of(Fields(entry.value("points"), file, *entry.place, "points"), "exterior")
            objects.append(SceneObject(entry.text("classTitle"), box_around(outer)))
        size = Fields(document.values.get("size") or {}, file, "size").size()
        yield Scene(pictures.find(document, f"img/{file.stem}", file.stem), objects, size)

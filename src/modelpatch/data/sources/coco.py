"""COCO: `SPLIT.json` or `annotations/instances_SPLIT*.json`, with images beside them, in `images/` or in a split's folder."""

import json
from pathlib import Path
from typing import Any

from modelpatch.data.sources import base
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection

KEYS = (b'"annotations"', b'"categories"', b'"images"')


@base.register_source("coco")
class Coco(base.DataSource):
    """A folder with COCO's annotations of boxes."""

    kind = Detection.name

    def accepts(self, source: Any) -> bool:
        return Path(source).is_dir() and bool(_find_annotations(Path(source)))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path = Path(source)
        scenes = {split: read_annotations(file, path) for split, file in _find_annotations(path).items()}
        return base.make_detection(scenes, options.class_names(path), str(path))


def _find_annotations(path: Path) -> dict[str, Path]:
    files = sorted([*path.glob("*.json"), *(path / "annotations").glob("*.json")])
    named = {file: file.stem.removeprefix("instances_").rstrip("0123456789") for file in files}
    return {base.SPLITS[name]: file for file, name in named.items() if name in base.SPLITS and _is_coco(file)}


def _is_coco(path: Path) -> bool:
    """Return True for a file that begins as COCO's do: other JSON may be kept beside images."""
    with path.open("rb") as stream:
        text = stream.read(2**20)
    return any(key in text for key in KEYS)


def read_annotations(path: Path, folder: Path) -> list[base.Scene]:
    """Images with their objects. COCO's boxes are left, top, width, height; crowds count as difficult."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in described["categories"]}
        objects: dict[Any, list[tuple[str, tuple[float, ...], bool]]] = {}
        for entry in described["annotations"]:
            left, top, width, height = map(float, entry["bbox"])
            corners = base.check_corners((left, top, left + width, top + height))
            objects.setdefault(entry["image_id"], []).append(
                (names[entry["category_id"]], corners, bool(entry.get("iscrowd", 0)))
            )
        images = {entry["id"]: str(entry["file_name"]) for entry in described["images"]}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as annotations of COCO: {error!r}.") from error
    split = path.stem.removeprefix("instances_")
    places = [folder / "images" / split, folder / split, folder / "images", folder]
    files = {
        number: base.find_file([place / name for place in places], f"{path}: there is no image {name[:200]!r}")
        for number, name in images.items()
    }
    return [(file, objects.get(number, [])) for number, file in files.items()]

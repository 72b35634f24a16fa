"""Tables of boxes: a row for each box, with its picture, its class, and its corners or its left, top, width and height.

_annotations.csv (Roboflow, TensorFlow), train_labels.csv, boxes of Open Images in shares of the sides, and lines
`path,x1,y1,x2,y2,class` without column names (RetinaNet), where a picture without objects has empty cells
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelpatch.data.sources import base
from modelpatch.data.sources.column_names import (
    IMAGE_NAMES,
    LABEL_NAMES,
    check_column,
    choose_image,
    choose_label,
    choose_split,
    find_by_name,
    fold_column,
    list_some,
)
from modelpatch.data.sources.documents import Fields
from modelpatch.data.sources.headers import Corners
from modelpatch.data.sources.labels import is_missing
from modelpatch.data.sources.manifest_files import find_manifests
from modelpatch.data.sources.manifests import NO_PICTURE, is_table
from modelpatch.data.sources.picture_files import Hint, PictureFiles
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.scenes import Scene, SceneObject, make_detection
from modelpatch.data.sources.tables import READERS, TableFile, peek_columns, read_table
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Detection

CORNERS = ("xmin ymin xmax ymax", "x1 y1 x2 y2", "left top right bottom", "bboxxmin bboxymin bboxxmax bboxymax")
SIZES = (
    *("bboxx bboxy bboxwidth bboxheight", "bboxx bboxy bboxw bboxh", "bboxleft bboxtop bboxwidth bboxheight"),
    *("xmin ymin width height", "left top width height", "x y width height", "x y w h"),
)
JOINED = ("bbox", "bboxes", "box", "boxes", "boundingbox", "boundingboxes")  # which hold all numbers of a box
LISTED = ["image", *(f"column {number}" for number in range(2, 7))]  # of a table without column names


class BoxColumns(NamedTuple):
    """The columns of the four numbers of a box, which are corners, or a corner and a size."""

    names: tuple[str, ...]
    sized: bool = False


def find_box_columns(columns: Sequence[str]) -> BoxColumns | None:
    """The columns of boxes among those of a table; None where there are none."""
    folded = {fold_column(name).replace("_", ""): name for name in columns}
    for sized, known in ((False, CORNERS), (True, SIZES)):
        for names in known:
            if all(name in folded for name in names.split()):
                return BoxColumns(tuple(folded[name] for name in names.split()), sized)
    return None


def _find_joined(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if fold_column(name).replace("_", "") in JOINED]


@base.register_source("box-tables")
class BoxTables(base.DataSource):
    """A table with a row for each box, or one for each split."""

    kind = Detection.name
    has_columns = True

    def accepts(self, source: Any) -> bool:
        return any(map(_has_boxes, (file for own in _list_tables(Path(source)).values() for file in own)))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        folder = path if path.is_dir() else path.parent
        scenes = defaultdict[str, list[Scene]](list)
        for split, files in _list_tables(path).items():
            for file in files:
                for own, scene in _read_scenes(read_table(file), folder, split or "train", options, remarks):
                    scenes[own].append(scene)
        if not scenes:
            raise DataError(
                f"{path} has no row with a picture that is there. Put the table into the folder of its paths."
            )
        names = options.class_names(folder)
        return make_detection(scenes, names, str(path), remarks, names_from_user=options.names is not None)


def _list_tables(path: Path) -> Mapping[str | None, Sequence[Path]]:
    if path.is_dir():
        try:
            return find_manifests(path)
        except DataError:  # several manifests, of which their source asks for one
            return {}
    return {None: [path]} if is_table(path) and path.suffix.lower() in READERS else {}


def _has_boxes(file: Path) -> bool:
    columns = peek_columns(file)
    if columns == LISTED:
        return _is_listed(read_table(file))
    names = dict.fromkeys(columns, ())
    boxes = find_box_columns(columns) or (_find_joined(columns) and not find_by_name(names, LABEL_NAMES))
    return bool(boxes and find_by_name(names, IMAGE_NAMES))


def _is_listed(table: TableFile) -> bool:
    """Return True for lines of a path, four numbers or nothing, and a class."""
    numbers = all(_is_number(cell) for name in LISTED[1:5] for cell in table.cells[name])
    return numbers and not all(_is_number(cell) for cell in table.cells[LISTED[5]])


def _is_number(cell: Any) -> bool:
    try:
        return is_missing(cell) or float(cell) == float(cell)
    except (TypeError, ValueError):
        return False


def _read_scenes(
    table: TableFile, folder: Path, default: str, options: base.SourceOptions, remarks: Remarks
) -> list[tuple[str, Scene]]:
    """The pictures of a table with their boxes and their splits. Raises `DataError` that names the row."""
    cells, source, file = table.cells, str(table.path), table.path
    own = PictureFiles(file.parent)
    pictures = own if file.parent == folder or own.holds_pictures else PictureFiles(folder)
    columns = find_box_columns(table.columns)
    if columns is None and table.columns != LISTED:
        joined = _find_joined(table.columns)
        told = (
            f"all numbers of a box in the column {joined[0]}, and nothing says what each is"
            if joined
            else (f"the columns {list_some(table.columns)}, and none of boxes")
        )
        raise DataError(
            f"{source} has {told}. Write columns {CORNERS[0].replace(' ', ', ')}, or xmin, ymin, width, height, and one of "
            "classes."
        )
    columns = columns or BoxColumns(tuple(LISTED[1:5]))
    image = check_column(cells, options.image_column, "image-column", source) or choose_image(
        cells, source, pictures.find
    )
    sides = {name for name in cells if fold_column(name) in ("width", "height")} - {*columns.names}
    taken = (image, *columns.names, *sides)
    label = check_column(cells, options.label_column, "label-column", source)
    label = label or (LISTED[5] if table.columns == LISTED else choose_label(cells, taken, source)[0])
    if label is None:
        rest, numbers = list_some([name for name in cells if name not in taken]) or "none", ",".join(columns.names)
        raise DataError(
            f"{source} has boxes in {numbers} and no column of classes; its others are {rest}. Name one: --label-column "
            f"(label_column=...). To predict these numbers for each image: --kind regression --classes {numbers}."
        )
    named = check_column(cells, options.split_column, "split-column", source)
    splits = choose_split(cells, (image, label), source, named) or {}
    boxes: dict[tuple[str, Path], list[SceneObject]] = {}
    lost: list[str] = []
    for row in range(len(table)):
        split = splits.get(row, default)
        name = str(cells[image][row])
        picture = None if is_missing(cells[image][row]) else pictures.find(name, Hint(split))
        if picture is None:
            lost.append(f"{file.name}, row {row + 1}: {name[:200]}")
            continue
        objects = boxes.setdefault((split, picture), [])
        if corners := _corners(table, row, columns):
            objects.append(SceneObject(_class_of(table, row, label), corners))
    remarks.pass_over(NO_PICTURE, *lost)
    ends = [value for objects in boxes.values() for one in objects for value in one.corners]
    shares = bool(ends) and max(ends) <= 1
    remarks.note(f"the boxes of {file.name} are read as shares of the pictures' sides") if shares else None
    return [(split, Scene(picture, objects, relative=shares)) for (split, picture), objects in boxes.items()]


def _corners(table: TableFile, row: int, columns: BoxColumns) -> Corners | None:
    """The corners of a row's box, None for a row of a picture without objects."""
    values = {name: table.cells[name][row] for name in columns.names}
    if all(map(is_missing, values.values())):
        return None
    fields = Fields(values, table.path, f"row {row + 1}")
    left, top, right, bottom = (fields.number(name) for name in columns.names)
    return (left, top, left + right, top + bottom) if columns.sized else (left, top, right, bottom)


def _class_of(table: TableFile, row: int, label: str) -> str:
    cell = table.cells[label][row]
    if is_missing(cell):
        raise DataError(f"{table.place(row)}: its box has no {label}. Expected the class of the object.")
    return str(cell).strip()

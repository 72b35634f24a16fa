"""Boxes as annotation tools export them in forms of their own, tables of boxes, and data that is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modelpatch.data.sources.base import Found, SourceOptions, read_source
from modelpatch.data.task import load_task
from modelpatch.errors import DataError, DataWarning
from modelpatch.tasks.detection import Boxes
from pictures import counts, write_classes

WIDTH, HEIGHT = 40, 20
BOX = (4.0, 2.0, 14.0, 10.0)  # left, top, right, bottom
CENTRE = (9.0, 6.0)
NAMES = ("0.jpg", "1.jpg")


def draw(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / name, "JPEG")


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def found(source: Path, **options: Any) -> Found:
    return read_source(source, SourceOptions(**options))[0]


def boxes_of(read: Found, split: str = "train") -> list[list[tuple[str, tuple[float, ...]]]]:
    """The class and the corners of every object, by picture."""
    told = []
    for target in read.splits[split].targets or ():
        assert isinstance(target, Boxes)
        told.append([(read.classes[n], tuple(c)) for n, c in zip(target.labels, target.corners.tolist(), strict=True)])
    return told


# tools ------------------------------------------------------------------------------------------------------


def labelme(name: str, points: list[list[float]] | None = None, kind: str = "rectangle", **more: Any) -> Any:
    shape = {"label": "dog", "points": points or [[4, 2], [14, 10]], "shape_type": kind}
    return {"shapes": [shape], "imagePath": name, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more}


def write_labelme(root: Path) -> Path:
    draw(root, *NAMES)
    write(root / "0.json", labelme("0.jpg"))
    write(root / "1.json", labelme("1.jpg", [[14, 10], [4, 2]]))  # from the other corner
    return root


def cvat(inner: str, name: str = "0.jpg", more: str = "") -> str:
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    first = f'<image id="0" name="{name}" {size}>{inner}</image><image id="1" name="1.jpg" {size}>{inner}</image>'
    return f"<?xml version='1.0'?><annotations><version>1.1</version>{more}{first}</annotations>"


CVAT_BOX = '<box label="dog" occluded="0" xtl="4" ytl="2" xbr="14" ybr="10" z_order="0"/>'


def write_cvat(root: Path) -> Path:
    draw(root / "images", *NAMES)
    write(root / "annotations.xml", cvat(CVAT_BOX))
    return root


def sly(kind: str = "rectangle", points: Any = ((4, 2), (14, 10))) -> Any:
    thing = {"classTitle": "dog", "geometryType": kind, "points": {"exterior": list(points), "interior": []}}
    return {"size": {"height": HEIGHT, "width": WIDTH}, "tags": [], "objects": [thing]}


def write_sly(root: Path) -> Path:
    write(root / "meta.json", {"classes": [{"title": "dog", "shape": "rectangle"}], "tags": []})
    for name in NAMES:
        draw(root / "ds0" / "img", name)
        write(root / "ds0" / "ann" / f"{name}.json", sly())
    return root


def write_createml(root: Path) -> Path:
    draw(root / "train", *NAMES)
    place = {"x": CENTRE[0], "y": CENTRE[1], "width": BOX[2] - BOX[0], "height": BOX[3] - BOX[1]}
    rows = [{"image": name, "annotations": [{"label": "dog", "coordinates": place}]} for name in NAMES]
    write(root / "train" / "_annotations.createml.json", rows)
    return root


def hundredths(**more: Any) -> dict[str, Any]:
    across, down = 100 / WIDTH, 100 / HEIGHT
    value = {"x": 4 * across, "y": 2 * down, "width": 10 * across, "height": 8 * down, "rotation": 0}
    return {**value, "rectanglelabels": ["dog"], **more}


def studio(number: int, *values: dict[str, Any], **more: Any) -> Any:
    sizes = {"original_width": WIDTH, "original_height": HEIGHT}
    results = [{"type": "x", "value": value, **sizes} for value in values]
    picture = f"/data/upload/1/0a1b2c3d-{number}.jpg"
    return {"id": number, "annotations": [{"result": results, **more}], "data": {"image": picture}}


def write_studio(root: Path) -> Path:
    draw(root / "images", *NAMES)
    write(root / "project-1.json", [studio(number, hundredths()) for number in range(2)])
    return root


def write_studio_min(root: Path) -> Path:
    draw(root, "0a1b2c3d-0.jpg", "0a1b2c3d-1.jpg")
    label = [{**hundredths(), "original_width": WIDTH, "original_height": HEIGHT}]
    rows = [{"id": n, "image": f"https://x/y?d=local/0a1b2c3d-{n}.jpg", "label": label} for n in range(2)]
    write(root / "min.json", rows)
    return root


TABLES = {  # a line of column names, and the row of a picture
    "tensorflow": ("filename,width,height,class,xmin,ymin,xmax,ymax", "{},40,20,dog,4,2,14,10"),
    "sizes": ("image,x,y,w,h,label", "{},4,2,10,8,dog"),
    "bbox": ("image_id;bbox_x;bbox_y;bbox_width;bbox_height;category", "{};4;2;10;8;dog"),
    "open images": ("ImageID,LabelName,XMin,XMax,YMin,YMax", "{},dog,0.1,0.35,0.1,0.5"),
    "retinanet": (None, "{},4,2,14,10,dog"),
}


def write_table(root: Path, form: str) -> Path:
    header, row = TABLES[form]
    draw(root, *NAMES)
    lines = [row.format(name) for name in NAMES]
    write(root / "boxes.csv", "\n".join([header, *lines] if header else lines))
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "labelme": write_labelme,
    "cvat": write_cvat,
    "supervisely": write_sly,
    "createml": write_createml,
    "label studio": write_studio,
    "label studio, min": write_studio_min,
    **{f"table, {form}": lambda root, form=form: write_table(root, form) for form in TABLES},
}


@pytest.mark.parametrize("tool", WRITERS)
def test_the_boxes_of_a_tool_are_read(tmp_path: Path, tool: str) -> None:
    read = found(WRITERS[tool](tmp_path))
    assert read.kind == "detection"
    for own in boxes_of(read):
        assert [name for name, _ in own] == ["dog"]
        assert own[0][1] == pytest.approx(BOX)
    assert len(read.splits["train"].images) == 2
    assert not read.passed_over


@pytest.mark.parametrize("tool", ["labelme", "cvat", "table, sizes"])
def test_splits_are_folders_with_annotations_of_their_own(tmp_path: Path, tool: str) -> None:
    for split in ("Train", "valid", "my-test"):
        WRITERS[tool](tmp_path / split)
    read = found(tmp_path)
    assert {split: len(own.images) for split, own in read.splits.items()} == {"train": 2, "validation": 2, "test": 2}


def test_a_file_of_annotations_is_a_source_too(tmp_path: Path) -> None:
    assert len(boxes_of(found(write_cvat(tmp_path / "a") / "annotations.xml"))) == 2
    assert len(boxes_of(found(write_studio(tmp_path / "b") / "project-1.json"))) == 2
    assert len(boxes_of(found(write_table(tmp_path / "c", "sizes") / "boxes.csv"))) == 2


def test_labelme_apart_from_its_pictures_with_paths_of_windows(tmp_path: Path) -> None:
    draw(tmp_path / "images", *NAMES)
    for name in NAMES:
        write(
            tmp_path / "labels" / f"{name[0]}.json",
            labelme(f"..\\images\\{name}", [[4, 2], [14, 4], [9, 10]], "polygon"),
        )
    read = found(tmp_path)
    assert [own[0][1] for own in boxes_of(read)] == [BOX, BOX]
    assert read.notes == ("2 outlines are read as the boxes around them: polygon in 0.json, polygon in 1.json",)


def test_labelmes_circle_has_a_centre_and_a_point_of_its_edge(tmp_path: Path) -> None:
    draw(tmp_path, "0.jpg")
    write(tmp_path / "0.json", labelme("0.jpg", [[10, 10], [13, 14]], "circle"))  # of radius 5
    assert boxes_of(found(tmp_path)) == [[("dog", (5.0, 5.0, 15.0, 15.0))]]


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ('<polygon label="dog" points="4,2;14,4;9,10"/>', BOX),
        ('<ellipse label="dog" cx="9" cy="6" rx="5" ry="4"/>', BOX),
        ('<mask label="dog" rle="1, 2" left="4" top="2" width="10" height="8"/>', BOX),
        (CVAT_BOX.replace("<box", '<box rotation="90"'), (5.0, 1.0, 13.0, 11.0)),  # about its middle
    ],
)
def test_cvats_other_shapes_are_boxes_around_them(tmp_path: Path, shape: str, box: tuple[float, ...]) -> None:
    draw(tmp_path / "images", *NAMES)
    write(tmp_path / "annotations.xml", cvat(shape))
    assert boxes_of(found(tmp_path))[0][0][1] == pytest.approx(box)


def test_label_studios_other_shapes_and_skipped_annotations(tmp_path: Path) -> None:
    draw(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    corners = [[4 / WIDTH * 100, 2 / HEIGHT * 100], [14 / WIDTH * 100, 10 / HEIGHT * 100]]
    polygon = {"points": [*corners, corners[0]], "polygonlabels": ["dog"]}
    round_ = {"x": 9 / WIDTH * 100, "y": 6 / HEIGHT * 100, "radiusX": 5 / WIDTH * 100, "radiusY": 4 / HEIGHT * 100}
    write(
        tmp_path / "p.json",
        [
            studio(0, polygon, {**round_, "ellipselabels": ["cat"]}),
            studio(1, hundredths(rotation=90), {"choices": ["indoor"]}),  # turned about its left upper corner
            studio(2, hundredths(), was_cancelled=True),
        ],
    )
    told = boxes_of(found(tmp_path))
    assert [name for name, _ in told[0]] == ["dog", "cat"]
    assert [corners for _, corners in told[0]] == [pytest.approx(BOX), pytest.approx(BOX)]
    assert told[1][0][1] == pytest.approx((0.0, 2.0, 4.0, 12.0))  # cut at the picture's edge
    assert told[2] == []


def test_label_studios_choices_are_classes(tmp_path: Path) -> None:
    draw(tmp_path / "images", *(f"{number}.jpg" for number in range(5)))
    tasks = [studio(number, {"choices": ["cat" if number % 2 else "dog"]}) for number in range(4)]
    write(tmp_path / "full.json", [*tasks, studio(4)])
    read = found(tmp_path)
    assert (read.classes, read.splits["train"].labels.tolist()) == (["cat", "dog"], [1, 0, 1, 0])
    assert read.passed_over == {"task without a choice": ("full.json, task 4",)}
    (tmp_path / "full.json").unlink()
    rows = [{"image": f"/data/upload/1/0a1b2c3d-{n}.jpg", "choice": "cat" if n % 2 else "dog"} for n in range(4)]
    write(tmp_path / "min.json", rows)
    assert found(tmp_path).splits["train"].labels.tolist() == [1, 0, 1, 0]


def test_a_picture_of_a_table_of_boxes_may_have_several_or_none(tmp_path: Path) -> None:
    draw(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = ["file,x1,y1,x2,y2,name,part", "0.jpg,4,2,14,10,dog,train", "0.jpg,0,0,9,9,cat,train", "1.jpg,,,,,,train"]
    write(tmp_path / "b.csv", "\n".join([*rows, "2.jpg,4,2,14,10,dog,test", "lost.jpg,4,2,14,10,dog,train"]))
    with pytest.raises(DataError, match="no column of classes; its others are name, part"):
        found(tmp_path)
    read = found(tmp_path, label_column="name", split_column="part")
    assert [[name for name, _ in own] for own in boxes_of(read)] == [["dog", "cat"], []]
    assert boxes_of(read, "test") == [[("dog", BOX)]]
    assert read.passed_over == {"row without its picture": ("b.csv, row 5: lost.jpg",)}


def test_a_table_of_boxes_can_be_read_as_numbers(tmp_path: Path) -> None:
    draw(tmp_path, *NAMES)
    write(tmp_path / "b.csv", "file,x1,y1,x2,y2\n0.jpg,4,2,14,10\n1.jpg,1,2,3,4")
    with pytest.raises(DataError, match="--kind regression --classes x1,y1,x2,y2"):
        found(tmp_path)
    read = found(tmp_path, kind="regression", classes=["x1", "y1", "x2", "y2"])
    assert read.kind == "regression"


# refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("0.json", labelme("lost.jpg"), r"0\.json: there is no image 'lost.jpg'"),
        ("0.json", labelme("0.jpg", [[4, 2, 3]]), r"shapes\[0\]: points is no list of points"),
        ("0.json", {"shapes": [{"points": [[1, 1], [2, 2]]}], "imagePath": "0.jpg"}, "it has no 'label'"),
        ("a.xml", cvat(CVAT_BOX.replace('"4"', '"x"')), r"image\[0\]\.box\[0\]: xtl holds 'x'"),
        ("a.xml", cvat("<cuboid label='a'/>"), "it is a cuboid; expected a box"),
        ("a.xml", cvat('<tag label="dog"/>'), "holds tags of whole pictures and no boxes"),
        ("a.xml", cvat("", more="<track id='0'/>"), "holds the tracks of a video"),
        ("p.json", [studio(0, {"brushlabels": ["dog"]}), studio(1, hundredths())], "it is none of rectanglelabels"),
        ("p.json", [studio(7, hundredths())], "there is no image '/data/upload/1/0a1b2c3d-7.jpg'"),
        ("ann/0.jpg.json", sly("bitmap"), "it is a bitmap; expected a rectangle or polygon"),
        ("b.csv", "file,x1,y1,x2,y2,class\n0.jpg,4,2,a,10,dog", r"b\.csv, row 1: x2 holds 'a'"),
        ("b.csv", "file,x1,y1,x2,y2,class\n0.jpg,4,2,6,10,", r"b\.csv, row 1: its box has no class"),
        ("b.csv", 'image_id,bbox\n0,"[4, 2, 6, 10]"', r"b\.csv has all numbers of a box in the column bbox"),
        ("b.csv", "image_id,BBoxes\n1,4 2 6 10", r"b\.csv has all numbers of a box in the column BBoxes"),
        ("b.jsonl", {"file_name": "0.jpg", "boxes": [[4, 2, 6, 10]]}, "all numbers of a box in the column boxes"),
    ],
)
def test_what_is_wrong_names_the_file_and_the_place(tmp_path: Path, file: str, content: Any, problem: str) -> None:
    draw(tmp_path, "0.jpg", "1.jpg")
    draw(tmp_path / "img", "0.jpg")
    write(tmp_path / file, content)
    with pytest.raises(DataError, match=problem):
        load_task(tmp_path)


VIA = {"0.jpg9": {"filename": "0.jpg", "regions": [{"shape_attributes": {"name": "rect"}, "region_attributes": {}}]}}
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {  # files, and what is said
    "via": ({"via.json": VIA}, "annotations of VIA, not read. Export them as COCO"),
    "vott": ({"0-asset.json": {"asset": {"name": "0.jpg"}, "regions": []}}, "annotations of VoTT"),
    "darwin": ({"annotations/0.json": {"item": {"slots": []}, "annotations": []}}, "annotations of V7 Darwin"),
    "labelbox": ({"e.ndjson": {"data_row": {}, "projects": {}}}, "an export of Labelbox"),
    "sagemaker": ({"o.manifest": {"source-ref": "s3://x", "a": 1}}, "a manifest of SageMaker"),
    "kitti": ({"label_2/0.txt": "Car 0.00 0 -1.58 1 1 3 3 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"}, "boxes of KITTI"),
    "dota": ({"labelTxt/0.txt": "imagesource:x\ngsd:0.1\n1 1 3 1 3 3 1 3 plane 0"}, "oriented boxes of DOTA"),
    "records": ({"train/a.tfrecord": "x", "b.tfrecord": "x"}, r"2 files, first b\.tfrecord: records of TensorFlow"),
    "mnist": ({"train-images-idx3-ubyte": "x"}, "MNIST's own files"),
    "cifar": ({"data_batch_1": "x", "data_batch_2": "x"}, "CIFAR's own files"),
    "archive": ({"flowers.zip": "PK"}, r"1 file, first flowers\.zip: archives, not read. Unpack them"),
    "heic": ({"cat/0.HEIC": "x", "dog/1.HEIC": "x"}, r"2 files, first cat/0\.HEIC: .* Convert them to JPEG"),
    "dicom": ({"cat/0.dcm": "x", "dog/1.dcm": "x"}, "medical images"),
    "npy": ({"cat/0.npy": "x", "dog/1.npy": "x"}, r"2 files, first cat/0\.npy: arrays, not read. Write pictures"),
    "hdf5": ({"train.h5": "x"}, "arrays, not read"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_data_of_others_is_refused_by_name_with_what_to_do(tmp_path: Path, name: str) -> None:
    files, problem = FOREIGN[name]
    if name not in ("heic", "dicom", "npy"):
        draw(tmp_path / "pictures", "0.jpg")
    for file, content in files.items():
        write(tmp_path / file, content)
    with pytest.raises(DataError, match=problem):
        load_task(tmp_path)


def test_a_file_of_others_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a folder .* Found 1 file, first a\.npz: arrays, not read"):
        load_task(write(tmp_path / "a.npz", "x"))


@pytest.mark.parametrize("suffix", [".npy", ".NPZ", ".mat"])
def test_arrays_among_the_pictures_of_classes_are_refused_and_others_beside_them_passed_over(
    tmp_path: Path, suffix: str
) -> None:
    write_classes(tmp_path)
    write(tmp_path / f"features{suffix}", "x")
    assert load_task(tmp_path).passed_over == {f"no picture ({suffix.lower()})": (f"features{suffix}",)}
    write(tmp_path / "cat" / f"x{suffix}", "x")
    with pytest.raises(DataError, match=rf"1 file, first cat/x\{suffix}: arrays, not read"):
        load_task(tmp_path)
    (tmp_path / "cat" / f"x{suffix}").unlink()
    write(tmp_path / "bird" / f"x{suffix}", "x")  # a class of arrays alone
    with pytest.raises(DataError, match=rf"first bird/x\{suffix}"):
        load_task(tmp_path)


# warnings ---------------------------------------------------------------------------------------------------


def test_what_a_user_may_miss_is_warned_of_once_and_system_files_are_not(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for name in ("cat/Thumbs.db", "cat/notes.txt", ".hidden"):
        write(tmp_path / name, "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(tmp_path)
    for name in ("cat/3.heic", "dog/4.heic"):
        write(tmp_path / name, "x")
    with pytest.warns(DataWarning) as told:
        task = load_task(tmp_path)
    (message,) = [str(one.message) for one in told]
    assert message == (
        f"{tmp_path}: not read: 2, picture in a format that is not read (.heic) (cat/3.heic, dog/4.heic)."
    )
    assert told[0].filename == __file__
    assert counts(task)["train"].keys() == {"cat", "dog"}

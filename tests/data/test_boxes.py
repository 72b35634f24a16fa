"""Detection data as tools write it: COCO, VOC, YOLO and FiftyOne in their layouts, and everything wrong with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.sources.base import Found, SourceOptions, read_source
from modelpatch.data.sources.headers import Orientation
from modelpatch.data.sources.voc import SIDES, read_annotation
from modelpatch.data.task import load_task
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Boxes

SIZE = (40, 20)
BOX = (4.0, 2.0, 14.0, 10.0)  # left, top, right, bottom
ORIENTATION = 0x0112
DOG = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]


def picture(file: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", size, "gray").save(file, exif=exif)
    return file


def coco(names: Sequence[str], box: Sequence[float] | None = None, **more: Any) -> dict[str, Any]:
    """One object a picture: a dog with the box, and a cat in the first."""
    left, top, right, bottom = box or BOX
    images = [{"id": 10 + n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]
    shape = {"bbox": [left, top, right - left, bottom - top]}
    objects = [{"id": n, "image_id": 10 + n, "category_id": 90, **shape} for n in range(len(names))]
    objects.append({"id": 99, "image_id": 10, "category_id": 3, **shape})
    return {"images": images, "annotations": objects, "categories": DOG, **more}


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def xml(box: Sequence[float] = BOX, name: str = "dog", more: str = "", filename: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<annotation><filename>{filename}</filename><size><width>40</width><height>20</height></size>{more}"
        f"<object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
    )


def row(index: int, box: Sequence[float] = BOX) -> str:
    left, top, right, bottom = box[0] / 40, box[1] / 20, box[2] / 40, box[3] / 20
    return f"{index} {(left + right) / 2} {(top + bottom) / 2} {right - left} {bottom - top}\n"


def found(root: Path, **options: Any) -> Found:
    return read_source(root, SourceOptions(**options))[0]


def boxes(read: Found, split: str = "train", number: int = 0) -> Boxes:
    target = (read.splits[split].targets or ())[number]
    assert isinstance(target, Boxes)
    return target


def check(root: Path, counts: Mapping[str, int], **options: Any) -> Found:
    """The splits have so many pictures, and each of these a dog where it was drawn."""
    read = found(root, **options)
    assert read.kind == "detection"
    assert {split: len(one) for split, one in read.splits.items()} == counts
    for split, count in counts.items():
        for number in range(count):
            one = boxes(read, split, number)
            dogs = one.corners[one.labels == list(read.classes).index("dog")]
            assert np.allclose(dogs, [BOX]), (split, number)
    return read


# COCO -------------------------------------------------------------------------------------------------------

COCO_LAYOUTS: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    # annotations by split, and the folder of each split's pictures
    "official": (
        {"train": "annotations/instances_train2017.json", "validation": "annotations/instances_val2017.json"},
        {"train": "train2017", "validation": "val2017"},
    ),
    "roboflow": (
        {split: f"{name}/_annotations.coco.json" for split, name in (("train", "train"), ("validation", "valid"))},
        {"train": "train", "validation": "valid"},
    ),
    "label studio": ({"train": "result.json"}, {"train": "images"}),
    "cvat": ({"train": "annotations/instances_default.json"}, {"train": "images"}),
    "cvat subsets": (
        {"train": "annotations/instances_Train.json", "test": "annotations/instances_Test.json"},
        {"train": "images/Train", "test": "images/Test"},
    ),
    "one file": ({"train": "export.json"}, {"train": "pictures/all"}),
    "fiftyone": ({"train": "labels.json"}, {"train": "data"}),
    "fiftyone splits": (
        {"train": "train/labels.json", "test": "test/labels.json"},
        {"train": "train/data", "test": "test/data"},
    ),
}


@pytest.mark.parametrize("layout", COCO_LAYOUTS)
def test_coco_is_read_as_every_tool_lays_it_out(layout: str, tmp_path: Path) -> None:
    files, folders = COCO_LAYOUTS[layout]
    for split, file in files.items():
        names = [f"{number}.jpg" for number in range(2)]  # the same names in every split
        for name in names:
            picture(tmp_path / folders[split] / name)
        write(tmp_path / file, coco(names))
    read = check(tmp_path, dict.fromkeys(files, 2))
    assert list(read.classes) == ["cat", "dog"]
    for split in files:
        assert all(folders[split] in str(image) for image in read.splits[split].images)
    if len(files) == 1:
        check(tmp_path / files["train"], {"train": 2})


@pytest.mark.parametrize(
    "name", ["a/b/0.jpg", "a\\b\\0.jpg", "/home/me/b/0.jpg", "../b/0.jpg", "C:\\data\\0.jpg", "b/%30.jpg"]
)
def test_names_with_folders_find_their_picture(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a" / "b" / "0.jpg")
    write(tmp_path / "train.json", coco([name]))
    check(tmp_path, {"train": 1})


def test_a_name_of_two_pictures_is_a_question(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        picture(tmp_path / folder / "0.jpg")
    write(tmp_path / "train.json", coco(["c/0.jpg"]))
    with pytest.raises(DataError, match=r"train\.json: '0\.jpg' may be .*a/0\.jpg or .*b/0\.jpg"):
        found(tmp_path)


@pytest.mark.parametrize("place", [("images", "id"), ("annotations", "image_id"), ("annotations", "category_id")])
def test_ids_that_some_entries_write_as_texts_are_the_same(place: tuple[str, str], tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    content = coco(["0.jpg"])
    for entry in content[place[0]]:
        entry[place[1]] = str(entry[place[1]])
    write(tmp_path / "train.json", content)
    check(tmp_path, {"train": 1})


def test_outlines_alone_have_boxes(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.jpg")
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[2:10, 4:14] = 1
    runs = [0]
    for value in mask.T.ravel():  # down the columns, beginning with the ground
        if value != len(runs) % 2 - 1 and value != (len(runs) - 1) % 2:
            runs.append(0)
        runs[-1] += 1
    outlines: list[Any] = [[[4, 2, 14, 2, 14, 10, 4, 10]], [[4, 2, 14, 2, 4, 3], [4, 10, 6, 10, 5, 9]]]
    outlines.append({"size": [20, 40], "counts": runs})
    coder = pytest.importorskip("pycocotools.mask")
    outlines.append({"size": [20, 40], "counts": coder.encode(np.asfortranarray(mask))["counts"].decode()})
    content = coco([f"{number}.jpg" for number in range(4)])
    for entry, outline in zip(content["annotations"], outlines, strict=False):
        del entry["bbox"]
        entry["segmentation"] = outline
    write(tmp_path / "train.json", content)
    check(tmp_path, {"train": 4})


def test_boxes_without_area_or_outside_are_passed_over_and_others_cut(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.jpg")
    content = coco(["0.jpg", "1.jpg"])
    for box in ([5, 5, 9, 0], [50, 1, 5, 5], [30, 10, 50, 50]):
        content["annotations"].append({"image_id": 11, "category_id": 3, "bbox": box, "iscrowd": 1})
    content["annotations"].append({"image_id": 77, "category_id": 3, "bbox": [1, 1, 2, 2]})
    content["categories"] = [*DOG, {"id": 0, "name": "animals"}]
    write(tmp_path / "train.json", content)
    read = check(tmp_path, {"train": 2})
    assert list(read.classes) == ["cat", "dog"]
    second = boxes(read, number=1)
    assert second.corners[1].tolist() == [30, 10, 40, 20]
    assert second.difficult.tolist() == [False, True]
    assert {reason: len(names) for reason, names in read.passed_over.items()} == {
        "box without area": 1,
        "box outside of its picture": 1,
        "object of a picture that the annotations do not list": 1,
        "picture that no annotation lists": 1,
    }
    assert "1.jpg" in read.passed_over["box without area"][0]
    assert any(note.startswith("1 box reaches beyond the picture") for note in read.notes)
    assert any("animals" in note for note in read.notes)


@pytest.mark.parametrize("layout", ["coco, no width", "coco, an outline alone", "voc", "yolo", "table"])
def test_a_box_without_area_is_passed_over_and_counted_in_every_layout(layout: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    if layout.startswith("coco"):
        content, flat = coco(["0.jpg"]), {"image_id": 10, "category_id": 3}
        shape = {"bbox": [5, 5, 0, 9]} if "width" in layout else {"segmentation": [[5, 5, 9, 5, 7, 5]]}
        content["annotations"].append(flat | shape)
        write(tmp_path / "train.json", content)
    elif layout == "voc":
        flat_one = "<object>" + xml((5, 5, 5, 9)).partition("<object>")[2]
        write(tmp_path / "0.xml", xml(filename="0.jpg").removesuffix("</annotation>") + flat_one)
    elif layout == "yolo":
        write(tmp_path / "classes.txt", "cat\ndog")
        write(tmp_path / "0.txt", row(1) + "1 0.5 0.5 0.2 0\n")
    else:
        write(tmp_path / "train.csv", "image,xmin,ymin,xmax,ymax,class\n0.jpg,4,2,14,10,dog\n0.jpg,5,5,5,9,dog\n")
    read = found(tmp_path)
    assert read.kind == "detection"
    assert np.allclose(boxes(read).corners[0], BOX)
    assert [len(names) for reason, names in read.passed_over.items() if reason == "box without area"] == [1]


WRONG: list[tuple[Any, str]] = [
    ('{"images": [', r"train\.json cannot be read as annotations of COCO: Expecting"),
    ('{"images": ' + "[" * 100_000, r"train\.json cannot be read as annotations of COCO: maximum recursion"),
    ({"images": [], "categories": []}, "it has no 'annotations'"),
    (coco(["0.jpg"], images=3), "images is '3'; expected a list"),
    (coco(["0.jpg"], images=[3]), r"images\[0\]: it is '3'; expected an object"),
    (coco(["0.jpg"], images=[{"id": 10}]), r"images\[0\]: it has no 'file_name'"),
    (coco(["0.jpg"], images=[{"id": -10, "file_name": "0.jpg"}]), r"images\[0\]: id is '-10'; expected a whole number"),
    (
        coco(["0.jpg"], images=[{"id": 10, "file_name": "0.jpg"}] * 2),
        r"images\[1\]: the id 10 is that of another image",
    ),
    (coco(["0.jpg"], categories=[{"id": 3}]), r"categories\[0\]: it has no 'name'"),
    (
        coco(["0.jpg"], categories=[{"id": 3, "name": "cat"}]),
        r"annotations\[0\]: category_id 90 is none of the categories",
    ),
    (coco(["x" * 400]), "there is no image 'x+'; 1 of 1 are missing"),
    (coco(["9.jpg"]), r"there is no image '9\.jpg'; 1 of 1 are missing"),
    (coco(["0.jpg"], box=(float("nan"), 0, 1, 1)), r"annotations\[0\]: bbox holds 'nan'; expected a finite number"),
    (coco(["0.jpg"], annotations=[{"image_id": 10, "category_id": 3, "bbox": [1, 2]}]), "expected 4 numbers"),
    (coco(["0.jpg"], annotations=[{"image_id": 10, "category_id": 3}]), "neither a bbox nor a segmentation"),
    (coco(["0.jpg"], annotations=[]), "has no objects in any of its images"),
    (
        coco(
            ["0.jpg"],
            annotations=[{"image_id": 10, "category_id": 3, "segmentation": {"size": [2, 2], "counts": "o" * 99}}],
        ),
        r"annotations\[0\]\.segmentation: its counts do not fit its size",
    ),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_what_is_wrong_in_coco_is_named_with_its_place(content: Any, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    write(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=message) as error:
        found(tmp_path)
    assert "train.json" in str(error.value) or "no objects" in message


def test_two_annotations_of_one_split_are_a_question(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "0.jpg")
    for name in ("one.json", "two.json"):
        write(tmp_path / name, coco(["0.jpg"]))
    with pytest.raises(DataError, match=r"one\.json and .*two\.json are both annotations of the same pictures"):
        found(tmp_path)
    write(tmp_path / "annotations" / "instances_train2017.json", coco(["0.jpg"]))
    write(tmp_path / "annotations" / "person_keypoints_train2017.json", coco(["0.jpg"]))
    read = found(tmp_path)
    assert len(read.passed_over["another file of annotations"]) == 3


def test_files_beside_the_boxes_of_coco_are_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "train2017" / "0.jpg")
    write(tmp_path / "annotations" / "instances_train2017.json", coco(["0.jpg"]))
    for name in ("captions_train2017", "image_info_test2017"):
        write(tmp_path / "annotations" / f"{name}.json", {"images": [], "annotations": [{"caption": "a dog"}]})
    write(tmp_path / "annotations" / "._instances_train2017.json", "macOS")
    write(tmp_path / "notes.json", {"categories": [], "info": {}})
    read = check(tmp_path, {"train": 1})
    assert len(read.passed_over["another file of annotations"]) == 2


def test_a_folder_in_a_folder_is_unpacked_and_two_layouts_are_a_question(tmp_path: Path) -> None:
    root = tmp_path / "pets.v1" / "export"
    picture(root / "train" / "0.jpg")
    write(root / "train" / "_annotations.coco.json", coco(["0.jpg"]))
    write(tmp_path / "pets.v1" / "README.txt", "of Roboflow")
    check(tmp_path, {"train": 1})
    assert load_task(tmp_path, hold_out=False).task.name == tmp_path.name
    write(root / "train" / "0.xml", xml())
    with pytest.raises(DataError, match=r"more than one layout\. Keep one of them\. They are: COCO's .*; VOC's"):
        found(tmp_path)


# VOC --------------------------------------------------------------------------------------------------------

VOC_LAYOUTS = {  # pictures, annotations
    "labelImg beside": ("0.jpg", "0.xml"),
    "labelImg apart": ("images/0.jpg", "annotations/0.xml"),
    "no lists": ("JPEGImages/0.jpg", "Annotations/0.xml"),
    "fiftyone": ("data/0.jpg", "labels/0.xml"),
    "capitals": ("images/0.JPG", "xml/0.xml"),
    "split": ("train/0.jpg", "train/0.xml"),
    "split folders": ("Train/images/0.png", "Train/annotations/0.xml"),
}


@pytest.mark.parametrize("layout", VOC_LAYOUTS)
def test_voc_is_read_as_every_tool_lays_it_out(layout: str, tmp_path: Path) -> None:
    image, annotation = VOC_LAYOUTS[layout]
    picture(tmp_path / image)
    picture((tmp_path / image).with_name("unlabelled.jpg"))
    write(tmp_path / annotation, xml())
    read = check(tmp_path, {"train": 1})
    assert len(read.passed_over["picture that no annotation lists"]) == 1


def test_voc_of_roboflow_has_its_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / "0.jpg")
        write(tmp_path / split / "0.xml", xml())
    check(tmp_path, {"train": 1, "validation": 1, "test": 1})


def test_voc_in_its_devkit_is_found_and_two_years_are_a_question(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        root = tmp_path / "VOCdevkit" / year
        picture(root / "JPEGImages" / "0.jpg")
        write(root / "Annotations" / "0.xml", xml())
        write(root / "ImageSets" / "Main" / "trainval.txt", "0\n")
        write(root / "ImageSets" / "Main" / "dog_trainval.txt", "0  1\n")
        if year == "VOC2007":
            check(tmp_path, {"train": 1})
            check(tmp_path / "VOCdevkit", {"train": 1})
    with pytest.raises(DataError, match="holds VOC2007 and VOC2012"):
        found(tmp_path)


def test_a_picture_is_found_by_the_name_in_its_annotation(tmp_path: Path) -> None:
    picture(tmp_path / "frame one.jpg")
    write(tmp_path / "0001.xml", xml(filename="frame one.jpg"))
    check(tmp_path, {"train": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><object>", r"0\.xml cannot be read as annotations of Pascal VOC"),
        ("<annotation><object><name>a</name></object></annotation>", r"object 0 has no bndbox; it has name"),
        (xml(name=" "), r"0\.xml, object\[0\]\.object: it has no 'name'"),
        (xml(box=(float("nan"), 0, 1, 1)), r"0\.xml, object\[0\]\.bndbox: xmin holds 'nan'"),
        (
            "<!DOCTYPE annotation [<!ENTITY a 'ha'><!ENTITY b '&a;&a;'>]>" + xml(name="&b;"),
            r"0\.xml .*defines the entity 'a'",
        ),
        ("<annotation>" + "<a>" * 50_000, r"0\.xml cannot be read"),
    ],
)
def test_what_is_wrong_in_voc_is_named(content: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    write(tmp_path / "0.xml", content)
    with pytest.raises(DataError, match=message):
        found(tmp_path)


# YOLO -------------------------------------------------------------------------------------------------------

NAMES = ["cat", "dog"]
YOLO_LAYOUTS: dict[str, tuple[Any, Mapping[str, tuple[str, str]]]] = {  # data.yaml; pictures and labels of each split
    "ultralytics": (
        {"path": ".", "train": "images/train", "val": "images/val", "test": None, "names": dict(enumerate(NAMES))},
        {"train": ("images/train", "labels/train"), "validation": ("images/val", "labels/val")},
    ),
    "elsewhere": (
        {"path": "../datasets/pets", "train": "images/train", "val": ["images/val"], "nc": 2, "names": NAMES},
        {"train": ("images/train", "labels/train"), "validation": ("images/val", "labels/val")},
    ),
    "roboflow": (
        {"train": "../train/images", "val": "../valid/images", "test": "../test/images", "nc": 2, "names": NAMES},
        {"train": ("train/images", "train/labels"), "validation": ("valid/images", "valid/labels")},
    ),
    "no description": (
        None,
        {"train": ("images/train", "labels/train"), "test": ("images/test", "labels/test")},
    ),
    "no description, splits first": (
        None,
        {"train": ("train/images", "train/labels"), "validation": ("val/images", "val/labels")},
    ),
    "no splits": (None, {"train": ("images", "labels")}),
    "beside": (None, {"train": ("train", "train"), "test": ("test", "test")}),
    "fiftyone": (None, {"train": ("data", "data")}),
}


def write_yolo(root: Path, layout: str) -> Mapping[str, tuple[str, str]]:
    description, folders = YOLO_LAYOUTS[layout]
    for images, labels in folders.values():
        for number in range(2):
            picture(root / images / f"{number}.jpg")
            write(root / labels / f"{number}.txt", row(1))
    if description is None:
        write(root / "classes.txt", "cat\ndog\n")
    else:
        write(root / "data.yaml", yaml.safe_dump(description))
    return folders


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_is_read_as_every_tool_lays_it_out(layout: str, tmp_path: Path) -> None:
    folders = write_yolo(tmp_path, layout)
    read = check(tmp_path, dict.fromkeys(folders, 2))
    assert list(read.classes) == NAMES
    if layout == "roboflow":
        assert any("left out" in note and "test" in note for note in read.notes)
    if (tmp_path / "data.yaml").is_file():
        check(tmp_path / "data.yaml", dict.fromkeys(folders, 2))


def test_yolo_lists_pictures_in_text_files(tmp_path: Path) -> None:
    write_yolo(tmp_path, "no splits")
    write(tmp_path / "train.txt", "./images/0.jpg\n")
    write(tmp_path / "val.txt", "/foreign/images/1.jpg\n")
    write(tmp_path / "pets.yaml", yaml.safe_dump({"train": "train.txt", "val": "val.txt", "names": NAMES}))
    check(tmp_path, {"train": 1, "validation": 1})


def test_yolo_of_darknet_and_cvat_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "obj_train_data" / "0.jpg")
    write(tmp_path / "obj_train_data" / "0.txt", row(1))
    write(tmp_path / "obj.names", "cat\ndog\n")
    write(tmp_path / "train.txt", "data/obj_train_data/0.jpg\n")
    write(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    check(tmp_path, {"train": 1})


def test_yolo_without_names_is_a_question(tmp_path: Path) -> None:
    write_yolo(tmp_path, "no splits")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"nothing names their classes\. Give --classes"):
        found(tmp_path)
    check(tmp_path, {"train": 2}, classes=NAMES)


def test_outlines_empty_files_and_missing_files_of_yolo_are_told(tmp_path: Path) -> None:
    write_yolo(tmp_path, "no splits")
    write(tmp_path / "labels" / "0.txt", "1 0.1 0.1 0.35 0.1 0.35 0.5 0.1 0.5\n\n")
    write(tmp_path / "labels" / "2.txt", "")
    write(tmp_path / "labels" / "9.txt", row(1))
    for number in (2, 3):
        picture(tmp_path / "images" / f"{number}.jpg")
    picture(tmp_path / "preview.jpg")
    read = found(tmp_path)
    assert [len(boxes(read, number=number).corners) for number in range(4)] == [1, 1, 0, 0]
    assert np.allclose(boxes(read).corners, [BOX])
    assert any("outline" in note for note in read.notes)
    assert any("3.jpg" in note and "without objects" in note for note in read.notes)
    assert [Path(name).name for names in read.passed_over.values() for name in names] == ["preview.jpg", "9.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.2", r"0\.txt, line 1: it has 4 values"),
        ("1 0.5 0.5 0.2 0.2 0.9", "Remove confidences"),
        ("1 0.5 0.5 0.2 x", "expected the class and numbers"),
        ("1 0.5 nan 0.2 0.2", "expected the class and numbers"),
        ("2 0.5 0.5 0.2 0.2", "the class is 2; expected 0 to 1"),
        ("-1 0.5 0.5 0.2 0.2", "the class is -1"),
        ("0.5 0.5 0.5 0.2 0.2", "the class is 0.5"),
        ("1 20 10 10 8", "it has the value 20; expected shares .* Divide pixels"),
        ("1 0.5 0.5 -0.2 0.2", "it has the value -0.2"),
    ],
)
def test_what_is_wrong_in_labels_of_yolo_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, "no splits")
    write(tmp_path / "labels" / "0.txt", line)
    with pytest.raises(DataError, match=message):
        found(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nc": 3}, r"data\.yaml: nc is 3, but there are 2 names"),
        ({"names": {1: "cat", 2: "dog"}}, "names has the numbers 1, 2; expected 0 to 1"),
        ({"names": {"a": "cat"}}, "expected a list, or numbers with a name each"),
        ({"names": ["cat", ["dog"]]}, "expected a list of names"),
        ({"names": ["cat", "cat"]}, "has 'cat' twice"),
        ({"train": "images/nowhere"}, "train is 'images/nowhere', which is neither below"),
        ({"train": "x" * 400}, "which is neither below"),
        ({"train": {"a": 1}}, "expected a folder or a text file"),
    ],
)
def test_what_is_wrong_in_a_description_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, "ultralytics")
    write(tmp_path / "data.yaml", yaml.safe_dump({**YOLO_LAYOUTS["ultralytics"][0], **change}))
    with pytest.raises(DataError, match=message):
        found(tmp_path)


def test_aliases_of_yaml_are_refused(tmp_path: Path) -> None:
    write_yolo(tmp_path, "ultralytics")
    write(tmp_path / "data.yaml", "train: images\nnames: &a [x]\nval: *a\n")
    with pytest.raises(DataError, match="it has aliases"):
        found(tmp_path)


# FiftyOne's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [True, False])
def test_classes_of_fiftyone_are_read(names: bool, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            picture(tmp_path / split / "data" / f"{number}.jpg")
        labels = {str(number): NAMES[number] if names else number for number in range(2)}
        write(tmp_path / split / "labels.json", {"classes": NAMES, "labels": labels})
    read = found(tmp_path)
    assert (read.kind, list(read.classes)) == ("classification", NAMES)
    assert read.splits["validation"].labels.tolist() == [0, 1]
    assert list(found(tmp_path, classes=NAMES[::-1]).classes) == NAMES[::-1]
    with pytest.raises(DataError, match=f"has the label '{NAMES[1]}', which is none of the classes that were given"):
        found(tmp_path, classes=[NAMES[0], "none"])


def test_objects_of_fiftyone_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "0.jpg")
    share = [BOX[0] / 40, BOX[1] / 20, (BOX[2] - BOX[0]) / 40, (BOX[3] - BOX[1]) / 20]
    labels = {"0": [{"label": 1, "bounding_box": share}]}
    write(tmp_path / "labels.json", {"classes": NAMES, "labels": labels})
    check(tmp_path, {"train": 1})


# EXIF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_turned_as_its_picture_is(orientation: int, tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[2:10, 4:14] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    shown = np.asarray(open_image(tmp_path / "0.png"))[..., 0] > 127
    rows, columns = np.nonzero(shown)
    header = Orientation(shown.shape[::-1], orientation)
    assert header.turn_box(BOX) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(("size", "turned"), [((40, 20), True), ((20, 40), False)])
def test_the_recorded_size_says_if_boxes_are_of_stored_pixels(
    size: tuple[int, int], turned: bool, tmp_path: Path
) -> None:
    picture(tmp_path / "0.jpg", orientation=6)
    content = coco(["0.jpg"])
    content["images"][0].update(width=size[0], height=size[1])
    write(tmp_path / "train.json", content)
    read = found(tmp_path)
    expected = (20 - BOX[3], BOX[0], 20 - BOX[1], BOX[2]) if turned else BOX
    assert np.allclose(boxes(read).corners, [expected] * 2)
    assert any("boxes with them" in note for note in read.notes) == turned


def test_turned_squares_follow_the_others_and_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg", orientation=6)
    picture(tmp_path / "1.jpg", (20, 20), orientation=3)
    content = coco(["0.jpg", "1.jpg"])
    content["images"][1]["width"] = 20
    write(tmp_path / "train.json", content)
    read = found(tmp_path)
    assert np.allclose(boxes(read, number=1).corners, [(20 - BOX[2], 20 - BOX[3], 20 - BOX[0], 20 - BOX[1])])
    assert any("nothing says if their boxes are; read as boxes of the picture as it is stored" in n for n in read.notes)


# anything ---------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(),
    st.sampled_from(["0.jpg", "", "x", "../..", "1e999", "cat"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def mutate(document: Any, data: st.DataObject) -> Any:
    """The document with the value of one place replaced, removed, or given twice."""
    if isinstance(document, dict | list) and document and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(document) if isinstance(document, dict) else range(len(document))))
        changed = document.copy()
        action = data.draw(st.integers(0, 5))
        if action == 0:
            del changed[key]
        elif action == 1 and isinstance(changed, list):
            changed.append(changed[key])
        else:
            changed[key] = mutate(document[key], data)
        return changed
    return data.draw(values)


def read_or_refuse(root: Path, file: str) -> None:
    """A source is read with boxes inside of their pictures, or refused with a name."""
    try:
        read = found(root)
    except DataError as error:
        assert file in str(error) or str(root) in str(error)  # noqa: PT017
    else:
        for split in read.splits.values():
            for target in split.targets or ():
                assert isinstance(target, Boxes)
                assert (target.corners[:, 2:] > target.corners[:, :2]).all()
                assert (target.corners >= 0).all()
                assert (target.corners <= [*SIZE, *SIZE]).all()


DOCUMENTS: dict[str, tuple[str, Any, Callable[[Any], str]]] = {
    "coco": ("train.json", coco(["0.jpg"]), json.dumps),
    "yolo": (
        "data.yaml",
        {"path": ".", "train": "images", "nc": 2, "names": NAMES},
        lambda value: yaml.safe_dump(value),
    ),
    "fiftyone": (
        "labels.json",
        {"classes": NAMES, "labels": {"0": [{"label": 1, "bounding_box": [0.1] * 4}]}},
        json.dumps,
    ),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@given(data=st.data())
@settings(max_examples=50)
def test_any_document_is_read_or_refused_by_name(kind: str, data: st.DataObject) -> None:
    name, document, encode = DOCUMENTS[kind]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / ("data" if kind == "fiftyone" else "images") / "0.jpg")
        if kind == "yolo":
            write(root / "labels" / "0.txt", row(1))
        write(root / name, encode(mutate(document, data)))
        read_or_refuse(root, name)


@given(
    st.lists(
        st.one_of(st.sampled_from([row(0), row(1), "\n", "0 0.1 0.1 0.9 0.1 0.5 0.5\n"]), st.text(max_size=20)),
        max_size=4,
    )
)
@settings(max_examples=50)
def test_any_labels_of_yolo_are_read_or_refused_by_name(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / "images" / "0.jpg")
        write(root / "classes.txt", "cat\ndog\n")
        (root / "labels").mkdir()
        (root / "labels" / "0.txt").write_text("".join(lines), encoding="utf-8")
        read_or_refuse(root, "0.txt")


@given(data=st.data())
@settings(max_examples=50)
def test_any_xml_is_read_or_refused_by_name(data: st.DataObject) -> None:
    text = xml()
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin, min(begin + 20, len(text))))
    text = text[:begin] + data.draw(st.text(max_size=5)) + text[end:]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / "0.jpg")
        (root / "0.xml").write_text(text, encoding="utf-8")
        read_or_refuse(root, "0.xml")


@given(
    corners=st.lists(
        st.one_of(st.integers(-3, 60), st.sampled_from(["", "x", "nan", "inf", "1e400"])), min_size=4, max_size=4
    ),
    name=st.sampled_from(["cat", "", " "]),
    difficult=st.sampled_from(["0", "1", "", "yes"]),
)
@settings(max_examples=50)
def test_any_object_of_voc_is_read_or_refused_by_name(corners: list[Any], name: str, difficult: str) -> None:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, corners, strict=True))
    text = f"<a><object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object></a>"
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "one.xml", text)
        try:
            (one,) = read_annotation(file, Path("one.jpg")).objects
        except DataError as error:
            assert "one.xml" in str(error)  # noqa: PT017
        else:
            left, top, right, bottom = map(float, corners)
            assert one == ("cat", (max(left - 1, 0), max(top - 1, 0), right, bottom), difficult == "1")

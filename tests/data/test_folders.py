"""Class folders as users have them: names of splits, hidden files, other suffixes, wrapping folders, classes by split."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modelpatch.backbone.preprocessing import find_images
from modelpatch.data.sources.split_names import plain_split_of, split_of
from modelpatch.data.task import load_task
from modelpatch.errors import DataError, DataWarning
from pictures import counts, draw, write_classes


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("trn", "tst"),
        ("train_set", "test_set"),
        ("my-train", "my-test"),
        ("images_train", "images_test"),
        ("train2017", "test2017"),
        ("TrainImages", "TestImages"),
        ("trainset", "holdout"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("data/train", "data/test"),
        ("archive/set/Training Set", "archive/set/Test Set"),
        ("trainval", "test"),
        ("Train_Val", "Test"),
        ("trainval2012", "test2012"),
    ],
)
def test_folders_of_splits_are_found_under_any_usual_name(tmp_path: Path, train: str, test: str) -> None:
    write_classes(tmp_path / train)
    write_classes(tmp_path / test, count=2)
    task = load_task(tmp_path)
    assert task.classes == ("cat", "dog")
    assert counts(task) == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 2, "dog": 2}}


@pytest.mark.parametrize("name", ["dev", "Valid", "validation_set", "VAL", "eval", "development"])
def test_a_validation_split_is_found_under_any_usual_name(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path / "train", count=5)
    write_classes(tmp_path / name, count=1)
    assert counts(load_task(tmp_path))["validation"] == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("folders", "read"),
    [
        (("train", "trainval", "test"), {"train": "train", "test": "test"}),
        (("train", "val", "trainval", "test"), {"train": "train", "validation": "val", "test": "test"}),
        (("trainval", "val", "test"), {"train": "trainval", "test": "test"}),
    ],
)
def test_no_picture_is_in_two_splits_where_one_holds_another(
    tmp_path: Path, folders: tuple[str, ...], read: dict[str, str]
) -> None:
    for name in folders:
        write_classes(tmp_path / name)
    task = load_task(tmp_path, hold_out=False)
    assert {split: Path(str(own.images[0])).parts[-3] for split, own in task.splits.items() if own is not None} == read


@pytest.mark.parametrize("outer", [("Trainingsdaten", "Testdaten"), ("art", "photo", "sketch"), ("batch1", "batch2")])
def test_folders_of_the_same_folders_are_asked_for(tmp_path: Path, outer: tuple[str, ...]) -> None:
    """They may be splits under names of their own, or domains, and the folders in them the classes."""
    for name in outer:
        write_classes(tmp_path / name)
    with pytest.raises(DataError, match=r"holds the folders cat, dog. If these are the classes.*--classes"):
        load_task(tmp_path)
    assert load_task(tmp_path, classes=outer).classes == outer
    draw(tmp_path / outer[0] / "front" / "1.png")
    assert load_task(tmp_path).classes == tuple(sorted(outer, key=str.lower))


def test_splits_may_be_in_each_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw(tmp_path / name / "Train" / "1.png", tmp_path / name / "Test" / "2.png")
    assert counts(load_task(tmp_path)) == {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}}


@pytest.mark.parametrize(
    ("folders", "classes"),
    [(("bus", "car", "train"), ("bus", "car", "train")), (("Training", "Testing"), ("Training", "Testing"))],
)
def test_a_class_called_as_a_split_is_asked_for(
    tmp_path: Path, folders: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    write_classes(tmp_path, folders)
    with pytest.raises(DataError, match=r"is the name of a split.*--classes"):
        load_task(tmp_path)
    assert load_task(tmp_path, classes=classes).classes == classes


def test_names_that_only_sound_like_splits_are_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, ("test_tube", "beaker", "train_station"))
    assert load_task(tmp_path).classes == ("beaker", "test_tube", "train_station")


def test_classes_choose_and_order_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ("cat", "dog", "bus"), 5)
    task = load_task(tmp_path, classes=["dog", "cat"])
    assert task.classes == ("dog", "cat")
    assert task.passed_over == {"folder that --classes leaves out": ("train/bus/ (5 pictures)",)}
    with pytest.raises(DataError, match="no folder of the class 'cow'; it has: bus, cat, dog"):
        load_task(tmp_path, classes=["dog", "cow"])


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test")
    draw(tmp_path / "train" / "cat" / "._1.jpg", tmp_path / "train" / ".ipynb_checkpoints" / "1.png")
    draw(
        tmp_path / "__MACOSX" / "train" / "cat" / "1.png",
        tmp_path / "train" / "loose.png",
        tmp_path / "extra" / "5.png",
    )
    for name in ("Thumbs.db", "cat/.DS_Store", "cat/notes.TXT", "cat/README"):
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    task = load_task(tmp_path)
    assert (task.classes, len(task.train), len(task.test)) == (("cat", "dog"), 6, 6)
    assert task.passed_over == {
        "folder beside the splits": ("extra/ (1 picture)",),
        "hidden": (
            "__MACOSX",
            "train/.ipynb_checkpoints",
            "train/Thumbs.db",
            "train/cat/.DS_Store",
            "train/cat/._1.jpg",
        ),
        "picture outside of class folders": ("train/loose.png",),
        "no picture (no suffix)": ("train/cat/README",),
        "no picture (.txt)": ("train/cat/notes.TXT",),
        "link to nothing or in a circle, or no plain file": ("train/cat/gone.png",),
    }


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", ".webp", ".TIF", ".ppm", ".bmp", ".pbm", ".tga", ".jp2"])
def test_pictures_of_every_suffix_are_read(tmp_path: Path, suffix: str) -> None:
    write_classes(tmp_path, count=2)
    for name in ("cat", "dog"):
        (tmp_path / name / "1.png").rename(tmp_path / name / f"1{suffix}")
    task = load_task(tmp_path)
    assert len(task.train) + len(task.test) == 4
    assert task.passed_over == {}


def test_an_empty_class_and_folders_in_classes_are_noted(tmp_path: Path) -> None:
    write_classes(tmp_path, count=2)
    (tmp_path / "bird").mkdir()
    draw(tmp_path / "cat" / "small" / "9.png")
    task = load_task(tmp_path)
    assert task.classes == ("cat", "dog")
    assert task.notes[0] == "1 folder holds no picture: bird/"
    assert task.notes[1].startswith("1 class folder holds folders")
    assert len(task.train) + len(task.test) == 5


def test_names_of_classes_are_one_where_case_or_blanks_alone_differ(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ("Cat", "dog "), 4)
    write_classes(tmp_path / "test", ("cat", "dog"), 2)
    task = load_task(tmp_path)
    assert counts(task) == {"train": {"Cat": 4, "dog": 4}, "test": {"Cat": 2, "dog": 2}}
    assert any("'Cat', 'cat' are read as one class, 'Cat'" in note for note in task.notes)
    letters = write_classes(tmp_path / "letters", ("a", "A"), 2)
    assert load_task(letters).classes == ("A", "a")


def test_a_split_without_training_images_or_given_twice_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "Test")
    with pytest.raises(DataError, match="has the splits test but no training images"):
        load_task(tmp_path)
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "testing")
    with pytest.raises(DataError, match="are both the test split"):
        load_task(tmp_path)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "bus").symlink_to(write_classes(tmp_path.parent / f"{tmp_path.name}-else", ["bus"]) / "bus")
    assert load_task(tmp_path).classes == ("bus", "cat", "dog")
    assert len(find_images(tmp_path)) == 9


@given(st.text(max_size=12))
def test_a_plain_name_of_a_split_tells_of_that_split(name: str) -> None:
    assert plain_split_of(name) in (None, split_of(name))
    assert split_of(name) == split_of(f"{name} 12") == split_of(f"12_{name}")


def test_a_table_of_labels_beside_class_folders_is_told(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "labels.csv").write_text("image,label\ncat/0.png,dog\n", encoding="utf-8")
    (tmp_path / "sizes.csv").write_text("width,height\n1,2\n", encoding="utf-8")
    note = "1 table of images and labels beside the class folders is not read; give that file to read it: labels.csv"
    assert note in load_task(tmp_path).notes


@pytest.mark.parametrize("end", ["_mask", " mask", "-seg", "_mask_1"])
def test_masks_beside_the_pictures_of_a_class_are_no_pictures_of_it(end: str, tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        for number in range(4):
            draw(tmp_path / name / f"{name} ({number}).png")
            Image.new("L", (8, 8), 255).save(tmp_path / name / f"{name} ({number}){end}.png")
    with pytest.warns(DataWarning, match="mask of the picture beside it"):
        task = load_task(tmp_path, hold_out=False)
    assert len(task.train) == 8
    assert len(task.passed_over["mask of the picture beside it"]) == 8


def test_classes_of_masks_are_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, ("no_mask", "with_mask"))
    draw(tmp_path / "with_mask" / "face_mask.png")
    assert len(load_task(tmp_path, hold_out=False).train) == 7


@pytest.mark.parametrize("suffix", ["", ".pjpeg", ".jpg_large", ".png~"])
def test_pictures_under_other_suffixes_are_warned_of(suffix: str, tmp_path: Path) -> None:
    write_classes(tmp_path)
    draw(tmp_path / "whole.png")
    (tmp_path / "cat" / f"more{suffix}").write_bytes((tmp_path / "whole.png").read_bytes())
    (tmp_path / "whole.png").rename(tmp_path / "cat" / "whole.png")
    with pytest.warns(DataWarning, match=r"picture under a suffix of none"):
        load_task(tmp_path)

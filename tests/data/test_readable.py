"""Unreadable images: the fit's error by default, left out and counted where it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.task import load_task
from modelpatch.errors import DataError
from pictures import counts, write_classes


def test_unreadable_images_are_left_out_where_it_is_asked_for(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", count=4)
    write_classes(tmp_path / "test", count=2)
    whole = (tmp_path / "train" / "cat" / "1.png").read_bytes()
    broken = [tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "dog" / "0.png"]
    broken[0].write_bytes(whole[:45])
    broken[1].write_bytes(b"")
    assert len(load_task(tmp_path).train) == 8
    task = load_task(tmp_path, skip_unreadable=True)
    assert counts(task) == {"train": {"cat": 3, "dog": 4}, "test": {"cat": 2, "dog": 1}}
    assert task.passed_over == {"image that cannot be read": ("train/cat/1.png", "test/dog/0.png")}
    assert task.facts["skip_unreadable"] is True
    rows = [f"train/{name}/{number}.png,{name}" for name in ("cat", "dog") for number in range(4)]
    (tmp_path / "all.csv").write_text("\n".join(["image,label", *rows]), encoding="utf-8")
    task = load_task(tmp_path / "all.csv", skip_unreadable=True)
    assert task.passed_over == {"image that cannot be read": ("train/cat/1.png",)}


def test_a_task_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / name / "1.jpg" for name in ("cat", "dog")):
        file.parent.mkdir()
        file.write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 2 images of the split train can be read, first .*cat/1\.jpg"):
        load_task(tmp_path, skip_unreadable=True)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "a web page", "zeros", "other bytes inside", "another suffix"]
)
def test_an_image_that_is_damaged_in_any_way_is_named_or_left_out(damage: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train", count=3)
    write_classes(tmp_path / "test", count=1)
    file = tmp_path / "train" / "cat" / "1.png"
    whole = file.read_bytes()
    damages = {
        "truncated": whole[:45],
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "zeros": b"\0" * 200,
    }
    damages |= {"other bytes inside": whole[:41] + bytes(len(whole) - 41), "another suffix": b"\x93NUMPY" + whole[6:]}
    file.write_bytes(damages[damage])
    with pytest.raises(DataError, match=r"1\.png cannot be read as an image"):
        open_image(load_task(tmp_path).train.images[1])
    task = load_task(tmp_path, skip_unreadable=True)
    assert task.passed_over == {"image that cannot be read": ("train/cat/1.png",)}

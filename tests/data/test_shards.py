"""Tar shards: samples read in place, labels in members, splits, and what is no shard."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.task import load_task
from modelpatch.errors import DataError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def samples(first: int, count: int, label: str = "cls") -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        value = str(number % 2)
        members[f"{number:04}.png"] = png(number)
        members[f"{number:04}.{label}"] = (
            json.dumps({"label": number % 2}).encode() if label == "json" else value.encode()
        )
    return members


@pytest.mark.parametrize("label", ["cls", "json", "txt"])
def test_samples_are_read_in_place(tmp_path: Path, label: str) -> None:
    write_shard(tmp_path / "train-0000.tar", samples(0, 6, label))
    write_shard(tmp_path / "train-0001.tar", samples(6, 4, label))
    write_shard(tmp_path / "test-0000.tar", samples(10, 2, label))
    (tmp_path / "classes.txt").write_text("cat\ndog")
    for source in (tmp_path, str(tmp_path / "train-{0000..0001}.tar")):
        task = load_task(source)
        assert task.classes == ("cat", "dog")
        for split in task.splits.values():
            values = [open_image(image).getpixel((0, 0))[0] for image in split.images]
            assert [value % 2 for value in values] == split.labels.tolist()
    assert (len(load_task(tmp_path).train), len(load_task(tmp_path).test)) == (10, 2)


def test_folders_of_splits_hold_shards_and_what_is_left_is_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "0.tar", {**samples(0, 6), "9.cls": b"1", "8.png": png(8), "._0.png": b"x"})
    write_shard(tmp_path / "val" / "0.tar", samples(0, 2))
    task = load_task(tmp_path)
    assert task.validation is not None
    assert task.passed_over == {
        "hidden": ("0.tar: ._0.png",),
        "sample without a picture": ("0.tar: 9",),
        "sample without a label": ("0.tar: 8",),
    }


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar file"):
        load_task(tmp_path / "a.tar")
    with pytest.raises(DataError, match="holds no pictures with labels"):
        load_task(write_shard(tmp_path / "b.tar", {"1.png": png(1)}))
    (tmp_path / "c.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is compressed"):
        load_task(tmp_path / "c.tar.gz")


def test_classes_name_numbers_or_choose_the_order_of_words(tmp_path: Path) -> None:
    write_shard(tmp_path / "n" / "train-0.tar", samples(0, 8))
    task = load_task(tmp_path / "n", classes=["dog", "cat"])
    assert task.classes == ("dog", "cat")
    words = {
        name: content if name.endswith("png") else b"ab"[int(content) :][:1] for name, content in samples(0, 8).items()
    }
    write_shard(tmp_path / "w" / "train-0.tar", words)
    assert load_task(tmp_path / "w", classes=["b", "a"]).classes == ("b", "a")
    with pytest.raises(DataError, match="has the label 'b', which is none of the classes that were given"):
        load_task(tmp_path / "w", classes=["a", "c"])

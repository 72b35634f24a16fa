"""Tables of `datasets` as they are published: labels without names, other columns and splits, saved folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Library
from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.sources.base import SourceOptions
from modelpatch.data.sources.datasets import read_tables
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError, TrainingWarning

datasets = Library("datasets")


def table(labels: list[Any], label: str = "label", image: str = "image", feature: Any = None, **others: Any) -> Any:
    """A table of pictures whose red value is their row."""
    pictures = [Image.fromarray(np.full((4, 4, 3), row, np.uint8)) for row in range(len(labels))]
    made = datasets.Dataset.from_dict({image: pictures, label: labels, **others})
    made = made.cast_column(image, datasets.Image())
    return made if feature is None else made.cast_column(label, feature)


def read(loaded: Mapping[str, Any], **options: Any) -> Any:
    return read_tables(loaded, SourceOptions(**options), "hf:set")


def test_numbers_without_names_are_classes_and_unlabelled_rows_are_counted() -> None:
    found = read({"train": table([0, 1, 2, 1]), "test": table([-1, 2, -1, 0])})
    assert found.classes == ["0", "1", "2"]
    assert found.splits["train"].labels.tolist() == [0, 1, 2, 1]
    assert found.splits["test"].labels.tolist() == [2, 0]
    assert found.passed_over == {"row without a label": ("test, row 0", "test, row 2")}
    assert open_image(found.splits["test"].images[1]).getpixel((0, 0)) == (3, 3, 3)


def test_a_split_without_any_label_is_left_out() -> None:
    found = read({"train": table(["a", "b"]), "test": table([None, None])})
    assert (found.classes, list(found.splits)) == (["a", "b"], ["train"])
    assert "the split test has no label in any row, and is left out" in found.notes


def test_names_of_a_class_label_stay_in_their_order() -> None:
    feature = datasets.ClassLabel(names=["z", "a"])
    found = read({"train": table([0, 1, -1], "fine_label", "img", feature)})
    assert (found.classes, found.splits["train"].labels.tolist()) == (["z", "a"], [0, 1])


def test_two_columns_of_labels_are_a_question() -> None:
    loaded = {"train": table([0, 1], "fine_label", coarse_label=[1, 0])}
    with pytest.raises(
        DataError, match=r"several columns of labels: fine_label, coarse_label.*--label-column fine_label"
    ):
        read(loaded)
    assert read(loaded, label_column="coarse_label").splits["train"].labels.tolist() == [1, 0]


def test_splits_of_other_names_are_found_and_unknown_ones_counted() -> None:
    found = read({"Training": table([0, 1]), "dev": table([1, 0]), "unsupervised": table([0, 0])})
    assert list(found.splits) == ["train", "validation"]
    assert found.passed_over == {"split that is not read": ("unsupervised",)}
    with pytest.raises(DataError, match="has no training split, only dev"):
        read({"dev": table([1, 0])})


@pytest.mark.parametrize("several", [False, True])
def test_a_saved_folder_is_read(tmp_path: Path, several: bool) -> None:
    own = table([0, 1] * 5)
    (datasets.DatasetDict(train=own, test=own) if several else own).save_to_disk(str(tmp_path / "set"))
    for source in (tmp_path / "set", f"hf:{tmp_path / 'set'}"):
        task = load_task(source)
        assert (task.classes, len(task.train)) == (("0", "1"), 10 if several else 8)
    (next((tmp_path / "set").rglob("*.arrow"))).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be loaded as a saved data set"):
        load_task(tmp_path / "set")


def test_a_number_of_no_class_in_a_list_is_refused() -> None:
    labels = [[0], [1, 2], [-1], [0, 1]]
    feature = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
    with pytest.raises(DataError, match="hf:set: the label -1 is none of 0 to 2"):
        read({"train": table(labels, feature=feature)})


def test_a_number_of_no_class_of_a_box_is_refused() -> None:
    objects = [{"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": [category]} for category in (0, 1, -1)]
    category = datasets.Sequence(datasets.ClassLabel(names=["a", "b"]))
    feature = {"bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))), "category": category}
    with pytest.raises(DataError, match="hf:set: the label -1 is none of 0 to 1"):
        read({"train": table(objects, "objects", feature=feature)})


def test_a_table_in_memory_is_read_without_its_unlabelled_rows() -> None:
    with pytest.warns(TrainingWarning, match="4 samples have the label -1"):
        task = Task.from_datasets(table([0, 1, -1, 0, 1, -1]), table([1, -1, 0]), validation=table([-1]))
    assert task.passed_over == {
        "row without a label": ("train, row 2", "train, row 5", "test, row 1", "validation, row 0")
    }
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([0, 1, 0, 1], [1, 0])
    assert task.validation is None
    assert task.notes == ("the split validation has no label in any row, and is left out",)


def test_named_columns_decide_or_are_refused() -> None:
    pictures = [Image.new("RGB", (4, 4))] * 4
    two = table([0, 1, 0, 1], "kind", other=pictures)
    found = read({"train": two}, image_column="image", label_column="kind")
    assert (found.kind, found.classes) == ("classification", ["0", "1"])
    several = table(
        [0, 1, 0, 1], "kind", feature=datasets.ClassLabel(names=["x", "y"]), names=[["a"], ["b"], ["a", "b"], ["b"]]
    )
    found = read({"train": several}, label_column="names")
    assert (found.kind, list(found.classes)) == ("multilabel", ["a", "b"])
    with pytest.raises(DataError, match="has splits of its own, which split_column cannot name"):
        read({"train": two}, split_column="kind")
    assert load_task(table([0, 1] * 6, "kind"), label_column="kind").classes == ("0", "1")
    for option in ("image_column", "label_column", "split_column", "separator"):
        with pytest.raises(DataError, match=f"Pictures is no table, for which {option}='x' is"):
            load_task({"train": Pictures()}, **{option: "x"})


class Pictures(torch.utils.data.Dataset[Any]):
    """Four black pictures of two classes."""

    targets = (0, 1, 0, 1)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        return Image.new("RGB", (4, 4)), self.targets[row]

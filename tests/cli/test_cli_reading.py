"""The options for reading data, which every verb that reads some takes, and the data that they read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from modelpatch.backbone.backbone import Backbone
from modelpatch.cli.main import VERBS, load_verb
from modelpatch.cli.reading import Source, gather_images
from modelpatch.data.task import load_task
from modelpatch.errors import DataError, ModelpatchError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.contents import Patch
from modelpatch.train.fitting import fit
from pictures import counts, draw, write_classes

OPTIONS = {one.name for one in fields(Source)}
NETWORK = {"backbone", "argument"}


def parameters(name: str) -> dict[str, Any]:
    return {one.name: one for one in load_verb(name).params}


@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("store", "backbone")])
def test_every_verb_that_reads_data_takes_the_options_for_it(name: str) -> None:
    taken = parameters(name)
    assert set(taken) >= OPTIONS if "data" in taken else name == "predict" or not OPTIONS & set(taken)
    if NETWORK & set(taken):
        assert set(taken) >= NETWORK
        assert "weights" in taken


def table(folder: Path, header: str = "file,breed,size,part", name: str = "pets.csv") -> Path:
    """Six pictures and a table with two columns that could be labels, and one of splits under an odd name."""
    draw(*(folder / f"{number}.png" for number in range(8)))
    rows = [
        f"{number}.png,{'cat' if number % 2 else 'dog'},{number % 3},{'test' if number > 5 else 'train'}"
        for number in range(8)
    ]
    (folder / name).write_text("\n".join([header, *rows]))
    return folder / name


def test_options_are_passed_on_as_given(tmp_path: Path) -> None:
    file = table(tmp_path, "file,breed,kind,part")
    reading = Source(label_column="breed", split_column="part", classes="dog,cat")
    task = reading.load(str(file), 0)
    assert task.classes == ("dog", "cat")
    assert counts(task) == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 1, "dog": 1}}
    assert Source(ignore=0).given == {"ignore": 0}
    assert Source().given == {}


def test_options_without_data_are_refused() -> None:
    Source(classes="a,b").check_data(None, "classes")
    Source(kind="multilabel").check_data("folder")
    with pytest.raises(ModelpatchError, match=r"--skip-unreadable is for reading data\. Give --data as well"):
        Source(skip_unreadable=True).check_data(None)


@pytest.fixture
def patch(tmp_path: Path, tiny: Backbone) -> Patch:
    """A patch of a table whose labels are in a column that was named."""
    task = load_task(table(tmp_path / "fitted", "file,breed,kind,part"), label_column="breed", split_column="part")
    return fit(tiny, task, LinearProbe(), epochs=1, progress=False)


def test_a_patchs_data_is_read_as_for_its_fit_and_options_come_first(tmp_path: Path, patch: Patch) -> None:
    other = table(tmp_path / "other", "file,breed,kind,part")
    assert counts(Source().load_own(patch, [str(other)]))["test"] == {"cat": 1, "dog": 1}
    renamed = table(tmp_path / "renamed", "file,species,kind,part")
    with pytest.raises(DataError, match="'breed'"):
        Source().load_own(patch, [str(renamed)])
    assert counts(Source(label_column="species").load_own(patch, [str(renamed)]))["test"] == {"cat": 1, "dog": 1}


def test_a_patch_of_a_table_is_measured_on_class_folders_too(tmp_path: Path, patch: Patch) -> None:
    folders = write_classes(tmp_path / "folders" / "train").parent
    write_classes(folders / "test", count=2)
    assert counts(Source().load_own(patch, [str(folders)]))["test"] == {"cat": 2, "dog": 2}


def test_images_are_gathered_from_files_folders_and_tables(tmp_path: Path) -> None:
    file = table(tmp_path / "a")
    draw(tmp_path / "b" / "x.png", tmp_path / "y.png")
    found = gather_images([tmp_path / "y.png", tmp_path / "b", file])
    assert [one.name for one in found] == ["y.png", "x.png", *(f"{number}.png" for number in range(8))]
    (tmp_path / "a" / "ids.csv").write_text("id,where\n7,1.png\n6,0.png\n")
    with pytest.raises(DataError, match="--image-column 'id'"):
        gather_images([tmp_path / "a" / "ids.csv"])
    assert [one.name for one in gather_images([tmp_path / "a" / "ids.csv"], "id")] == ["7.png", "6.png"]
    assert [one.name for one in gather_images([tmp_path / "a" / "ids.csv"], "where")] == ["1.png", "0.png"]
    (tmp_path / "a" / "list.txt").write_text("0.png\n1.png\n")
    assert [one.name for one in gather_images([tmp_path / "a" / "list.txt"])] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("name", "text", "column", "problem"),
    [
        ("a.csv", "file\n0.png\nlost.png\n", None, r"a\.csv, row 2: there is no image 'lost.png'"),
        ("a.csv", "file\n0.png\n", "path", "'path'"),
        ("a.json", '[{"file": "0.png"}, {"file": null}]', None, "row 2: its file names no file"),
        ("a.xlsx", "PK", None, "is a spreadsheet"),
        ("0.png", None, "path", "--image-column path is for tables of images"),
    ],
)  # fmt: skip
def test_tables_without_images_are_refused(
    tmp_path: Path, name: str, text: str | None, column: str | None, problem: str
) -> None:
    draw(tmp_path / "0.png")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=problem):
        gather_images([tmp_path / name], column)

"""Targets in columns: several labels, numbers and classes, and questions where a table could mean two things."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelpatch.data.sources.base import SourceOptions
from modelpatch.data.sources.columns import Table, Targets, find_targets
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError, ModelpatchError, TrainingWarning

NAN = math.nan
CATS = ["cat|dog", "dog", "cat|bird", "bird", "dog|bird", "cat"]


def table(label: Sequence[Any] | None = None, **columns: Sequence[Any]) -> Table:
    cells = columns if label is None else {"label": label, **columns}
    return Table("t.csv", cells, "label" if label is not None else None, lambda number: f"t.csv, row {number + 1}")


def ask(given: Table, **options: Any) -> Targets | list[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        return find_targets(given, SourceOptions(**options))


def vectors(given: Table, **options: Any) -> Targets:
    found = ask(given, **options)
    assert isinstance(found, Targets)
    return found


# several labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["|", ";", " | ", "; "])
def test_cells_with_a_separator_are_several_labels_and_this_is_told(separator: str) -> None:
    given = table([text.replace("|", separator) for text in CATS])
    with pytest.warns(TrainingWarning, match="read as several labels"):
        found = find_targets(given, SourceOptions())
    assert isinstance(found, Targets)
    assert found.classes == ("bird", "cat", "dog")
    assert found.values[:3].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 0]]


def test_commas_separate_labels_where_every_part_recurs() -> None:
    found = vectors(table(["cat, dog", "dog", "cat, bird", "bird"]))
    assert found.classes == ("bird", "cat", "dog")


@pytest.mark.parametrize(
    "cells",
    [
        [["cat", "dog"], ["dog"], []],
        ["['cat', 'dog']", "['dog']", "[]"],
        ['["cat", "dog"]', '["dog"]', "[]"],
        [np.array(["cat", "dog"]), np.array(["dog"]), np.array([], dtype=str)],
    ],
)
def test_lists_are_several_labels(cells: list[Any]) -> None:
    found = vectors(table(cells))
    assert (found.classes, found.values.tolist()) == (("cat", "dog"), [[1, 1], [0, 1], [0, 0]])


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (["black/white", "black", "white"], "/"),
        (["a|b", "c|d", "e"], "|"),
        (["Smith, John", "Smith, Jane", "Doe"], ","),
        (["a+b", "a"], "+"),
        (["cat|dog; bird", "cat|dog", "bird; cat"], "|"),
        (["cat dog", "dog", "cat", "bird cat"], " "),
        ([f"{a}{b} primary" for a in ("clear", "haze", "dark") for b in ("", " water", " road", " water road")], " "),
        (["1 3", "3", "2 3", "1", "1 2 3"], " "),
    ],
)
def test_a_separator_that_may_belong_to_names_is_asked_for(cells: list[str], separator: str) -> None:
    with pytest.raises(DataError, match=r"--kind classification, or --kind multilabel --separator"):
        ask(table(cells))
    assert ask(table(cells), kind="classification") is None
    found = vectors(table(cells), kind="multilabel", separator=separator)
    parts = {part.strip() for cell in cells for part in cell.split(separator)}
    assert set(found.classes) == parts


@pytest.mark.parametrize(
    "cells",
    [
        ["rock, paper", "tench", "eel"],
        ["n/a", "pizza/pasta", "rice"],
        ["red car", "blue car"],
        ["golden retriever", "flat coated retriever", "pug"],
    ],
)
def test_names_whose_parts_do_not_recur_are_classes(cells: list[str]) -> None:
    assert ask(table(cells)) is None


def test_a_separator_alone_asks_for_several_labels() -> None:
    assert vectors(table(["red car", "blue"]), separator=" ").classes == ("blue", "car", "red")
    with pytest.raises(DataError, match="no label holds the separator"):
        ask(table(["red", "blue"]), separator="|")
    with pytest.raises(DataError, match="is for --kind multilabel"):
        ask(table(["1|2", "3"]), separator="|", kind="regression")


def test_an_empty_cell_is_unknown_and_this_is_told() -> None:
    given = table(["cat|dog", "", "dog", None, "[]"])
    with pytest.warns(TrainingWarning, match=r"t\.csv, row 2: it has no label\. In 2 rows"):
        found = find_targets(given, SourceOptions("multilabel"))
    assert isinstance(found, Targets)
    np.testing.assert_array_equal(found.values, [[1, 1], [NAN, NAN], [0, 1], [NAN, NAN], [0, 0]])


def test_classes_may_name_labels_that_no_row_has_but_not_lack_one() -> None:
    assert vectors(table(CATS), kind="multilabel", classes=["dog", "cat", "bird", "fox"]).values[0].tolist() == [
        1,
        1,
        0,
        0,
    ]
    with pytest.raises(DataError, match="'bird', which is none of the classes"):
        ask(table(CATS), kind="multilabel", classes=["dog", "cat"])


@pytest.mark.parametrize(
    ("present", "absent", "unknown"),
    [
        ("1", "0", "-1"),
        ("1.0", "0.0", ""),
        ("True", "False", "?"),
        ("yes", "no", None),
        (1, 0, -1),
        (1.0, 0.0, NAN),
        (True, False, None),
    ],
)
def test_one_column_a_label(present: Any, absent: Any, unknown: Any) -> None:
    found = vectors(
        table(
            cat=[present, present, absent],
            dog=[absent, present, unknown],
            width=["64", "64", "32"],
            height=["9", "8", "1"],
        )
    )
    assert found.classes == ("cat", "dog")
    np.testing.assert_array_equal(found.values, [[1, 0], [1, 1], [0, NAN]])


def test_one_hot_columns_are_classes_or_labels_as_is_said() -> None:
    given = table(cat=["1", "0"], dog=["0", "1"])
    with pytest.raises(
        DataError, match=r"exactly one of the columns cat, dog .*--kind classification.*--kind multilabel"
    ):
        ask(given)
    assert ask(given, kind="classification") == ["cat", "dog"]
    assert vectors(given, kind="multilabel").values.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(DataError, match="row 1: 2 of the columns"):
        ask(table(cat=["1", "0"], dog=["1", "1"]), kind="classification")


def test_columns_of_labels_are_named_where_there_is_a_column_of_names_too() -> None:
    given = table(["a", "b", "a"], wet=["1", "0", "1"], dry=["1", "1", "0"])
    assert ask(given) is None
    with pytest.raises(DataError, match="Name columns of 1 and 0 with --classes"):
        ask(given, kind="multilabel")
    assert vectors(given, kind="multilabel", classes=["wet"]).classes == ("wet",)
    with pytest.raises(DataError, match=r"t\.csv, row 1: wet is '2'"):
        ask(table(wet=["2", "1"], dry=["0", "1"]), kind="multilabel", classes=["wet"])


def test_columns_that_are_no_labels_are_told() -> None:
    with pytest.warns(TrainingWarning, match="the columns age hold more"):
        found = find_targets(table(a=["1", "0"], b=["1", "1"], age=["7", "8"]), SourceOptions("multilabel"))
    assert isinstance(found, Targets)
    assert found.classes == ("a", "b")


# numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells",
    [
        [f"{number / 7:.3f}" for number in range(64)],
        ["0.5", "1.5", "0.5", "1.5"],
        ["1.0", "2.0", "1.0"],
        [1.0, 2.0, 3.0],
        [str(number) for number in range(0, 90, 3)],
        [str(number) for number in range(40)],
        ["1e-3", "2"],
    ],
)
def test_numbers_are_classes_or_numbers_as_is_said(cells: list[Any]) -> None:
    with pytest.raises(DataError, match=r"--kind regression\) or names of classes \(--kind classification"):
        ask(table(cells))
    assert ask(table(cells), kind="classification") is None
    assert vectors(table(cells), kind="regression").values[:, 0].tolist() == list(map(float, cells))


def test_few_whole_numbers_are_classes_and_many_are_told() -> None:
    assert ask(table(["0", "1", "2", "1"])) is None
    with pytest.warns(TrainingWarning, match="100 different numbers in 300 rows, which are read as classes"):
        assert find_targets(table([str(number % 100) for number in range(300)]), SourceOptions()) is None


def test_several_numbers_are_columns() -> None:
    given = table(age=["31.5", "", "40"], height=["1.82", "nan", "1.7"], name=["a", "b", "c"])
    with pytest.raises(
        DataError, match=r"age, height may be numbers to predict\. Say so: --kind regression --classes age"
    ):
        ask(given)
    found = vectors(given, kind="regression")
    assert found.classes == ("age", "height")
    np.testing.assert_array_equal(found.values, [[31.5, 1.82], [NAN, NAN], [40, 1.7]])
    assert vectors(given, kind="regression", classes=["height"]).classes == ("height",)
    for classes, message in (
        (["weight"], "no column 'weight'; it has: age, height, name"),
        (["name"], "row 1: name is 'a'"),
    ):
        with pytest.raises(DataError, match=message):
            ask(given, kind="regression", classes=classes)


@pytest.mark.parametrize("cell", ["inf", "1_000", "3,5", "x", "1 000"])
def test_a_cell_that_is_no_finite_number_is_named(cell: str) -> None:
    with pytest.raises(DataError, match=r"t\.csv, row 2: label is .*expected a finite number"):
        ask(table(["1", cell]), kind="regression")


# any table ---------------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from(
        ["", "1", "0", "-1", "cat", "cat|dog", "a;b", "a, b", "1.5", "[]", "['a']", "[", "nan", "x/y", "inf", "yes"]
    ),
    st.text(max_size=6),
    st.none(),
    st.floats(),
    st.integers(-2, 3),
    st.booleans(),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
)


@given(st.data(), st.integers(1, 6), st.sampled_from([None, "classification", "multilabel", "regression"]))
@settings(max_examples=150, deadline=None)
def test_every_table_is_read_or_refused_in_words(data: st.DataObject, rows: int, kind: str | None) -> None:
    names = data.draw(
        st.lists(st.sampled_from(["label", "cat", "dog", "age", ""]), min_size=1, max_size=4, unique=True)
    )
    cells = {name: data.draw(st.lists(CELLS, min_size=rows, max_size=rows)) for name in names}
    separator = data.draw(st.sampled_from([None, "|", "/"])) if kind in (None, "multilabel") else None
    given = Table("t", cells, "label" if "label" in cells else None, lambda number: f"t, row {number}")
    try:
        found = ask(given, kind=kind, separator=separator)
    except ModelpatchError:
        return
    if isinstance(found, Targets):
        assert found.values.shape == (rows, len(found.classes))
        assert not np.isinf(found.values).any()
        if found.kind == "multilabel":
            assert np.isin(found.values[~np.isnan(found.values)], (0, 1)).all()
    elif found is not None:
        assert len(found) == rows


# files -------------------------------------------------------------------------------------------------------


def write(folder: Path, columns: dict[str, Sequence[Any]]) -> Path:
    """A manifest with a small picture for each row."""
    count = len(next(iter(columns.values())))
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    with (folder / "m.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *columns])
        writer.writerows(zip([f"{number}.png" for number in range(count)], *columns.values(), strict=True))
    return folder / "m.csv"


@pytest.mark.filterwarnings("ignore::modelpatch.errors.TrainingWarning")
def test_a_manifest_of_several_labels_is_split_over_its_rarest_labels(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, {"label": CATS * 5}))
    assert (task.task.kind, task.classes) == ("multilabel", ("bird", "cat", "dog"))
    assert (len(task.train), len(task.test)) == (24, 6)
    assert task.facts.get("separator") is None
    row = next(row for row in range(24) if str(task.train.images[row]).endswith("/0.png") or row == 23)
    number = int(Path(str(task.train.images[row])).stem)
    expected = [float(name in CATS[number % 6]) for name in task.classes]
    assert task.train.read_targets()[row].values.tolist() == expected  # type: ignore[attr-defined]


def test_a_manifest_of_numbers_needs_its_kind(tmp_path: Path) -> None:
    path = write(tmp_path, {"label": [f"{number * 0.37:.2f}" for number in range(30)]})
    with pytest.raises(DataError, match="--kind regression"):
        load_task(path)
    task = load_task(path, kind="regression")
    assert task.task.kind == "regression"
    held = sorted(float(target.values[0]) for target in task.test.read_targets())  # type: ignore[attr-defined]
    assert len(held) == 6
    assert held[0] < 0.37 * 10 < held[-1], "the test images are spread over the values"


def test_parquet_lists_of_class_labels_have_their_names(tmp_path: Path) -> None:
    pixels = write(tmp_path, {"label": ["x"] * 3}).parent
    images = [{"bytes": (pixels / f"{number}.png").read_bytes(), "path": None} for number in range(3)]
    whole = pa.table({"image": images, "labels": [[0, 1], [1], []]})
    feature = {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "List"}
    described = {"info": {"features": {"labels": feature}}}
    pq.write_table(whole.replace_schema_metadata({"huggingface": json.dumps(described)}), tmp_path / "p.parquet")
    task = load_task(tmp_path / "p.parquet", hold_out=False)
    assert (task.task.kind, task.classes) == ("multilabel", ("cat", "dog"))
    assert [one.values.tolist() for one in task.train.read_targets()] == [[1, 1], [0, 1], [0, 0]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", [0.5, [1, 0, 1], np.array([1, 0]), np.array([0.1, 0.9])])
def test_labels_of_data_sets_that_could_be_two_things_are_asked_for(label: Any) -> None:
    items = [(np.zeros((8, 8, 3), dtype=np.uint8), label)] * 4
    with pytest.raises(DataError, match=r"Say what it is: .*kind='regression'"):
        Task.from_datasets(Items(items))


class Items(list[Any]):
    """A list is a data set with random access."""


def test_data_sets_of_names_are_several_labels_and_of_numbers_where_it_is_said() -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    task = Task.from_datasets(
        Items([(picture, ["b", "a"]), (picture, []), (picture, ["a"])]), Items([(picture, ["a"])])
    )
    assert (task.task.kind, task.classes) == ("multilabel", ("a", "b"))
    numbers = Task.from_datasets(Items([(picture, one) for one in (0.5, 1.5, 2.5, 3.5)]), kind="regression")
    assert numbers.classes == ("number",)
    assert repr(numbers) == "Task('Items', 1 numbers, 2 train, 2 test)" or len(numbers.train) + len(numbers.test) == 4

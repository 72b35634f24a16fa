"""Tasks from folders, manifests, data set libraries and what is bundled; splits."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import CLASSES, color_task
from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.splits import Split, drawn, source_size, split_seed, stratified
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def names_of(split: Split, data: Task) -> list[str]:
    """The class name of every image; in the folders of `image_folder` it is the name of the image's parent."""
    return [data.classes[label] for label in split.labels]


# folders ----------------------------------------------------------------------------------------------------


def test_class_folders_become_a_task_with_their_splits(image_folder: Path) -> None:
    data = load_task(image_folder)
    assert data.task.name == "colors"
    assert data.classes == tuple(sorted(CLASSES))
    assert (len(data.train), len(data.test), data.validation) == (24, 12, None)
    for split in (data.train, data.test):
        assert names_of(split, data) == [Path(str(image)).parent.name for image in split.images]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_kept_apart(image_folder: Path, name: str) -> None:
    (image_folder / "test").rename(image_folder / name)
    data = load_task(image_folder)
    assert data.validation is not None
    assert len(data.validation) == 12
    held_out = {str(image) for image in data.validation.images}
    assert held_out.isdisjoint(map(str, [*data.train.images, *data.test.images]))


def test_folders_without_a_test_split_are_split_by_the_seed(image_folder: Path) -> None:
    first, again, other = (load_task(image_folder / "train", seed=seed) for seed in (0, 0, 1))
    assert list(map(str, first.test.images)) == list(map(str, again.test.images))
    assert list(map(str, first.test.images)) != list(map(str, other.test.images))
    assert len(first.train) + len(first.test) == 24
    assert (split_seed(first.facts), split_seed(other.facts)) == (0, 1)
    assert split_seed({"test_split": "stratified 20%, seed 7"}) == 7  # files of the first edition
    assert first.task.name == image_folder.name  # not that of the split
    assert load_task(image_folder / "train", name="mine").task.name == "mine"


def test_one_class_is_no_task(image_folder: Path) -> None:
    for name in ("green", "blue"):
        for split in ("train", "test"):
            shutil.rmtree(image_folder / split / name)
    with pytest.raises(DataError, match="has 1 class"):
        load_task(image_folder)


def test_a_folder_without_images_is_an_error_that_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"no class folders with images.*train/CLASS/\*\.jpg"):
        load_task(tmp_path)
    with pytest.raises(DataError, match="neither a folder"):
        load_task(tmp_path / "missing")


def test_a_class_that_is_tested_but_not_trained_is_an_error(image_folder: Path) -> None:
    (image_folder / "train" / "green").rename(image_folder / "green")
    with pytest.raises(DataError, match="'green' is tested but has no training image"):
        load_task(image_folder)


def test_a_name_that_no_patch_may_hold_is_an_error(image_folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        load_task(image_folder, name="a\x1b[31mname")


# manifests --------------------------------------------------------------------------------------------------


def manifest_rows(folder: Path) -> list[dict[str, str]]:
    return [
        {"image": str(file.relative_to(folder)), "label": file.parent.name, "split": file.parents[1].name}
        for file in sorted(folder.rglob("*.png"))
    ]


def test_a_csv_names_images_relative_to_itself(image_folder: Path) -> None:
    data = load_task(write_csv(image_folder / "all.csv", manifest_rows(image_folder)))
    assert data.task.name == "all"
    assert (len(data.train), len(data.test)) == (24, 12)
    assert names_of(data.test, data) == [Path(str(image)).parent.name for image in data.test.images]


def test_a_csv_for_each_split_is_read_from_a_folder(image_folder: Path) -> None:
    for split in ("train", "test"):
        rows = [{k: r[k] for k in ("image", "label")} for r in manifest_rows(image_folder) if r["split"] == split]
        write_csv(image_folder / f"{split}.csv", rows)
    data = load_task(image_folder)
    assert (len(data.train), len(data.test)) == (24, 12)


def test_labels_that_are_numbers_are_ordered_as_numbers(image_folder: Path) -> None:
    rows = [
        {"path": row["image"], "target": str(number % 12)} for number, row in enumerate(manifest_rows(image_folder))
    ]
    assert load_task(write_csv(image_folder / "all.csv", rows)).classes == tuple(str(label) for label in range(12))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "missing.png"}, "row without its picture"),
        ({"image": ""}, "row without its picture"),
        ({"image": "a" * 5000}, "row without its picture"),
        ({"image": "a\0b"}, "row without its picture"),
        ({"label": " "}, "row without a label"),
        ({"label": "NaN"}, "row without a label"),
    ],
)
def test_a_bad_row_is_left_out_and_counted(image_folder: Path, change: dict[str, str], reason: str) -> None:
    rows = manifest_rows(image_folder)
    rows[0].update(change)
    data = load_task(write_csv(image_folder / "all.csv", rows))
    (name,) = data.passed_over[reason]
    assert name.startswith("all.csv, row 1")
    assert len(data.train) + len(data.test) == len(rows) - 1


def test_an_unknown_split_is_an_error_that_gives_its_row(image_folder: Path) -> None:
    rows = manifest_rows(image_folder)
    rows[0]["split"] = "somewhere"
    with pytest.raises(DataError, match="row 1: split 'somewhere' is none of train, test"):
        load_task(write_csv(image_folder / "all.csv", rows))


def test_unknown_columns_are_an_error_that_names_the_known_ones(image_folder: Path) -> None:
    path = write_csv(image_folder / "all.csv", [{"bild": "a", "art": "red"}])
    with pytest.raises(DataError, match=r"has the columns bild, art\. Expected one of image.*label"):
        load_task(path)
    path.write_text("image,label\n")
    with pytest.raises(DataError, match="no rows"):
        load_task(path)
    path.write_text("")
    with pytest.raises(DataError, match=r"has the columns \(none\)"):
        load_task(path)


def write_splits(folder: Path, columns: dict[str, tuple[str, str]]) -> None:
    """A manifest for each split, with its own names of the columns."""
    for split, (image, label) in columns.items():
        rows = [row for row in manifest_rows(folder) if row["split"] == split]
        write_csv(folder / f"{split}.csv", [{image: row["image"], label: row["label"]} for row in rows])


def test_manifests_of_one_task_may_name_their_columns_differently(image_folder: Path) -> None:
    write_splits(image_folder, {"train": ("image", "label"), "test": ("path", "class")})
    data = load_task(image_folder)
    for split in (data.train, data.test):
        assert names_of(split, data) == [Path(str(image)).parent.name for image in split.images]


def test_unknown_columns_of_one_split_are_an_error_that_names_its_file(image_folder: Path) -> None:
    write_splits(image_folder, {"train": ("image", "label"), "test": ("image", "kind")})
    file = image_folder / "test.csv"
    file.write_text("\n".join(f"{line},{number}" for number, line in enumerate(file.read_text().splitlines())))
    with pytest.raises(DataError, match=r"test\.csv has the columns kind, 0 beside its images"):
        load_task(image_folder)


def test_a_bad_row_is_counted_in_its_own_file(image_folder: Path) -> None:
    write_splits(image_folder, {"train": ("image", "label"), "test": ("image", "label")})
    with (image_folder / "test.csv").open("a") as stream:
        stream.write("missing.png,red\n")
    rows = sum(row["split"] == "test" for row in manifest_rows(image_folder)) + 1
    assert load_task(image_folder).passed_over == {"row without its picture": (f"test.csv, row {rows}: missing.png",)}


@pytest.mark.parametrize("number", [0, 3])
def test_a_row_with_more_cells_than_columns_is_named(image_folder: Path, number: int) -> None:
    rows = [f"{row['image']},{row['label']}" for row in manifest_rows(image_folder)]
    rows[number] += ",more"
    (image_folder / "ragged.csv").write_text("\n".join(["image,label", *rows]))
    with pytest.raises(DataError, match=rf"row {number + 1}: it has more cells than the 2 columns"):
        load_task(image_folder / "ragged.csv")


@pytest.mark.parametrize("kind", ["folders", "manifests"])
def test_two_sources_of_one_split_are_refused(image_folder: Path, kind: str) -> None:
    if kind == "manifests":
        write_splits(image_folder, {"train": ("image", "label"), "test": ("image", "label")})
    for name in ("val", "validation"):
        if kind == "folders":
            (image_folder / name).mkdir()
        else:
            (image_folder / f"{name}.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="are both the validation split"):
        load_task(image_folder)


def test_a_parquet_file_may_hold_the_images_themselves(tmp_path: Path) -> None:
    colors = color_task()
    for name, split in (("train", colors.train), ("test", colors.test)):
        table = pa.table(
            {
                "img": [{"bytes": png(image), "path": None} for image in split.images],
                "label": [CLASSES[label] for label in split.labels],
            }
        )
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = load_task(tmp_path)
    assert (len(data.train), len(data.test)) == (24, 12)
    assert np.array_equal(np.asarray(open_image(data.train.images[5])), colors.train.images[5])
    assert names_of(data.train, data) == [CLASSES[label] for label in colors.train.labels]


PARQUET_TROUBLE: dict[str, tuple[dict[str, Any], str]] = {
    "labels that are null": ({"label": [None, None]}, "row 1: it has no label"),
    "labels that are no numbers": ({"label": [float("nan")] * 2}, "row 1: it has no label"),
    "a label beyond the names": ({"label": [0, 9], "names": ["a", "b"]}, "column label: the label 9 is none of 0 to 1"),
    "a label that is text where numbers are named": ({"label": ["a", "b"], "names": ["a", "b"]}, "cannot be read"),
    "names that are a number": ({"label": [0, 1], "names": 3}, "cannot be read as a manifest"),
    "images that are null": ({"label": [0, 1], "image": [None, None]}, "row 1: there is no image"),
    "an image without bytes or path": ({"label": [0, 1], "image": [{"bytes": None, "path": None}] * 2}, "no image"),
}


@pytest.mark.parametrize(("given", "message"), PARQUET_TROUBLE.values(), ids=PARQUET_TROUBLE)
def test_a_parquet_file_with_holes_is_an_error_that_says_where(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    images = given.get("image", [png(image) for image in color_task().train.images[:2]])
    table = pa.table({"image": images, "label": given["label"]})
    if "names" in given:
        described = {"info": {"features": {"label": {"names": given["names"]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, tmp_path / "holes.parquet")
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "holes.parquet")


def test_class_names_in_a_parquet_schema_take_the_place_of_numbers(tmp_path: Path) -> None:
    colors = color_task()
    table = pa.table({"image": [png(image) for image in colors.train.images], "label": colors.train.labels})
    described = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), tmp_path / "colors.parquet")
    data = load_task(tmp_path / "colors.parquet")
    assert set(data.classes) == set(CLASSES)
    for split in (data.train, data.test):
        brightest = [CLASSES[np.asarray(open_image(image)).mean((0, 1)).argmax()] for image in split.images]
        assert names_of(split, data) == brightest


# libraries --------------------------------------------------------------------------------------------------


def test_a_local_folder_is_read_through_datasets(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_task(f"hf:{image_folder}")
    assert data.task.name == "colors"
    assert (len(data.train), len(data.test)) == (24, 12)
    assert data.classes == tuple(sorted(CLASSES))
    brightest = [CLASSES[np.asarray(open_image(image)).mean((0, 1)).argmax()] for image in data.test.images]
    assert names_of(data.test, data) == brightest


def test_a_data_set_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_task(f"hf:{tmp_path / 'missing'}")


def test_the_bundled_digits_are_all_there() -> None:
    data = load_task("bundled:digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    assert source_size(data.train) == 8
    assert max(np.asarray(image).max() for image in data.train.images) == 255


# splits -----------------------------------------------------------------------------------------------------


labels_of = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(lambda values: np.array(values, dtype=np.int64))
fractions = st.floats(0.05, 0.5)


@given(labels_of, fractions, st.integers(0, 2**31))
def test_a_stratified_split_is_disjoint_and_covers_every_row(labels: np.ndarray, fraction: float, seed: int) -> None:
    rest, share = stratified(labels, fraction, seed)
    assert sorted([*rest, *share]) == list(range(len(labels)))


@given(labels_of, fractions, st.integers(0, 2**31))
def test_a_stratified_split_takes_the_fraction_of_every_class(labels: np.ndarray, fraction: float, seed: int) -> None:
    rest, share = stratified(labels, fraction, seed)
    for label in np.unique(labels):
        rows, taken = (labels == label).sum(), (labels[share] == label).sum()
        assert abs(taken - fraction * rows) <= 1
        assert rows == 1 or taken >= 1
        assert (labels[rest] == label).any()


@given(labels_of, fractions, st.integers(0, 2**31))
def test_a_stratified_split_follows_its_seed(labels: np.ndarray, fraction: float, seed: int) -> None:
    for first, again in zip(stratified(labels, fraction, seed), stratified(labels, fraction, seed), strict=True):
        assert np.array_equal(first, again)


def test_validation_is_cut_from_the_training_images_once() -> None:
    data = color_task()
    held = data.with_validation(0.25, seed=0)
    assert held.validation is not None
    assert (len(held.train), len(held.validation), len(held.test)) == (18, 6, 12)
    assert held.with_validation(0.5, seed=1) is held


@pytest.mark.parametrize("fraction", [0.9, 0.99])
def test_a_validation_share_that_leaves_a_class_nothing_to_train_on_is_refused(fraction: float) -> None:
    data = color_task(count=3 * len(CLASSES))
    with pytest.raises(DataError, match=rf"{fraction} for validation leaves the class 'red' none of its 3 images"):
        data.with_validation(fraction, seed=0)


def test_a_validation_share_of_single_images_is_refused() -> None:
    with pytest.raises(DataError, match="no class of colors has an image to spare"):
        color_task(count=len(CLASSES)).with_validation(0.25, seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_a_validation_share_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="expected one between 0 and 1"):
        color_task().with_validation(fraction, seed=0)


def test_a_test_split_cannot_be_cut_from_single_images(image_folder: Path) -> None:
    for folder in (image_folder / "train").iterdir():
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    with pytest.raises(DataError, match="one image a class, and no test split"):
        load_task(image_folder / "train")


@pytest.mark.parametrize("count", [0, -1])
def test_a_subsample_of_nothing_is_refused(count: int) -> None:
    with pytest.raises(DataError, match="expected at least one"):
        color_task().subsample(count)


@pytest.mark.parametrize("seed", [-1, 0.5, "x", None])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(DataError, match="the seed of a split is"):
        load_task("bundled:digits", seed=seed)


@pytest.mark.parametrize("source", ["", None, 3, "a\0b", "a" * 5000, "~nobody-of-this-name/x"])
def test_a_source_that_can_be_none_is_refused(source: Any) -> None:
    with pytest.raises(DataError):
        load_task(source)


@pytest.mark.parametrize("count", [3, 6, 12])
def test_a_subsample_keeps_the_shares_of_the_classes(count: int) -> None:
    sample = color_task().subsample(count, seed=3)
    assert np.bincount(sample.train.labels).tolist() == [count // 3] * 3
    assert len(sample.test) == 12


@given(labels_of, st.integers(0, 80), st.integers(0, 2**31))
def test_drawn_rows_are_exactly_as_many_and_in_proportion(labels: np.ndarray, count: int, seed: int) -> None:
    rows = drawn(labels, count, seed)
    count = min(count, len(labels))
    assert len(rows) == len(set(rows)) == count
    classes, sizes = np.unique(labels, return_counts=True)
    taken = np.array([(labels[rows] == label).sum() for label in classes])
    if count >= len(classes):
        assert taken.min() >= 1
        # a class takes what lies below one threshold; classes that must be there for one image may take from the others
        assert (np.abs(taken - sizes * count / len(labels)) <= len(classes)).all()
    assert np.array_equal(rows, drawn(labels, count, seed))


def test_drawn_rows_of_equal_classes_differ_by_one_at_most() -> None:
    labels = np.repeat(np.arange(43), 53)
    taken = np.bincount(labels[drawn(labels, 600, seed=0)])
    assert taken.sum() == 600
    assert set(taken) == {600 // 43, 600 // 43 + 1}


def test_a_subsample_larger_than_the_task_is_the_task() -> None:
    data = color_task()
    assert data.subsample(24) is data


def test_a_task_shows_its_name_and_counts() -> None:
    assert repr(color_task()) == "Task('colors', 3 classes, 24 train, 12 test)"
    assert "6 validation" in repr(color_task().with_validation(0.25, 0))


def test_splits_without_training_images_are_not_taken_for_classes(image_folder: Path) -> None:
    (image_folder / "train").rename(image_folder / "val")
    with pytest.raises(DataError, match="has the splits validation, test but no training images"):
        load_task(image_folder)


def test_an_empty_split_is_found_before_any_training(image_folder: Path) -> None:
    for file in (image_folder / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="its split 'test' holds no images"):
        load_task(image_folder)


def test_a_row_without_a_label_is_named(image_folder: Path) -> None:
    images = sorted((image_folder / "train").rglob("*.png"))[:4]
    rows = ["image,label", *(f"{file},{file.parent.name}" for file in images[:3]), f"{images[3]}"]
    (image_folder / "ragged.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match="has 1 class"):
        load_task(image_folder / "ragged.csv")


def test_a_folder_is_the_same_source_however_it_is_spelled(image_folder: Path) -> None:
    assert load_task(image_folder).facts["source"] == load_task(f"{image_folder}/").facts["source"] == image_folder.name

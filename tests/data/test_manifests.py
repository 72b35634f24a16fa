"""Manifests as users have them: names of columns, separators, encodings, paths of other machines, ids, splits, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelpatch.data.sources.tables import decode, read_table
from modelpatch.data.task import load_task
from modelpatch.errors import DataError
from pictures import counts, draw

NAMES = ("cat", "dog")
LABELS = [NAMES[number % 2] for number in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures images/0.png to 7.png, of a cat and a dog in turns."""
    draw(*(tmp_path / "images" / f"{number}.png" for number in range(8)))
    return tmp_path


def write(file: Path, header: str, row: str, encoding: str = "utf-8") -> Path:
    """A table with a line for each picture; `row` holds {n} and {label}."""
    lines = [row.format(n=number, label=label) for number, label in enumerate(LABELS)]
    file.write_bytes("\n".join([*([header] if header else []), *lines]).encode(encoding))
    return file


def check(source: Path, **options: Any) -> Any:
    task = load_task(source, **options)
    assert set(task.classes) == set(NAMES)
    for split in task.splits.values():
        assert [task.classes[label] for label in split.labels] == [LABELS[int(Path(str(i)).stem)] for i in split.images]
    assert sum(map(len, task.splits.values())) == len(LABELS)
    return task


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("file_name,label", "images/{n}.png,{label}"),
        ("Filename;Class Name", "images/{n}.png;{label}"),
        ("image_id\tbreed", "{n}\t{label}"),
        ("id|species", "{n}|{label}"),
        ("img,target", "{n}.png,{label}"),
        ("image_path,diagnosis", "/home/other/set/images/{n}.png,{label}"),
        ("path,category", r"C:\data\images\{n}.png,{label}"),
        ("filepath,class", "./images/{n}.png,{label}"),
        ("Image ID,dx,age", "{n},{label},{n}"),
        ("image,label", '"images/{n}.png","{label} "'),
        (",image,label", "{n},images/{n}.png,{label}"),
        ("file,label", "file:///mnt/images/{n}.png,{label}"),
        ("file,label", "https://example.org/set/{n}.png?size=2,{label}"),
        ("photo,label", "images/{n}.JPG,{label}"),
        ("sep=;\nimage;label", "images/{n}.png;{label}"),
        ("image,label,label_id", "images/{n}.png,{label},id-{label}"),
        ("image,what", "images/{n}.png,{label}"),
        ("isic_id,diagnosis", "{n},{label}"),
        ("Bild;Klasse", "images/{n}.png;{label}"),
        ("slide,label", "{n},{label}"),
        ("# made on a Monday\n# by nobody\nimage,label", "images/{n}.png,{label}"),
        ("", "images/{n}.png,{label}"),
        ("", "images/{n}.png {label}"),
    ],
)
def test_columns_separators_and_paths_of_every_usual_form_are_read(folder: Path, header: str, row: str) -> None:
    check(write(folder / "labels.csv", header, row))
    check(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32"])
def test_encodings_are_told_apart(folder: Path, encoding: str) -> None:
    file = write(folder / "labels.csv", "image,label,remark", "images/{n}.png,{label},größer", encoding)
    check(file)
    assert read_table(file).cells["remark"][0] == "größer"


@pytest.mark.parametrize("text", ["", "a", "ä", "日本", "a\0b"])
def test_text_without_a_mark_is_decoded(text: str) -> None:
    assert decode(text.encode())[0] == text


@pytest.mark.parametrize("name", ["all.json", "all.jsonl", "map.json", "columns.json", "wrapped.json"])
def test_json_of_every_usual_form_is_read(folder: Path, name: str) -> None:
    rows = [{"file_name": f"images/{number}.png", "label": label} for number, label in enumerate(LABELS)]
    content = {
        "all.json": json.dumps(rows),
        "all.jsonl": "\n".join(map(json.dumps, rows)),
        "map.json": json.dumps({row["file_name"]: row["label"] for row in rows}),
        "columns.json": json.dumps({key: [row[key] for row in rows] for key in rows[0]}),
        "wrapped.json": json.dumps({"info": {}, "data": rows}),
    }
    (folder / name).write_text(content[name])
    check(folder / name)


def test_a_parquet_file_may_hold_paths_and_lie_in_shards(folder: Path) -> None:
    for part in range(2):
        rows = range(part * 4, part * 4 + 4)
        table = pa.table({"path": [f"images/{row}.png" for row in rows], "label": [LABELS[row] for row in rows]})
        pq.write_table(table, folder / f"train-0000{part}-of-00002.parquet")
    check(folder)


@pytest.mark.parametrize(
    "values", [("train", "test", "val"), ("Training", "PublicTest", "dev"), ("TRAIN", "tst", "eval")]
)
def test_a_column_of_splits_is_read_however_they_are_called(folder: Path, values: tuple[str, str, str]) -> None:
    splits = [values[number] for number in (0, 0, 0, 0, 1, 1, 2, 2)]
    lines = [f"images/{n}.png,{label},{split}" for n, (label, split) in enumerate(zip(LABELS, splits, strict=True))]
    (folder / "labels.csv").write_text("\n".join(["image,label,Usage", *lines]))
    task = check(folder / "labels.csv")
    assert {split: len(images) for split, images in task.splits.items()} == {"train": 4, "test": 2, "validation": 2}


def test_a_manifest_of_each_split_reads_the_pictures_of_its_own_folder(tmp_path: Path) -> None:
    draw(*(tmp_path / f"{split}_images" / f"{n}.png" for split in ("train", "test") for n in range(4)))
    for split in ("train", "test"):
        lines = ["id,breed", *(f"{n},{NAMES[n % 2]}" for n in range(4))]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    (tmp_path / "sample_submission.csv").write_text("id,breed\n0,cat")
    task = load_task(tmp_path)
    for split, images in task.splits.items():
        assert {Path(str(image)).parent.name for image in images.images} == {f"{split}_images"}
        assert len(images) == 4


def test_a_manifest_in_each_folder_of_a_split_is_found(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("valid", 4)):
        draw(*(tmp_path / split / f"{n}.png" for n in range(count)))
        rows = [f"{n}.png, {NAMES[n % 2]}" for n in range(count)]
        (tmp_path / split / "_annotations.csv").write_text("\n".join(["filename, class", *rows]))
    task = load_task(tmp_path)
    assert task.validation is not None
    assert (len(task.train) + len(task.test), len(task.validation)) == (6, 4)


def test_test_rows_without_labels_are_left_out_and_counted(folder: Path) -> None:
    lines = ["id,label", *(f"{n},{LABELS[n]}" for n in range(6))]
    (folder / "train.csv").write_text("\n".join(lines))
    (folder / "test.csv").write_text("id\n6\n7")
    task = load_task(folder)
    assert task.passed_over == {"row without a label": ("test.csv, row 1", "test.csv, row 2")}
    assert len(task.train) + len(task.test) == 6


def test_rows_of_missing_pictures_are_counted_and_all_of_them_refused(folder: Path) -> None:
    file = write(folder / "labels.csv", "image,label", "images/{n}.png,{label}")
    file.write_text(file.read_text() + "\nimages/99.png,cat\n")
    assert load_task(file).passed_over == {"row without its picture": ("labels.csv, row 9: images/99.png",)}
    write(file, "image,label", "images/x{n}.png,{label}")
    with pytest.raises(
        DataError, match=r"labels\.csv, row 1: there is no image 'images/x0\.png' in .*nor any other of its 8"
    ):
        load_task(file)


def test_a_picture_of_another_folder_never_stands_for_a_missing_one(tmp_path: Path) -> None:
    draw(*(tmp_path / name / f"{n}.png" for name in NAMES for n in range(3)))
    (tmp_path / "cat" / "1.png").unlink()
    lines = [f"{name}/{n}.png,{name}" for name in NAMES for n in range(3)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *lines]))
    task = load_task(tmp_path / "labels.csv")
    assert counts(task) == {"train": {"cat": 1, "dog": 2}, "test": {"cat": 1, "dog": 1}}
    assert task.passed_over["row without its picture"] == ("labels.csv, row 2: cat/1.png",)


def test_one_name_in_two_folders_is_asked_for(tmp_path: Path) -> None:
    draw(*(tmp_path / name / f"{n}.png" for name in ("a", "b") for n in range(2)))
    (tmp_path / "labels.csv").write_text("image,label\n0.png,cat\n1.png,dog")
    with pytest.raises(DataError, match=r"row 1: '0\.png' may be a/0\.png or b/0\.png"):
        load_task(tmp_path / "labels.csv")


def test_repeated_rows_and_torn_pictures_are_counted(folder: Path) -> None:
    file = write(folder / "labels.csv", "image,label", "images/{n}.png,{label}")
    file.write_text(file.read_text() + "\nimages/0.png,cat\nimages/1.png,cat")
    passed_over = load_task(file).passed_over
    assert passed_over["row that repeats another"] == ("labels.csv, row 9",)
    assert passed_over["row of a picture with several labels"] == ("labels.csv, row 2", "labels.csv, row 10")


def test_numbers_as_labels_may_lack_some(folder: Path) -> None:
    lines = [f"images/{n}.png,{n % 2 if n < 6 else -1}" for n in range(8)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *lines]))
    task = load_task(folder)
    assert task.classes == ("0", "1")
    assert task.passed_over == {"row without a label": ("labels.csv, row 7", "labels.csv, row 8")}


def test_several_columns_of_labels_are_asked_for_by_name(folder: Path) -> None:
    lines = [f"images/{n}.png,{LABELS[n]},{'ab'[n // 4]}" for n in range(8)]
    (folder / "labels.csv").write_text("\n".join(["image,fine_label,coarse_label", *lines]))
    with pytest.raises(DataError, match=r"fine_label \(2 different\), coarse_label .*--label-column 'fine_label'"):
        load_task(folder)
    assert load_task(folder, label_column="coarse_label").classes == ("a", "b")
    assert load_task(folder, label_column="fine_label").facts["label_column"] == "fine_label"
    with pytest.raises(DataError, match=r"no column 'fine' \(--label-column\)"):
        load_task(folder, label_column="fine")


def test_columns_are_named_for_tables_alone(tmp_path: Path) -> None:
    draw(*(tmp_path / name / f"{n}.png" for name in NAMES for n in range(3)))
    with pytest.raises(DataError, match=r"is no table, and has no column 'breed' \(label_column\)"):
        load_task(tmp_path, label_column="breed")


def test_names_of_columns_that_say_nothing_are_given(folder: Path) -> None:
    file = write(folder / "labels.csv", "a,b,c", "{n},{label},{label}")
    check(file, image_column="a", label_column="b")
    with pytest.raises(DataError, match=r"or name one: --label-column"):
        load_task(file)
    none = write(folder / "others.csv", "a,b", "no {n},{label}")
    with pytest.raises(DataError, match="Name others: --image-column"):
        load_task(none)


def test_class_folders_go_before_a_table_beside_them(tmp_path: Path) -> None:
    draw(*(tmp_path / name / f"{n}.png" for name in NAMES for n in range(3)))
    (tmp_path / "list.csv").write_text("image,label\ncat/0.png,x\ndog/1.png,y")
    task = load_task(tmp_path)
    assert (task.classes, task.passed_over) == (NAMES, {"no picture (.csv)": ("list.csv",)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has the columns"),
        ("a.json", b"[1, 2", "cannot be read as a manifest"),
        ("a.json", b"[" * 100_000, "cannot be read as a manifest"),
        ("a.json", b'{"a": {"b": 1}, "c": 2}', "holds no table"),
        ("a.jsonl", b'{"image": 1}\n[]', "line 2 is no object"),
        ("a.parquet", b"PAR1", "cannot be read as a manifest"),
        ("a.xlsx", b"PK", "is a spreadsheet"),
        ("a.arrow", b"x", "cannot be read as a manifest"),
    ],
)
def test_files_that_are_no_tables_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_task(tmp_path / name)
    assert name in str(caught.value)


def test_columns_in_other_letters_are_told_apart(folder: Path) -> None:
    file = write(folder / "labels.csv", "\u56fe\u7247,\u6807\u7b7e", "images/{n}.png,{label}")
    check(file, label_column="\u6807\u7b7e")
    with pytest.raises(DataError, match="has no column '\u7c7b\u522b'"):
        load_task(file, label_column="\u7c7b\u522b")
    check(file)  # the one column beside the images


def test_images_and_labels_are_not_of_one_column(folder: Path) -> None:
    file = write(folder / "labels.csv", "image,label", "images/{n}.png,{label}")
    with pytest.raises(DataError, match="the column 'image' cannot hold both images and labels"):
        load_task(file, label_column="image")


def test_nothing_in_a_list_of_labels_is_no_label(folder: Path) -> None:
    rows = [{"image": f"images/{number}.png", "label": [label, None, ""]} for number, label in enumerate(LABELS)]
    (folder / "labels.json").write_text(json.dumps(rows), encoding="utf-8")
    assert load_task(folder / "labels.json").classes == NAMES


def test_a_column_of_labels_in_a_file_without_pictures_is_of_no_use(tmp_path: Path) -> None:
    draw(*(tmp_path / "test" / f"{n}.png" for n in range(4)))
    (tmp_path / "train.csv").write_text("image,label\nlost.png,cat\nlost too.png,dog\n")
    (tmp_path / "test.csv").write_text("image,wing\n" + "".join(f"{n}.png,{n}.5\n" for n in range(4)))
    with pytest.raises(DataError, match=r"wing"):
        load_task(tmp_path)

"""The report of a task's data: counts, findings of names and of pictures, and what it leaves alone."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dense import box_task, write_masks
from modelpatch.data.findings import fold_name
from modelpatch.data.looking import find_alike, look_at
from modelpatch.data.report import choose_rows
from modelpatch.data.splits import Split
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Boxes, Detection
from modelpatch.tasks.record import TaskRecord
from modelpatch.tasks.vector import Vector

SIDE = 24


def draw(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A smooth coloured picture that differs for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def make_task(
    train: Mapping[str, int | list[Any]], test: Mapping[str, int | list[Any]], kind: str = "classification"
) -> Task:
    """A task with so many pictures of each class, or these."""
    classes = list(dict.fromkeys([*train, *test]))

    def split(members: Mapping[str, int | list[Any]], start: int) -> Split:
        images: list[Any] = []
        labels = []
        for name, own in members.items():
            made = [encode(draw(start + len(images) + n)) for n in range(own)] if isinstance(own, int) else own
            images += made
            labels += [classes.index(name)] * len(made)
        return Split(images, np.array(labels, dtype=np.int64))

    return Task(TaskRecord(name="made", kind=kind, classes=tuple(classes)), split(train, 0), split(test, 10_000))


def codes(task: Task, **options: Any) -> dict[str, str]:
    return {finding.code: finding.level for finding in task.report(**options).findings}


def test_a_plain_task_is_counted_and_nothing_is_wrong() -> None:
    report = make_task({"cat": 60, "dog": 70}, {"cat": 50, "dog": 60}).report()
    assert report.summary == "made: classification, 2 classes, 130 train, 110 test images"
    train, test = report.splits
    assert train.classes == train.images_of == {"cat": 60, "dog": 70}
    assert test.classes == {"cat": 50, "dog": 60}
    assert (train.opened, test.opened, report.opened) == (130, 110, 240)
    assert train.formats == {"PNG": 130}
    assert train.modes == {"RGB": 130}
    assert str(train.widths) == str(SIDE)
    assert report.warnings == []
    assert [finding.code for finding in report.findings] == ["small-set"]


def test_a_report_is_json_and_text() -> None:
    report = make_task({"cat": 12, "Cat": 1}, {"cat": 4}).report()
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["splits"][0]["classes"] == {"cat": 12, "Cat": 1}
    assert loaded["summary"] == report.summary
    text = str(report)
    assert text.startswith(report.summary)
    assert all(finding.text in text for finding in report.findings)
    assert report == make_task({"cat": 12, "Cat": 1}, {"cat": 4}).report()


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("cat", "Training"), "split-as-class"),
        (("cat", "test"), "split-as-class"),
        (("cat", "images"), "folder-as-class"),
        (("cat", "JPEGImages"), "folder-as-class"),
        (("cat", "train2017"), "split-as-class"),
        (("cat", "New Folder (2)"), "no-name"),
        (("cat", "Unnamed: 0"), "no-name"),
        (("cat", "nan"), "no-name"),
        (("cat", ".ipynb_checkpoints"), "no-name"),
        (("cat", "__MACOSX"), "no-name"),
        (("cat", "?"), "no-name"),
        (("cat", "Cat "), "alike-names"),
        (("sea lion", "Sea_Lion"), "alike-names"),
        (("caf\u00e9", "cafe\u0301"), "alike-names"),
        (("tulip", "tulips"), "plural"),
        (("0", "1"), "number-names"),
        (("n02102040", "n03000684"), "number-names"),
        (("cat", "7"), "number-names"),
    ],
)
def test_a_name_that_is_none(names: tuple[str, str], code: str) -> None:
    task = make_task(dict.fromkeys(names, 6), dict.fromkeys(names, 6))
    assert code in codes(task, images=0)
    plain = {"cat": 6, "class1": 6, "label 2": 6, "background": 6, "id_3": 6}
    assert codes(make_task(plain, plain), images=0) == {"small-test": "note"}


def test_numbers_with_gaps_tell_the_missing_ones() -> None:
    task = make_task({"0": 6, "1": 6, "3": 6}, {"0": 6, "1": 6, "3": 6})
    assert any("2 between them is missing" in note for note in task.report(0).notes)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12))
def test_names_fold_the_same_in_any_form_and_with_blanks(name: str) -> None:
    assert fold_name(unicodedata.normalize("NFD", name)) == fold_name(unicodedata.normalize("NFC", name))
    assert fold_name(f" {name}_") == fold_name(name)


def test_classes_of_one_split_and_uneven_ones() -> None:
    task = make_task({"cat": 50, "dog": 4, "hen": 6}, {"cat": 40, "dog": 5})
    found = {finding.code: finding for finding in task.report(images=0).findings}
    assert found["one-split-only"].examples == ("hen",)
    assert found["rare"].examples == ("dog",)
    assert "'cat' has 12.5 times the images of 'dog'" in found["uneven"].text
    assert found["dominant"].text.startswith("89% of the test images are 'cat'")
    assert found["small-test"].text.startswith("the test split has 45 images")


def test_a_column_of_numbers_of_images_is_no_label() -> None:
    names = {f"IMG_{number}": 1 for number in range(30)}
    assert codes(make_task(names, {"IMG_0": 3}), images=0)["identifiers"] == "warning"


def test_equal_images_in_two_splits_and_two_classes() -> None:
    twin, torn, near = draw(1), draw(2), draw(3, (64, 64))
    task = make_task(
        {"cat": [encode(twin), encode(torn), encode(near), encode(draw(4))], "dog": [encode(torn), encode(draw(5))]},
        {"cat": [encode(twin, "BMP"), encode(near, "JPEG", quality=60)], "dog": [encode(draw(6))]},
    )
    found = {finding.code: finding for finding in task.report().findings}
    assert found["twice"].examples == ("train row 0 = test row 0",)
    assert found["twice"].rows == (("train", 0), ("test", 0))
    assert found["two-classes"].examples == ("train row 1 = train row 4",)
    assert found["repeated"].level == "note"
    assert "near" not in found
    found = {finding.code: finding for finding in task.report(near=True).findings}
    assert found["near"].rows == (("train", 2), ("test", 1))


def test_without_opening_images_equal_files_are_found(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                seed = {"train": 0, "test": 100}[split] + number + 10 * (name == "dog")
                draw(seed).save(tmp_path / split / name / f"{number}.png")
    assert "twice" not in codes(load_task(tmp_path), images=0)
    shutil.copy(tmp_path / "train/dog/1.png", tmp_path / "test/dog/new.png")
    report = load_task(tmp_path).report(images=0)
    assert [one.examples for one in report.findings if one.code == "twice"] == [
        (str(Path("train/dog/1.png = test/dog/new.png")),)
    ]
    assert report.opened == 0


def test_copies_are_found_by_their_names(tmp_path: Path) -> None:
    for place in ("train/cat/a_jpg.rf.0123456789abcdef.png", "test/cat/a_jpg.rf.0023456789abcdef.png",
                  "train/dog/b (1).png", "test/dog/b (2).png", "train/dog/c_flip.png", "test/dog/c.png"):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        draw(len(place)).save(tmp_path / place)
    found = {one.code: one for one in load_task(tmp_path).report(0).findings}
    assert found["copies"].text.startswith("2 originals have copies")


ODD: dict[str, Callable[[], bytes]] = {
    "turned": lambda: encode(draw(50, (20, 30)), "JPEG", exif=exif(6)),
    "alpha": lambda: encode(draw(51).convert("RGBA")),
    "deep": lambda: encode(Image.fromarray(np.random.default_rng(0).integers(0, 65535, (24, 24), dtype=np.uint16))),
    "cmyk": lambda: encode(draw(52).convert("CMYK"), "JPEG"),
    "moving": lambda: encode(draw(53), "GIF", save_all=True, append_images=[draw(54), draw(55)]),
    "dark": lambda: encode(Image.fromarray(np.random.default_rng(0).integers(0, 4095, (24, 24), dtype=np.uint16))),
    "blank": lambda: encode(Image.new("RGB", (24, 24), "red")),
    "grey": lambda: encode(draw(56).convert("L").convert("RGB")),
    "small": lambda: encode(draw(57, (5, 5))),
    "long": lambda: encode(draw(58, (24, 60))),
}


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x112] = orientation
    return made


@pytest.mark.parametrize("code", ODD)
def test_an_odd_picture_is_told(code: str) -> None:
    plain = {"cat": 6, "dog": 6}
    assert code not in codes(make_task(plain, plain))
    assert code in codes(make_task({**plain, "cat": [encode(draw(9)), ODD[code]()]}, plain))


def test_a_turned_picture_is_measured_upright() -> None:
    facts = look_at(encode(draw(1, (20, 30)), "JPEG", exif=exif(6)))
    assert (facts.width, facts.height, facts.header.turned) == (30, 20, True)


def test_unreadable_images_are_named_with_the_reason(tmp_path: Path) -> None:
    for place in ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        draw(len(place)).save(tmp_path / place)
    broken = tmp_path / "train/cat/broken.jpg"
    broken.write_bytes(encode(draw(1, (64, 64)), "JPEG")[:400])
    report = load_task(tmp_path).report()
    assert list(report.unreadable) == [str(Path("train/cat/broken.jpg"))]
    assert "cannot be read as an image" in next(iter(report.unreadable.values()))
    assert any("1 image cannot be read" in text for text in report.warnings)


def test_formats_that_tell_the_class() -> None:
    cats = [encode(draw(number), "JPEG") for number in range(12)]
    assert "telling" in codes(make_task({"cat": cats, "dog": 12}, {"cat": 5, "dog": 5}))
    assert "telling" not in codes(make_task({"cat": [*cats, encode(draw(40))], "dog": 12}, {"cat": 5, "dog": 5}))


def test_splits_of_other_pictures() -> None:
    large = [encode(draw(number, (96, 96))) for number in range(100, 112)]
    assert "splits-differ" in codes(make_task({"cat": 12, "dog": 2}, {"cat": large}))


def test_boxes_are_counted_and_measured() -> None:
    task = box_task()
    for report in (task.report(images=0), task.report()):  # boxes are at hand, without a picture
        labels = np.concatenate([target.labels for target in task.train.targets or ()])  # type: ignore[attr-defined]
        counted = dict(zip(task.classes, np.bincount(labels, minlength=len(task.classes)).tolist(), strict=True))
        assert report.splits[0].classes == counted
        assert report.counted == "objects"
    outside = Boxes(np.array([[2.0, 2.0, 90.0, 12.0]]), np.array([0]), np.array([False]))
    wrong = Split(
        [draw(1)] * 2,
        np.zeros(2, dtype=np.int64),
        [outside, Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))],
    )
    report = Task(task.task, wrong, task.test).report()
    assert any("boxes that reach out of their image" in text for text in report.warnings)
    assert report.splits[0].empty == 1
    assert "empty" in {finding.code for finding in report.findings}


def test_masks_are_counted_in_pixels(tmp_path: Path) -> None:
    task = load_task(write_masks(tmp_path))
    train = task.report().splits[0]
    assert train.classes is not None
    assert sum(train.classes.values()) <= len(task.train) * 16 * 16
    assert train.images_of is not None
    assert max(train.images_of.values()) <= len(task.train)
    assert task.report(images=0).splits[0].classes is None, "masks are files to read"


def test_targets_are_drawn_in_small_pictures() -> None:
    task = box_task()
    kind = Detection()
    image, target = task.train[0]
    picture = Image.fromarray(np.asarray(image))
    drawn = kind.illustrate(picture, target, task.classes, 100)
    assert max(drawn.size) == 100
    assert kind.caption(target, task.classes).split()[1].rstrip(",") in task.classes
    assert np.asarray(drawn).tobytes() != np.asarray(picture.resize(drawn.size, Image.Resampling.NEAREST)).tobytes()


@pytest.mark.parametrize(("most", "expected"), [(0, {}), (8, {"train": 4, "test": 4}), (40, {"train": 30, "test": 10})])
def test_a_sample_takes_small_splits_whole(most: int, expected: dict[str, int]) -> None:
    splits = {
        name: Split([b""] * count, np.zeros(count, dtype=np.int64)) for name, count in (("train", 300), ("test", 10))
    }
    rows = choose_rows(splits, most)
    assert {name: len(own) for name, own in rows.items()} == expected
    assert all(own == sorted(set(own)) and own[-1] == len(splits[name]) - 1 for name, own in rows.items())


def test_a_sample_says_what_it_counted() -> None:
    report = make_task({"cat": 30, "dog": 30}, {"cat": 5, "dog": 5}).report(images=20)
    assert [split.opened for split in report.splits] == [10, 10]
    assert report.splits[0].classes == {"cat": 30, "dog": 30}, "labels are known without opening images"


class Counting(torch.utils.data.IterableDataset[Any]):
    read = 0

    def __iter__(self) -> Any:
        for number in range(6):
            Counting.read += 1
            yield draw(number), number % 2


def test_a_stream_is_not_read() -> None:
    task = Task.from_datasets(Counting(), Listed(), classes=["cat", "dog"])
    before = Counting.read
    report = task.report()
    assert Counting.read == before
    assert (report.splits[0].images, report.splits[0].opened) == (None, 0)
    assert "unknown number of train" in report.summary
    assert report.splits[1].opened == 4


class Listed(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        return draw(row), row % 2


def test_what_cannot_be_asked() -> None:
    task = make_task({"cat": 2, "dog": 2}, {"cat": 2})
    with pytest.raises(DataError, match="cannot open -1 images"):
        task.report(images=-1)
    with pytest.raises(DataError, match="opening images"):
        task.report(images=0, near=True)


def test_alike_pictures_are_those_that_look_alike() -> None:
    first = [look_at(draw(number, (64, 64))) for number in range(20)]
    second = [look_at(draw(number, (64, 64)).resize((40, 40))) for number in (3, 99, 7)]
    assert find_alike(first, second) == [(3, 0), (7, 2)]
    assert find_alike(first, first) == [], "equal pixels are told elsewhere"
    assert find_alike([], second) == []


def test_opening_images_advances_once_each() -> None:
    calls: list[int] = []
    make_task({"cat": 3, "dog": 3}, {"cat": 3}).report(advance=calls.append)
    assert sum(calls) == 9


def test_what_the_source_says_is_told(tmp_path: Path) -> None:
    task = replace(
        make_task({"cat": 3, "dog": 3}, {"cat": 3}),
        layout="a folder of class folders",
        passed_over={"hidden file": ("cat/._0.jpg", "dog/._1.jpg")},
        notes=("1 class folder is empty: hen",),
    )
    report = task.report(0)
    assert report.summary.endswith("6 train, 3 test images; 2 passed over")
    assert "passed over: 2, hidden file (cat/._0.jpg, dog/._1.jpg)" in str(report)
    assert report.layout == task.layout
    assert "1 class folder is empty: hen" in report.notes
    assert json.loads(json.dumps(report.as_dict()))["passed_over"] == {"hidden file": ["cat/._0.jpg", "dog/._1.jpg"]}


def test_the_layout_of_class_folders_is_known(tmp_path: Path) -> None:
    for place in ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        draw(len(place)).save(tmp_path / place)
    assert load_task(tmp_path).report(0).layout


def vector_task(kind: str, train: list[list[float]], test: list[list[float]]) -> Task:
    def split(values: list[list[float]], seed: int) -> Split:
        targets = [Vector(np.array(one, dtype=np.float64)) for one in values]
        return Split(
            [encode(draw(seed + n)) for n in range(len(values))], np.zeros(len(values), dtype=np.int64), targets
        )

    names = tuple(f"output {number}" for number in range(len(train[0])))
    return Task(TaskRecord(name="vectors", kind=kind, classes=names), split(train, 0), split(test, 500))


def test_numbers_have_ranges_and_some_are_beyond_them() -> None:
    task = vector_task("regression", [[1, 5], [2, np.nan], [4, 7]], [[3, 6], [9, np.nan]])
    for report in (task.report(0), task.report()):
        numbers = report.splits[0].numbers
        assert asdict(numbers["output 0"]) == {"known": 3, "least": 1, "median": 2, "largest": 4}
        assert numbers["output 1"].known == 2
        (finding,) = [one for one in report.findings if one.code == "out-of-range"]
        assert finding.text.startswith("1 image of test has a 'output 0' beyond those of train (1 to 4)")
        assert report.splits[0].classes is None


def test_labels_are_counted_in_images() -> None:
    report = vector_task("multilabel", [[1, 0], [1, 1], [0, np.nan]], [[1, 1]]).report()
    assert report.splits[0].classes == {"output 0": 2, "output 1": 1}


def test_findings_of_labels_are_of_labels_and_their_images() -> None:
    report = vector_task("multilabel", [[1, 1, 0]] * 10 + [[1, 0, 0]], [[1, 0, 0]] * 100).report(0)
    found = {one.code: one.text for one in report.findings}
    assert found["other-mix"].startswith("the labels have other shares in test than in train: 48% of its labels")
    assert found["not-trained"].startswith("the label 'output 2' has no images in the training images")
    assert "dominant" not in found, "labels do not exclude each other"
    report = vector_task("multilabel", [[1, 1]] * 10 + [[1, 0]] * 90, [[1, 1]]).report(0)
    found = {one.code: one.text for one in report.findings}
    assert found["uneven"].startswith("the labels are uneven: 'output 0' has 10 times the images of 'output 1'")


@pytest.mark.parametrize(("kind", "word"), [("multilabel", "label"), ("regression", "number")])
def test_targets_of_which_nothing_is_known_are_told_once(kind: str, word: str) -> None:
    report = vector_task(kind, [[1, 0], [2 if kind == "regression" else 0, 1], [np.nan, np.nan]], [[1, 0]]).report()
    assert [one.text for one in report.findings if one.code == "odd-targets"] == [
        f"1 image with no known {word}. (train row 2)"
    ]
    assert all(one.code != "empty" for one in report.findings)
    assert report.splits[0].empty == 0


@pytest.mark.real
def test_a_twin_is_found_among_real_photos(real_data: Callable[[str], Path]) -> None:
    report = load_task(real_data("caltech101")).report(near=True)
    assert [split.images for split in report.splits] == [1010, 505]
    assert not report.unreadable
    found = {finding.code: finding for finding in report.findings}
    assert "twice" not in found, "no image stands byte-identical in train and test"
    assert found["near"].examples == (str(Path("train/menorah/image_0015.jpg ~ test/menorah/image_0016.jpg")),)

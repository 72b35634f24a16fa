"""Segmentation data as people have it: folders, names, values, colours and sizes of masks, and everything wrong with them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.sources.base import Found, SourceOptions, read_source
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError, TrainingWarning
from modelpatch.tasks.segmentation import IGNORED, PixelMask

SIZE = (12, 8)
ORIENTATION = 0x0112
NAMES = ("background", "foreground")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask of stripes of the values."""
    rows = np.arange(size[1])[:, None] * len(values) // size[1]
    return np.broadcast_to(np.array(values)[rows], size[::-1]).copy()


def picture(file: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", size, "gray").save(file, exif=exif)


def mask(file: Path, values: Any = (0, 1), mode: type = np.uint8) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    array = values if isinstance(values, np.ndarray) else drawn(*values)
    Image.fromarray(array.astype(mode)).save(file)


def found(root: Path, **options: Any) -> Found:
    return read_source(root, SourceOptions(**options))[0]


def classes_of(read: Found, split: str = "train", row: int = 0) -> np.ndarray:
    target = (read.splits[split].targets or ())[row]
    assert isinstance(target, PixelMask)
    return np.asarray(target.read())


def pair(root: Path, values: Any = (0, 1), mode: type = np.uint8, name: str = "a") -> Path:
    picture(root / "images" / f"{name}.jpg")
    mask(root / "masks" / f"{name}.png", values, mode)
    return root


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_class_names_are_read_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    pair(tmp_path).joinpath("classes.txt").write_bytes("Hintergrund\r\nTür\r\n".encode(encoding))
    assert found(tmp_path).classes == ["Hintergrund", "Tür"]


def test_a_legend_without_a_class_is_refused(tmp_path: Path) -> None:
    pair(tmp_path).joinpath("class_dict.csv").write_text("name,r,g,b\n")
    with pytest.raises(DataError, match=r"class_dict\.csv has the columns .* and no row"):
        found(tmp_path)


def test_a_damaged_mask_that_states_a_huge_chunk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    monkeypatch.setattr(Image.Image, "__array_interface__", property(lambda _: (_ for _ in ()).throw(MemoryError)))
    with pytest.raises(DataError, match=r"a\.png cannot be read as a mask: MemoryError"):
        found(tmp_path)


# folders ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Mapping[str, tuple[str, str]]] = {  # of each split an image and its mask
    "labels": {
        "train": ("train/images/a.jpg", "train/labels/a.png"),
        "test": ("test/images/a.jpg", "test/labels/a.png"),
    },
    "splits inside": {
        "train": ("images/training/a.jpg", "annotations/training/a.png"),
        "validation": ("images/validation/a.jpg", "annotations/validation/a.png"),
    },
    "mmsegmentation": {
        "train": ("img_dir/train/a.jpg", "ann_dir/train/a.png"),
        "validation": ("img_dir/val/a.jpg", "ann_dir/val/a.png"),
    },
    "cityscapes": {
        "train": ("leftImg8bit/train/ulm/ulm_0_leftImg8bit.png", "gtFine/train/ulm/ulm_0_gtFine_labelIds.png"),
        "validation": ("leftImg8bit/val/bonn/bonn_0_leftImg8bit.png", "gtFine/val/bonn/bonn_0_gtFine_labelIds.png"),
    },
    "voc without lists": {"train": ("JPEGImages/a.jpg", "SegmentationClass/a.png")},
    "annotations": {"train": ("images/a.jpg", "annotations/a.png")},
    "imgs and gt": {"train": ("imgs/a.png", "gt/a_gt.png")},
    "capitals": {
        "train": ("Train/Images/a.JPG", "Train/Masks/a.png"),
        "test": ("Test/Images/a.JPG", "Test/Masks/a.png"),
    },
    "camvid": {"train": ("train/a.png", "trainannot/a.png"), "test": ("test/a.png", "testannot/a.png")},
    "camvid of kaggle": {
        "train": ("train/a.png", "train_labels/a_L.png"),
        "validation": ("val/a.png", "val_labels/a_L.png"),
    },
    "joined names": {"train": ("train_images/img_1.png", "train_masks/mask_1.png")},
    "suffixes": {"train": ("images/a.jpg", "masks/a-mask.png")},
    "fiftyone": {"train": ("data/a.jpg", "labels/a.png")},
    "pets": {"train": ("images/a.jpg", "annotations/trimaps/a.png")},
    "masks of all folders": {"train": ("images/day/a.jpg", "masks/a.png")},
    "carvana": {"train": ("train/a.jpg", "train_masks/a_mask.gif")},
    "unpacked": {"train": ("set/v1/images/a.jpg", "set/v1/masks/a.png")},
    "one folder": {"train": ("a.jpg", "a.png")},
    "one folder, suffix": {"train": ("a.png", "a_mask.png")},
    "one folder a split": {
        "train": ("train/a_sat.jpg", "train/a_mask.png"),
        "test": ("test/a_sat.jpg", "test/a_mask.png"),
    },
    "roboflow": {"train": ("train/a.jpg", "train/a_mask.png"), "validation": ("valid/a.jpg", "valid/a_mask.png")},
    "isic": {
        "train": ("ISIC2018_Task1_Training_Input/a.jpg", "ISIC2018_Task1_Training_GroundTruth/a_segmentation.png"),
        "test": ("ISIC2018_Task1_Test_Input/a.jpg", "ISIC2018_Task1_Test_GroundTruth/a_segmentation.png"),
    },
    "short names": {"train": ("train/img/a.jpg", "train/lbl/a.png"), "test": ("test/img/a.jpg", "test/lbl/a.png")},
    "frames": {
        "train": ("train_frames/a.jpg", "train_masks/a.png"),
        "validation": ("val_frames/a.jpg", "val_masks/a.png"),
    },
    "original": {"train": ("Original/a.jpg", "Ground truth/a.png")},
    "any names": {"train": ("x/a.jpg", "y/a.png")},
    "any names of splits": {"train": ("trainX/a.jpg", "trainY/a.png"), "test": ("testX/a.jpg", "testY/a.png")},
    "any names above splits": {
        "train": ("scans/train/a.jpg", "organs/train/a.png"),
        "test": ("scans/test/a.jpg", "organs/test/a.png"),
    },
    "any names below splits": {
        "train": ("train/scan/a.jpg", "train/organ/a_seg.png"),
        "test": ("test/scan/a.jpg", "test/organ/a_seg.png"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_found_where_people_keep_them(layout: str, tmp_path: Path) -> None:
    for image, label in LAYOUTS[layout].values():
        picture(tmp_path / image)
        mask(tmp_path / label)
    read = found(tmp_path, classes=NAMES)
    assert read.kind == "segmentation"
    assert {split: [str(one) for one in own.images] for split, own in read.splits.items()} == {
        split: [str(tmp_path / image)] for split, (image, _) in LAYOUTS[layout].items()
    }
    assert all((classes_of(read, split) == drawn(0, 1)).all() for split in read.splits)


def test_what_has_no_part_in_a_pair_is_passed_over_or_named(tmp_path: Path) -> None:
    pair(tmp_path)
    mask(tmp_path / "masks" / "b.png")
    picture(tmp_path / "preview.jpg")
    read = found(tmp_path, classes=NAMES)
    assert dict(read.passed_over) == {
        "picture outside of the folders of images and masks": ("preview.jpg",),
        "mask without an image": ("masks/b.png",),
    }
    picture(tmp_path / "images" / "c.jpg")
    with pytest.raises(DataError, match=r"has no mask for 1 of 2 images of train, first .*c\.jpg"):
        found(tmp_path)
    mask(tmp_path / "masks" / "c_mask.png")
    mask(tmp_path / "masks" / "c_label.png")
    with pytest.raises(DataError, match=r"c\.jpg has the masks .*c_label\.png and .*c_mask\.png"):
        found(tmp_path)


def test_a_split_of_images_alone_is_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "train/images/a.jpg")
    mask(tmp_path / "train/masks/a.png")
    picture(tmp_path / "test/images/b.jpg")
    read = found(tmp_path, classes=NAMES)
    assert list(read.splits) == ["train"]
    assert read.passed_over["picture of a split without masks"] == ("test/images/b.jpg",)


def test_names_of_classes_are_found_in_an_unpacked_folder(tmp_path: Path) -> None:
    pair(tmp_path / "set").joinpath("classes.txt").write_text("road\nsky")
    assert found(tmp_path).classes == ["road", "sky"]
    assert found(tmp_path).notes == ()


def test_folders_that_look_like_masks_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.jpg")
    mask(tmp_path / "y" / "a.png")
    assert found(tmp_path, classes=NAMES).notes == (
        "1 folder is read as masks, by its pictures' names and few colours: y of x",
    )
    assert found(tmp_path, kind="classification").classes == ["x", "y"]


@pytest.mark.parametrize(
    ("values", "size", "name"),
    [
        ((0, 1), (8, 12), "a.png"),
        ((3,), SIZE, "a.png"),
        ((0, 1), SIZE, "b.png"),
        (tuple(range(0, 240, 6)), (12, 40), "a.png"),
    ],
    ids=["another size", "one value", "another name", "many values"],
)
def test_classes_of_few_colours_are_not_taken_for_masks(values: Any, size: Any, name: str, tmp_path: Path) -> None:
    picture(tmp_path / "photo" / "a.jpg", (12, 40) if len(values) > 2 else SIZE)
    mask(tmp_path / "drawing" / name, drawn(*values, size=size))
    assert found(tmp_path).kind == "classification"


@pytest.mark.parametrize("names", [("cat", "dog"), ("mask", "no_mask"), ("with_mask", "without_mask")])
def test_classes_are_not_taken_for_masks(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        for number in range(2):
            picture(tmp_path / name / f"{number}.png")
    assert found(tmp_path).kind == "classification"


def test_of_the_masks_of_cityscapes_those_to_train_on_are_taken(tmp_path: Path) -> None:
    picture(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    for number, kind in enumerate(("color", "instanceIds", "labelIds", "labelTrainIds")):
        mask(
            tmp_path / f"gtFine/train/ulm/ulm_0_gtFine_{kind}.png", (0, 1) if kind == "labelTrainIds" else (number, 90)
        )
    read = found(tmp_path, classes=NAMES)
    assert (classes_of(read) == drawn(0, 1)).all()
    assert len(read.passed_over["mask without an image"]) == 3


# values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, NAMES, ("sky", "ground")])
@pytest.mark.parametrize(("values", "mode"), [((0, 255), np.uint8), ((0, 2**16 - 1), np.uint16), ((0, 1), bool)])
def test_the_foreground_of_a_binary_mask_is_class_1(values: Any, mode: type, names: Any, tmp_path: Path) -> None:
    pair(tmp_path, values, mode)
    if values == (0, 1) and names is None:
        names = NAMES
    read = found(tmp_path, classes=names)
    assert tuple(read.classes) == (names or NAMES)
    assert (classes_of(read) == drawn(0, 1)).all()


def test_255_is_ignored_beside_other_values_and_where_it_is_asked_for(tmp_path: Path) -> None:
    pair(tmp_path, (0, 1, 255))
    assert (classes_of(found(tmp_path, classes=NAMES)) == drawn(0, 1, IGNORED)).all()
    mask(tmp_path / "masks" / "a.png", (0, 255))
    with pytest.raises(DataError, match="'foreground' has no pixel in any mask"):
        found(tmp_path, classes=NAMES, ignore=255)


def test_as_many_values_as_names_are_theirs_in_order(tmp_path: Path) -> None:
    pair(tmp_path, (0, 128, 255))
    with pytest.raises(DataError, match="hold 0, 128, 255, and nothing says if 255 is a class"):
        found(tmp_path)
    read = found(tmp_path, classes=("a", "b", "c"))
    assert (classes_of(read) == drawn(0, 1, 2)).all()
    assert any("0 a, 128 b, 255 c" in note for note in read.notes)
    with pytest.warns(TrainingWarning, match="each value of its masks is one: 0, 128"):
        assert (classes_of(found(tmp_path, ignore=255)) == drawn(0, 1, IGNORED)).all()


def test_classes_without_pixels_are_an_error_or_a_warning(tmp_path: Path) -> None:
    for split, values in (("train", (0, 1, 2)), ("test", (0, 1))):
        picture(tmp_path / split / "images" / "a.jpg")
        mask(tmp_path / split / "masks" / "a.png", values)
    with pytest.warns(TrainingWarning, match="no pixel of the split 'test' has the class c"):
        found(tmp_path, classes=("a", "b", "c"))
    for names in (("a", "b", "c", "d"), ("a", "b", "c", "-", "e")):
        with pytest.raises(
            DataError, match=f"the class '{names[-1]}' has no pixel in any mask; masks hold the values 0, 1, 2"
        ):
            found(tmp_path, classes=names)
    with pytest.raises(DataError, match=r"a\.png holds the value 2, which stands for no class"):
        found(tmp_path, classes=NAMES)
    mask(tmp_path / "train" / "masks" / "a.png", (0, 1, 4))
    mask(tmp_path / "test" / "masks" / "a.png", (0, 1, 4))
    assert list(found(tmp_path, classes=("a", "b", "-", "-", "e")).classes) == ["a", "b", "e"]


def test_masks_of_16_bits_hold_any_value(tmp_path: Path) -> None:
    pair(tmp_path, (0, 1000, 2000), np.uint16)
    read = found(tmp_path, classes=("a", "b", "c"))
    assert (classes_of(read) == drawn(0, 1, 2)).all()
    with pytest.warns(TrainingWarning, match="0, 1000, 2000"):
        assert list(found(tmp_path).classes) == ["0", "1000", "2000"]
    (tmp_path / "masks" / "a.png").unlink()
    mask(tmp_path / "masks" / "a.tif", (0, 70_000), np.int32)
    with pytest.raises(DataError, match="value 70000; expected values up to 65535"):
        found(tmp_path)


@pytest.mark.parametrize("channels", [2, 4])
def test_masks_with_an_opacity_are_grey(channels: int, tmp_path: Path) -> None:
    values = np.repeat(drawn(0, 255)[..., None], channels, axis=2)
    values[..., -1] = 255
    pair(tmp_path, values)
    assert (classes_of(found(tmp_path)) == drawn(0, 1)).all()


def test_grey_masks_of_three_channels_are_grey(tmp_path: Path) -> None:
    pair(tmp_path, np.repeat(drawn(0, 255)[..., None], 3, axis=2))
    assert (classes_of(found(tmp_path)) == drawn(0, 1)).all()


def test_black_and_white_masks_in_jpeg_are_cut_and_others_refused(tmp_path: Path) -> None:
    size = (64, 64)
    picture(tmp_path / "images" / "a.jpg", size)
    file = tmp_path / "masks" / "a.jpg"
    mask(file, drawn(0, 255, size=size))
    read = found(tmp_path)
    assert (classes_of(read) == drawn(0, 1, size=size)).all()
    mask(file, drawn(3, 90, 160, size=size))
    with pytest.raises(DataError, match=r"a\.jpg is a JPEG, whose compression changes"):
        found(tmp_path)


def test_soft_edges_need_two_names(tmp_path: Path) -> None:
    values = np.full((40, 40), 255, dtype=np.uint8)
    values[:20] = 0
    values[19, :20] = np.arange(60, 80)
    picture(tmp_path / "images" / "a.jpg", (40, 40))
    mask(tmp_path / "masks" / "a.png", values)
    with pytest.raises(DataError, match="soft edges"):
        found(tmp_path)
    read = found(tmp_path, classes=NAMES)
    assert (classes_of(read) == (values >= 128)).all()
    assert any("cut at 128" in note for note in read.notes)


# colours ----------------------------------------------------------------------------------------------------

COLORS = np.array([(0, 0, 0), (250, 0, 10), (20, 30, 40)], dtype=np.uint8)
LEGENDS = {
    "class_dict.csv": "name,r,g,b\nsky,0,0,0\ncar,250,0,10\nroad,20,30,40\n",
    "classes.csv": "Class Name, Red, Green, Blue\nsky, 0, 0, 0\ncar, 250, 0, 10\nroad, 20, 30, 40\n",
    "colors.csv": "label,color\nsky,#000000\ncar,#fa000a\nroad,#141e28\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nsky:0,0,0::\ncar:250,0,10::\nroad:20,30,40::\n",
    "label_colors.txt": "0 0 0\tsky\n250 0 10\tcar\n20 30 40\troad\n",
}


@pytest.mark.parametrize("legend", LEGENDS)
@pytest.mark.parametrize("paletted", [False, True])
def test_colours_are_the_classes_of_a_legend(legend: str, paletted: bool, tmp_path: Path) -> None:
    pair(tmp_path, COLORS[drawn(1, 0, 2)])
    if paletted:
        indexed = Image.fromarray(drawn(7, 3, 9).astype(np.uint8)).convert("P")
        flat = np.zeros((256, 3), dtype=np.uint8)
        flat[[3, 7, 9]] = COLORS
        indexed.putpalette(flat.ravel().tolist())
        indexed.save(tmp_path / "masks" / "a.png")
    (tmp_path / legend).write_text(LEGENDS[legend])
    read = found(tmp_path)
    assert list(read.classes) == ["sky", "car", "road"]
    assert (classes_of(read) == drawn(1, 0, 2)).all()


def test_values_are_those_of_a_legend_or_its_rows(tmp_path: Path) -> None:
    pair(tmp_path, (0, 2, 1))
    (tmp_path / "labelmap.txt").write_text(LEGENDS["labelmap.txt"])
    read = found(tmp_path)
    assert (list(read.classes), (classes_of(read) == drawn(0, 2, 1)).all()) == (["sky", "car", "road"], True)
    assert any("rows of labelmap.txt" in note for note in read.notes)
    (tmp_path / "labelmap.txt").unlink()
    (tmp_path / "masks" / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n2, water\n1, tree\n")
    assert list(found(tmp_path).classes) == ["ground", "tree", "water"]


@pytest.mark.parametrize(
    ("legend", "message"),
    [
        ("", r"a\.png is a picture of shape \(8, 12, 3\).*class_dict\.csv"),
        (
            "name,r,g,b\nsky,0,0,0\ncar,250,0,10\n",
            r"a\.png holds the colour \(20, 30, 40\), which the list of colours lacks",
        ),
        ("name,r,g,b\nsky,0,0,0\ncar,0,0,0\n", r"class_dict\.csv: 'sky' and 'car' have one colour"),
        ("name,r,g,b\nsky,0,0,300\n", "three numbers from 0 to 255"),
        ("name,r,g,b\nsky,0,x,0\n", r"class_dict\.csv, row 1: '0 x 0' is no colour"),
        ("name,r,g,b\n,0,0,0\n", r"class_dict\.csv, row 1: it has no name"),
        ("name,r,g,b\na,0,0,0\na,1,0,0\n", "names 'a' twice"),
    ],
)
def test_colours_that_nothing_names_are_refused(legend: str, message: str, tmp_path: Path) -> None:
    pair(tmp_path, COLORS[drawn(0, 1, 2)])
    (tmp_path / "class_dict.csv").write_text(legend)
    with pytest.raises(DataError, match=message):
        found(tmp_path)


def test_voc_masks_of_cvat_have_its_legend(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.jpg")
    mask(tmp_path / "SegmentationClass" / "a.png", COLORS[drawn(0, 1, 2)])
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "default.txt").write_text("a\n")
    (tmp_path / "labelmap.txt").write_text(LEGENDS["labelmap.txt"])
    assert (classes_of(found(tmp_path)) == drawn(0, 1, 2)).all()


# sizes ------------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    pair(tmp_path, drawn(0, 1, size=(6, 4)))
    with pytest.raises(DataError, match=r"a\.png is 6 x 4 pixels, its image 12 x 8"):
        found(tmp_path, classes=NAMES)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_of_stored_pixels_is_turned_with_its_image(orientation: int, tmp_path: Path) -> None:
    """The mask of a second image, whose sides differ, says that all are of stored pixels."""
    values = drawn(0, 1)
    values[:, :3] = 1 - values[:, :3]
    pair(tmp_path, values)
    pair(tmp_path, (0, 1), name="b")
    picture(tmp_path / "images" / "b.jpg", orientation=6)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray((values * 200).astype(np.uint8)).convert("RGB").save(tmp_path / "images" / "a.png", exif=exif)
    (tmp_path / "images" / "a.jpg").unlink()
    shown = np.asarray(open_image(tmp_path / "images" / "a.png"))[..., 0] > 100
    assert (classes_of(found(tmp_path, classes=NAMES)) == shown).all()


def test_a_mask_of_the_picture_as_it_is_shown_stays(tmp_path: Path) -> None:
    pair(tmp_path, drawn(0, 1, size=SIZE[::-1]))
    picture(tmp_path / "images" / "a.jpg", orientation=6)
    read = found(tmp_path, classes=NAMES)
    assert (classes_of(read) == drawn(0, 1, size=SIZE[::-1])).all()
    assert not any("EXIF" in note for note in read.notes)


# anything ---------------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.integers(-2, 300), st.sampled_from(["name", "r", "g", "b", "sky", "", "#ff0000", "value", "class", '"'])
)


@given(
    values=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 255)), min_size=1, max_size=4),
    names=st.one_of(st.none(), st.lists(st.sampled_from("abcd-"), min_size=1, max_size=4, unique=True)),
    ignore=st.one_of(st.none(), st.sampled_from([0, 1, 255])),
    legend=st.lists(st.lists(CELLS, max_size=5), max_size=4),
)
@settings(max_examples=100)
def test_any_masks_are_read_or_refused_by_name(values: Any, names: Any, ignore: int | None, legend: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = pair(Path(folder), tuple(values))
        (root / "class_dict.csv").write_text("\n".join(",".join(map(str, row)) for row in legend))
        try:
            read = found(root, classes=names, ignore=ignore)
        except DataError as error:
            assert folder in str(error)  # noqa: PT017
        else:
            assert set(np.unique(classes_of(read))) <= {*range(len(read.classes)), IGNORED}


def test_masks_are_a_task_of_their_own(tmp_path: Path) -> None:
    for number in range(5):
        pair(tmp_path, (0, 255), name=str(number))
    task = load_task(tmp_path)
    assert (task.task.kind, task.classes, len(task.train), len(task.test)) == ("segmentation", NAMES, 4, 1)
    assert any("255 is 'foreground'" in note for note in task.notes)


def test_black_and_white_masks_of_a_data_set_are_background_and_foreground() -> None:
    samples = [(Image.new("RGB", SIZE), drawn(0, 255).astype(np.uint8))] * 4
    with pytest.warns(TrainingWarning, match="0 and 255 alone: 255 is 'foreground'"):
        task = Task.from_datasets(samples, samples, classes=NAMES)
    target = (task.train.targets or ())[0]
    assert isinstance(target, PixelMask)
    assert (np.asarray(target.read()) == drawn(0, 1)).all()
    samples[0] = (samples[0][0], drawn(0, 1, 255).astype(np.uint8))
    target = (Task.from_datasets(samples, samples, classes=NAMES).train.targets or ())[0]
    assert isinstance(target, PixelMask)
    assert (np.asarray(target.read()) == drawn(0, 1, IGNORED)).all()

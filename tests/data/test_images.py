"""Decoded images and the augmentation they are seen through."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import color_task
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import AUGMENTATIONS, Augmentation, choose_augmentation
from modelpatch.data.images import ImageStore, Reader, allocate
from modelpatch.data.splits import Split, count_workers
from modelpatch.data.task import load_task
from modelpatch.errors import DataError, TrainingError
from modelpatch.tasks.detection import Boxes
from modelpatch.tasks.kind import Target
from modelpatch.tasks.segmentation import PixelMask

GENEROUS = 2**30
PLAIN = Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.8)


def store(memory: int = GENEROUS, preprocessing: Preprocessing = PLAIN) -> ImageStore:
    return ImageStore(color_task().train, preprocessing, memory)


# memory -----------------------------------------------------------------------------------------------------


def test_a_tensor_beyond_the_budget_lies_on_disk_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[int] = []
    original = torch.frombuffer
    monkeypatch.setattr(
        torch, "frombuffer", lambda data, dtype: (made.append(len(data)), original(data, dtype=dtype))[1]
    )
    values = torch.randn(3, 5, 7)
    small = allocate((3, 5, 7), torch.float32, memory=values.nbytes)
    assert not made
    large = allocate((3, 5, 7), torch.float32, memory=values.nbytes - 1)
    assert made == [values.nbytes]
    assert list(tmp_path.iterdir()) == []
    for tensor in (small, large):
        tensor.copy_(values)
        assert torch.equal(tensor, values)


def test_a_disk_without_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TrainingError, match=r"the cache needs .* GB in .*lower views"):
        allocate((2**30, 2**30), torch.uint8, memory=1)
    assert list(tmp_path.iterdir()) == []


def test_images_on_disk_are_the_images_in_memory() -> None:
    rows = torch.arange(24)
    assert torch.equal(store(memory=1).plain(rows), store().plain(rows))


# plain ------------------------------------------------------------------------------------------------------


def test_plain_images_are_what_preprocessing_makes_of_the_files(image_folder: Path) -> None:
    split = load_task(image_folder).test
    decoded = ImageStore(split, PLAIN, GENEROUS)
    assert torch.equal(decoded.plain(torch.arange(len(split))), PLAIN(*split.images))
    assert torch.equal(decoded.labels, torch.from_numpy(split.labels))


def test_a_file_that_is_no_image_is_an_error_that_names_it(image_folder: Path) -> None:
    (image_folder / "train" / "red" / "000.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"000\.png cannot be read as an image"):
        ImageStore(load_task(image_folder).train, PLAIN, GENEROUS).plain(torch.arange(24))


# augmentation -----------------------------------------------------------------------------------------------


def test_the_full_area_unstretched_is_the_image_itself() -> None:
    images = torch.rand(5, 3, 16, 16) * 255
    views = Augmentation("whole")(images, 16, torch.Generator())
    assert torch.allclose(views, images, atol=1e-2)


def test_a_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = torch.rand(40, 3, 16, 16) * 255
    views = Augmentation("flip", flip=True)(images, 16, torch.Generator().manual_seed(0))
    same = (views - images).abs().amax((1, 2, 3)) < 0.01
    mirrored = (views - images.flip(3)).abs().amax((1, 2, 3)) < 0.01
    assert (same ^ mirrored).all()
    assert 8 < int(mirrored.sum()) < 32


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_follow_the_seed_and_stay_in_the_range_of_pixels(name: str) -> None:
    images, rows = store(), torch.arange(24)
    views = images.batch(rows, AUGMENTATIONS[name], (0, 1, 2)).images
    assert views.shape == (24, 3, 16, 16)
    assert torch.equal(views, images.batch(rows, AUGMENTATIONS[name], (0, 1, 2)).images)
    assert views.min() >= -1 - 1e-5  # mean and deviation are 0.5: values in [0, 255] become [-1, 1]
    assert views.max() <= 1 + 1e-5
    other = images.batch(rows, AUGMENTATIONS[name], (0, 1, 3)).images
    assert torch.equal(views, other) == (name == "none")


def test_every_image_of_a_batch_is_cropped_on_its_own() -> None:
    one = torch.rand(1, 3, 20, 20).expand(6, -1, -1, -1) * 255
    views = AUGMENTATIONS["light"](one, 16, torch.Generator().manual_seed(0))
    assert all(not torch.equal(views[0], view) for view in views[1:])


def test_auto_never_flips_small_pictures_and_does_flip_photos() -> None:
    small = color_task(pixels=32).train
    photo = Split([Image.new("RGB", (300, 200))], np.zeros(1, dtype=np.int64))
    assert choose_augmentation("auto", small) is AUGMENTATIONS["light"]
    assert choose_augmentation("auto", photo) is AUGMENTATIONS["standard"]
    assert choose_augmentation("none", photo) is AUGMENTATIONS["none"]
    assert not AUGMENTATIONS["light"].flip


# threads ----------------------------------------------------------------------------------------------------


class NoTorch(TorchDispatchMode):
    """A context in which no torch operation may run in this thread but the wrapping of an array, which computes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:
            return func(*args)
        raise AssertionError(f"{func} would start OpenMP helpers in a thread that decodes")


MASK = PixelMask(np.zeros((20, 30), dtype=np.uint8), np.arange(256, dtype=np.int16))
BOXES = Boxes(np.array([[1.0, 2.0, 9.0, 8.0]]), np.array([0]), np.array([False]))


@pytest.mark.parametrize("target", [None, MASK, BOXES], ids=["class", "mask", "boxes"])
def test_threads_decode_without_torch(target: Target | None) -> None:
    images, labels = [Image.new("RGB", (30, 20))], np.zeros(1, dtype=np.int64)
    reader = Reader(Split(images, labels, None if target is None else [target]), PLAIN, None)
    assert reader.threaded
    with NoTorch():
        assert reader.read(0)[0].shape == (3, 20, 20)


def test_processes_read_where_the_user_asks_for_them_or_threads_cannot() -> None:
    split = Split([Image.new("RGB", (8, 8))] * 1000, np.zeros(1000, dtype=np.int64))
    assert count_workers(split, threaded=True) == 0
    assert count_workers(split) >= 1
    split.workers = 3
    assert count_workers(split, threaded=True) == 3

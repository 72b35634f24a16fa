"""Pictures of one channel and of several, of more than 8 bits and of fractions."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.data.task import Task
from modelpatch.engine.engine import Engine
from modelpatch.errors import DataError, DepthWarning
from modelpatch.patch.contents import decode_patch, encode_patch
from modelpatch.train import fit

GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,), crop_pct=1.0)
SEVEN = Preprocessing(input_size=(7, 8, 8), mean=(0.5,) * 7, std=(0.25,) * 7, crop_pct=1.0)


def bands(height: int = 8, width: int = 8, count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, count), dtype=np.uint8)


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_grey_networks_see_grey_pictures_and_the_brightness_of_colours() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert torch.equal(GREY.decode(grey), torch.from_numpy(grey)[None])
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1] = 200
    assert GREY.decode(colour).unique().tolist() == [np.asarray(Image.fromarray(colour).convert("L"))[0, 0]]
    assert GREY(grey).shape == (1, 1, 8, 8)
    assert GREY(grey)[0, 0, 0, 5].item() == pytest.approx((5 / 255 - 0.5) / 0.25)


def test_bands_come_from_arrays_files_and_pages(tmp_path: Path) -> None:
    array = bands()
    np.save(tmp_path / "x.npy", array)
    pages = [Image.fromarray(array[..., band]) for band in range(7)]
    pages[0].save(tmp_path / "x.tiff", save_all=True, append_images=pages[1:])
    expected = torch.from_numpy(array).permute(2, 0, 1)
    for source in (
        array,
        array.transpose(2, 0, 1),
        tmp_path / "x.npy",
        str(tmp_path / "x.npy"),
        tmp_path / "x.tiff",
        saved(array),
    ):
        assert torch.equal(SEVEN.decode(source), expected)
    assert torch.equal(SEVEN.decode(SEVEN.open(array)), expected)


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    framing=st.sampled_from(["crop", "stretch", "squash", "border"]),
)
def test_bands_are_framed_as_each_would_be_alone(width: int, height: int, framing: str) -> None:
    seven = SEVEN.model_copy(update={"framing": framing, "crop_pct": 0.8, "fill": (3,) * 7})
    grey = GREY.model_copy(update={"framing": framing, "crop_pct": 0.8, "fill": (3,)})
    array = bands(height, width)
    whole = seven.decode(array)
    assert all(torch.equal(whole[band], grey.decode(np.ascontiguousarray(array[..., band]))[0]) for band in range(7))


@pytest.mark.parametrize(
    "source", [bands(count=5), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 7), np.uint8), b"no image"]
)
def test_other_counts_of_bands_are_refused(source: object) -> None:
    with pytest.raises(DataError, match=r"expected 7 channels|cannot be read"):
        SEVEN.decode(source)  # type: ignore[arg-type]


def test_values_of_more_bits_are_scaled_by_a_stated_range(tmp_path: Path) -> None:
    deep = (np.arange(64, dtype=np.uint16) * 65).reshape(8, 8)  # 12 bits: 0 to 4,095
    Image.fromarray(deep).save(tmp_path / "x.png")
    stated = GREY.model_copy(update={"value_range": (0.0, 4095.0)})
    assert torch.equal(
        stated.decode(tmp_path / "x.png")[0], torch.from_numpy((deep / 4095 * 255 + 1e-4).astype(np.uint8))
    )
    with pytest.warns(DepthWarning, match="state their range"):
        assert GREY.decode(tmp_path / "x.png").max() == 4095 // 257
    fractions = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    unit = GREY.model_copy(update={"value_range": (-1.0, 1.0)})
    for source in (fractions, saved(fractions)):
        assert unit.decode(source)[0, 0, 0] == 0
        assert unit.decode(source)[0, -1, -1] == 255
    with pytest.raises(DataError, match=r"float32 values, which have no range of their own\. State it"):
        GREY.decode(fractions)


def test_a_full_range_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(np.arange(65536, dtype=np.uint16).reshape(256, 256))


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": (1, 8, 8)},
        {"input_size": (0, 8, 8)},
        {"input_size": (3, 8, 9)},
        {"fill": (1, 2)},
        {"fill": (1, 2, 300)},
        {"value_range": (1.0, 1.0)},
        {"value_range": (0.0, float("nan"))},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_network_of_other_channels_is_loaded_trained_and_answers(channels: int) -> None:
    torch.manual_seed(0)
    backbone = load_backbone("timm:test_resnet", pretrained=False, in_chans=channels)
    assert backbone.preprocessing.channels == channels
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 36, channels), dtype=np.uint8)
    split = [(image.squeeze() if channels == 1 else image, number % 3) for number, image in enumerate(images)]
    task = Task.from_datasets(split, split, classes=["a", "b", "c"])
    patch = fit(backbone, task, "scale-bias", epochs=1, image_size=32, augment="light")
    assert patch.preprocessing.channels == channels
    assert decode_patch(encode_patch(patch)).preprocessing == patch.preprocessing
    assert Engine(backbone, {"a": patch})([image for image, _ in split])["a"].shape == (9, 3)


def test_a_module_with_a_grey_stem_is_seen_as_grey() -> None:
    module = timm.create_model("test_resnet", in_chans=1)
    assert load_backbone(module).preprocessing.channels == 1

"""From any image to the one tensor a backbone expects."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from modelpatch.backbone import preprocessing as preprocess
from modelpatch.backbone.preprocessing import LONGEST, MAX_PIXELS, Preprocessing, open_image
from modelpatch.errors import BackboneError, DataError

SMALL = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.8)


def gradient(width: int, height: int) -> np.ndarray:
    """An image whose red tells the column and whose green tells the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_values_become_value_minus_mean_over_deviation() -> None:
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = torch.tensor([(0 / 255 - 0.5) / 0.2, (128 / 255 - 0.4) / 0.3, (255 / 255 - 0.3) / 0.4])
    torch.testing.assert_close(SMALL.normalize(pixels), expected.view(1, 3, 1, 1).expand(1, 3, 2, 2))


def test_the_shorter_side_is_resized_and_the_centre_is_cropped() -> None:
    assert SMALL.resize_to == 8 / 0.8
    decoded = SMALL.decode(gradient(30, 10))  # the shorter side has its size already: only the crop acts
    assert decoded.shape == (3, 10, 10)
    assert decoded[0, 0].tolist() == list(range(10, 20))
    assert SMALL.center_crop(decoded)[0, 0].tolist() == list(range(11, 19))
    assert SMALL.center_crop(decoded)[1, :, 0].tolist() == list(range(1, 9))


@given(width=st.integers(1, 64), height=st.integers(1, 64), size=st.integers(1, 40), crop=st.floats(0.2, 1.0))
def test_every_image_becomes_a_tensor_of_the_backbones_size(width: int, height: int, size: int, crop: float) -> None:
    preprocessing = Preprocessing(input_size=(3, size, size), crop_pct=crop)
    assert preprocessing(gradient(width, height)).shape == (1, 3, size, size)


def test_every_kind_of_source_gives_the_same_tensor(tmp_path: Path) -> None:
    array = gradient(12, 10)
    image = Image.fromarray(array)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    batch = SMALL(array, image, encoded(image), path, str(path))
    assert batch.shape == (5, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert all(torch.equal(row, batch[0]) for row in batch)


def test_a_photograph_is_turned_upright() -> None:
    image = Image.fromarray(gradient(10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned a quarter to the right
    turned = Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))
    assert torch.equal(SMALL.decode(turned), torch.rot90(SMALL.decode(image), -1, (1, 2)))


def test_grey_palette_and_transparent_images_become_rgb() -> None:
    grey = Image.new("L", (10, 10), 100)
    assert SMALL.decode(grey).unique().tolist() == [100]
    assert SMALL.decode(Image.fromarray(gradient(10, 10)).convert("P")).shape == (3, 10, 10)
    assert SMALL.decode(Image.new("RGBA", (10, 10), (0, 0, 0, 0))).unique().tolist() == [255]
    assert SMALL.decode(Image.new("LA", (10, 10), (7, 255))).unique().tolist() == [7]
    assert SMALL.decode(Image.new("1", (10, 10), 1)).unique().tolist() == [255]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.full((10, 10), 0x8080, dtype=np.uint16))
    assert SMALL.decode(deep).unique().tolist() == [0x80]
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(open_image(every))[..., 0], every // 257)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1", "keyed"])
def test_strips_join_to_what_pillow_makes_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 17, 4), dtype=np.uint8))
    image = (
        noise
        if mode == "RGBA"
        else noise.convert("RGB").quantize(16)
        if mode in ("P", "keyed")
        else noise.convert(mode)
    )
    if mode == "keyed":
        image.info["transparency"] = 3
    monkeypatch.setattr(preprocess, "STRIP", 40)
    whole = image
    if mode in ("RGBA", "LA", "keyed"):
        whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    assert np.array_equal(np.asarray(open_image(image)), np.asarray(whole.convert("RGB")))


@pytest.mark.parametrize(
    "content", [b"", b"no image", encoded(Image.new("RGB", (64, 64)), "JPEG")[:300]], ids=["empty", "text", "truncated"]
)
def test_what_is_not_an_image_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        SMALL.decode(path)
    with pytest.raises(DataError):
        SMALL.decode(content)


def test_a_strip_that_would_grow_without_bound_is_refused() -> None:
    assert SMALL(Image.new("RGB", (LONGEST, 1))).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=f"more than {LONGEST} times as long as wide"):
        SMALL(Image.new("RGB", (1, LONGEST + 1)))


def test_a_missing_file_and_a_pixel_bomb_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="missing"):
        SMALL.decode(tmp_path / "missing.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot be read"):
        SMALL.decode(encoded(Image.new("L", (100, 100))))


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 7), np.uint8), np.zeros((4, 4, 3), np.complex64)])
def test_arrays_that_are_no_images_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(DataError):
        SMALL.decode(wrong)


def test_another_resolution_keeps_everything_else() -> None:
    larger = SMALL.with_image_size(16)
    assert larger.image_size == 16
    assert larger.model_dump(exclude={"input_size"}) == SMALL.model_dump(exclude={"input_size"})
    assert SMALL.with_image_size(None) is SMALL


def test_timms_own_evaluation_transform_gives_the_same_pixels() -> None:
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}
    config["crop_pct"] = 0.875
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = timm.data.create_transform(**config)(Image.fromarray(noise))
    torch.testing.assert_close(Preprocessing(**config)(noise)[0], expected)


@pytest.mark.parametrize("pixels", [0, -1, MAX_PIXELS + 1, 2.5, True, "16"])
def test_a_resolution_out_of_range_is_refused(pixels: Any) -> None:
    with pytest.raises(BackboneError, match=f"image size is {pixels!r}; expected .* 1 to {MAX_PIXELS}"):
        SMALL.with_image_size(pixels)


@pytest.mark.parametrize("wrong", [{"crop_pct": 0}, {"crop_pct": 1.5}, {"input_size": (1, 8, 8)}, {"mean": (0.5,)}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(**wrong)

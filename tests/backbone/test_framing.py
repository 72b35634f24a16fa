"""Pictures are seen as each library's own transform shows them: every config of timm, open_clip and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torchvision import models

from modelpatch.backbone.framing import Rounding, place
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.openclip import from_openclip
from modelpatch.backbone.sources.timm import from_timm, spread
from modelpatch.backbone.sources.torchvision import from_torchvision

timm_data: Any = timm.data
SIZES = ((97, 61), (60, 95), (80, 80))  # wide, tall, square
Case = tuple[Preprocessing, Callable[[Image.Image], Tensor]]


def picture(width: int, height: int) -> Image.Image:
    """Waves of several lengths, and noise, which no resize leaves as they are."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 127 * np.sin(columns / a + rows / b) for a, b in ((5, 11), (2.5, 40), (30, 3))]
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


PICTURES = [picture(*size) for size in SIZES]


def assert_same(case: Case, name: str) -> None:
    """Pixels that differ by at most 1 of 255."""
    seen, transform = case
    deviation = 255 * torch.tensor(seen.std).view(3, 1, 1)
    for image in PICTURES:
        difference = (seen(image)[0] - transform(image)).mul(deviation).abs().max()
        assert difference <= 1, f"{name}: {seen} differs by {difference:.1f} on {image.size}"


def distinct(cases: Iterator[tuple[str, Preprocessing, Any]]) -> dict[str, tuple[Preprocessing, Any]]:
    """One case of each framing, interpolation, fill and pair of sizes: means and deviations do not move pixels."""
    found: dict[Any, tuple[str, Preprocessing, Any]] = {}
    for name, seen, source in cases:
        key = (seen.framing, seen.interpolation, seen.fill, seen.image_size, seen.resize_to)
        found.setdefault(key, (name, seen, source))
    return {name: (seen, source) for name, seen, source in found.values()}


def timm_cases() -> Iterator[tuple[str, Preprocessing, Any]]:
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        config = timm_data.resolve_data_config(pretrained_cfg=cfg.to_dict())
        if config["input_size"][1] == config["input_size"][2]:
            yield name, from_timm(config), config
        else:
            with pytest.raises(ValidationError, match="expected squares"):
                from_timm(config)


@pytest.mark.slow
def test_every_config_of_timm_gives_timms_pixels() -> None:
    cases = distinct(timm_cases())
    assert {seen.framing for seen, _ in cases.values()} >= {"crop", "stretch"}
    for name, (seen, config) in cases.items():
        assert_same((seen, timm_data.create_transform(**config, is_training=False)), name)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.15, 1.0, 0.95, 0.9, 0.875, 0.77])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_every_mode_of_timm_gives_timms_pixels(crop_mode: str, crop_pct: float, interpolation: str) -> None:
    for size in (32, 47, 63):
        config: dict[str, Any] = {
            "input_size": (3, size, size),
            "crop_mode": crop_mode,
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
        }
        assert_same((from_timm(config), timm_data.create_transform(**config, is_training=False)), str(config))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_every_mode_of_open_clip_gives_its_pixels(resize_mode: str, interpolation: str) -> None:
    transform = pytest.importorskip("open_clip.transform")
    for size in (32, (47, 47)):
        config: dict[str, Any] = {"size": size, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "fill_color": 7}
        config |= {"interpolation": interpolation, "resize_mode": resize_mode}
        theirs = transform.image_transform_v2(transform.PreprocessCfg(**config), is_train=False)
        assert_same((from_openclip(config), theirs), str(config))


def test_every_tag_of_open_clip_gives_its_pixels() -> None:
    open_clip = pytest.importorskip("open_clip")
    transform = pytest.importorskip("open_clip.transform")

    def cases() -> Iterator[tuple[str, Preprocessing, Any]]:
        for model, tag in open_clip.list_pretrained():
            size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
            base = transform.PreprocessCfg(size=size)
            cfg = transform.merge_preprocess_dict(base, open_clip.get_pretrained_cfg(model, tag))
            yield f"{model}/{tag}", from_openclip(cfg), cfg

    for name, (seen, cfg) in distinct(cases()).items():
        assert_same((seen, transform.image_transform_v2(transform.PreprocessCfg(**cfg), is_train=False)), name)


def test_all_weights_of_torchvision_give_its_pixels() -> None:
    def cases() -> Iterator[tuple[str, Preprocessing, Any]]:
        for name in models.list_models(models):
            for weights in models.get_model_weights(name):
                transform = weights.transforms()
                yield str(weights), from_torchvision(transform), transform

    for name, (seen, transform) in distinct(cases()).items():
        assert seen.resize_to == transform.resize_size[0]
        assert_same((seen, transform), name)


@given(width=st.integers(8, 200), height=st.integers(8, 200), whole=st.integers(8, 64), cut=st.integers(0, 20))
def test_a_frame_lies_in_the_picture_unless_it_is_bordered(width: int, height: int, whole: int, cut: int) -> None:
    seen = max(1, whole - cut)
    for rounding in get_args(Rounding):
        at = place(width, height, whole, seen, "crop", rounding)
        assert min(at.width, at.height) == whole
        assert 0 <= at.left <= at.width - whole
        assert 0 <= at.top <= at.height - whole
    bordered = place(width, height, whole, seen, "border", "exact")
    assert max(bordered.width, bordered.height) == whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("framing", ["crop", "stretch", "squash", "border"])
def test_the_area_is_the_part_that_is_seen(framing: Any, size: tuple[int, int]) -> None:
    seen = Preprocessing(input_size=(3, 40, 40), crop_pct=0.8, framing=framing, fill=(9, 9, 9))
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([columns * 2, rows * 2, np.zeros_like(rows)], -1).astype(np.uint8)
    left, top, across, down = seen.framed_area(width, height)
    pixels = seen.center_crop(seen.decode(image))
    for y, x in ((20, 20), (5, 20), (20, 34)):
        where = left + (x + 0.5) * across / 40, top + (y + 0.5) * down / 40
        if 2 < where[0] < width - 2 and 2 < where[1] < height - 2:
            assert pixels[0, y, x].item() == pytest.approx(2 * (where[0] - 0.5), abs=5)
            assert pixels[1, y, x].item() == pytest.approx(2 * (where[1] - 0.5), abs=5)
        else:
            assert pixels[:, y, x].tolist() == [9, 9, 9]


def test_numbers_are_spread_over_other_channels() -> None:
    assert spread((1.0, 2.0, 3.0), 3) == (1, 2, 3)
    assert spread((1.0, 2.0, 3.0), 1) == (2,)
    assert spread((1.0, 2.0, 3.0), 5) == (1, 2, 3, 1, 2)

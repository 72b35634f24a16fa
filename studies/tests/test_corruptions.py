"""Corruptions: shapes, seeds, and how far they move an image as severity grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpatch.data.task import Split, Task
from modelpatch.errors import DataError
from modelpatch.tasks.record import TaskRecord
from modelpatch_studies.corruptions import KINDS, corrupt, corrupted

pytestmark = pytest.mark.slow

# constants that trade shifts for bending, and swapped pixels for blur
UNORDERED = {("elastic_transform", 32), ("elastic_transform", 224), ("glass_blur", 32)}
EVERY = pytest.mark.parametrize("kind", KINDS)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves and an edge."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(height, width)
    waves = [0.3 + 0.25 * np.sin(6 * (x * np.cos(a) + y * np.sin(a)) * np.pi + a) for a in random.uniform(0, 6, 3)]
    pixels = np.stack(waves, -1) + 0.2 * (x > 0.5)[..., None]
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def distance(kind: str, severity: int, side: int) -> float:
    """Root of the mean squared change over a picture or two."""
    pictures = [picture(side, side, seed) for seed in range(2 if side < 100 else 1)]
    changes = [corrupt(image, kind, severity, seed) / 255 - image / 255 for seed, image in enumerate(pictures)]
    return float(np.mean([np.sqrt(np.square(change).mean()) for change in changes]))


@EVERY
@settings(max_examples=6, deadline=None)
@given(height=st.integers(5, 90), width=st.integers(5, 90), severity=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_image_keeps_its_shape_and_follows_the_seed(
    kind: str, height: int, width: int, severity: int, seed: int
) -> None:
    image = picture(height, width, seed)
    before = image.copy()
    once, again = corrupt(image, kind, severity, seed), corrupt(image, kind, severity, seed)
    assert once.shape == (height, width, 3)
    assert once.dtype == np.uint8
    assert (once == again).all()
    assert (image == before).all()


@EVERY
@pytest.mark.parametrize("side", [32, 224])
def test_severity_moves_an_image_farther(kind: str, side: int) -> None:
    distances = [distance(kind, severity, side) for severity in range(1, 6)]
    assert min(distances) > 0.001
    if (kind, side) not in UNORDERED:
        assert distances[0] < distances[4]
        assert np.corrcoef(range(5), distances)[0, 1] > 0.6


@pytest.mark.parametrize(
    "kind", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "snow", "frost", "fog"]
)
def test_another_seed_is_another_corruption(kind: str) -> None:
    image = picture(32, 32)
    assert (corrupt(image, kind, 5, 0) != corrupt(image, kind, 5, 1)).any()


# what single kinds promise --------------------------------------------------------------------------------------------


def test_gaussian_noise_has_the_published_deviation() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert np.std(corrupt(grey, "gaussian_noise", 5) / 255.0) == pytest.approx(0.10, rel=0.05)


def test_shot_noise_has_the_variance_of_photons() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert np.var(corrupt(grey, "shot_noise", 5) / 255.0) == pytest.approx(128 / 255 / 50, rel=0.08)


def test_impulse_noise_hits_a_share_half_of_it_black() -> None:
    noisy = corrupt(np.full((64, 64, 3), 128, np.uint8), "impulse_noise", 5)
    assert np.mean(noisy != 128) == pytest.approx(0.07, abs=0.01)
    assert np.mean(noisy == 0) == pytest.approx(np.mean(noisy == 255), abs=0.01)


def test_contrast_keeps_the_mean_and_a_share_of_the_deviation() -> None:
    image = picture(32, 32)
    flat = corrupt(image, "contrast", 5)
    assert flat.mean() == pytest.approx(image.mean(), abs=0.5)
    assert flat.std((0, 1)) == pytest.approx(0.15 * image.std((0, 1)), rel=0.05)


def test_brightness_adds_to_the_largest_channel_and_keeps_the_hue() -> None:
    image = np.full((8, 8, 3), (100, 50, 0), np.uint8)
    assert corrupt(image, "brightness", 5)[0, 0] == pytest.approx([176.5, 88.25, 0], abs=1)  # 100 + 0.3 * 255
    assert corrupt(np.zeros((8, 8, 3), np.uint8), "brightness", 5)[0, 0] == pytest.approx([76.5] * 3, abs=1)


BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")


@pytest.mark.parametrize("kind", [*BLURS, "pixelate", "elastic_transform"])
def test_what_moves_pixels_alone_keeps_an_even_image(kind: str) -> None:
    even = np.full((40, 50, 3), (200, 100, 30), np.uint8)
    inner = corrupt(even, kind, 5)[8:-8, 8:-8].astype(int)
    assert np.abs(inner - even[0, 0].astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur"])
def test_blurs_spread_a_square_and_keep_its_light(kind: str) -> None:
    image = np.zeros((65, 65, 3), np.uint8)
    image[28:37, 28:37] = 250
    blurred = corrupt(image, kind, 3).astype(float)[..., 0]
    assert (blurred > 2).sum() > 81
    assert blurred.sum() == pytest.approx(image[..., 0].sum(), rel=0.15)


def test_motion_goes_along_a_line() -> None:
    """Of a small square the spread along the line is far above that across it."""
    image = np.zeros((129, 129, 3), np.uint8)
    image[62:67, 62:67] = 250
    blurred = corrupt(image, "motion_blur", 5).astype(float)[..., 0]
    y, x = np.nonzero(blurred > 1)
    across, along = np.linalg.eigvalsh(np.cov(np.stack([y, x]), aweights=blurred[y, x]))
    assert along > 4 * across


def test_glass_keeps_the_mean_and_moves_pixels_by_little() -> None:
    image = picture(64, 64)
    shuffled = corrupt(image, "glass_blur", 1)
    assert (shuffled != image).any()
    assert shuffled.mean() == pytest.approx(image.mean(), abs=2)
    blocks = [pixels.reshape(8, 8, 8, 8, 3).mean((1, 3)) for pixels in (shuffled.astype(float), image.astype(float))]
    assert np.abs(blocks[0] - blocks[1]).mean() < 8


# tasks ----------------------------------------------------------------------------------------------------------------


def make_task() -> Task:
    labels = np.array([0, 1] * 4)
    split = Split([picture(16, 16, seed) for seed in range(8)], labels)
    task = TaskRecord(name="waves", kind="classification", classes=("a", "b"), metric="top1")
    return Task(task, split, split.take(np.arange(4)))


def test_a_corrupted_task_is_one_like_any_other() -> None:
    data = make_task()
    foggy = corrupted(data, "fog", 3, seed=1)
    assert (foggy.classes, len(foggy.train), len(foggy.test)) == (data.classes, 8, 4)
    assert foggy.task.name == "waves, fog 3"
    assert foggy.facts["corruption"] == "fog"
    assert (foggy.train.labels == data.train.labels).all()
    first, again = foggy.train.images[0], corrupted(data, "fog", 3, seed=1).train.images[0]
    assert (first == again).all()
    assert (first != foggy.test.images[0]).any(), "the same image in another split has randomness of its own"
    assert foggy.train.digest not in (data.train.digest, corrupted(data, "fog", 3, seed=2).train.digest)
    assert len(foggy.subsample(4).train.images) == 4
    assert [image.tobytes() for image in foggy.test.images[1:3]] == [foggy.test.images[n].tobytes() for n in (1, 2)]
    held = data.with_validation(0.5, 0)
    assert len(corrupted(held, "snow").validation or ()) == 4


def test_a_patch_can_be_trained_on_a_corrupted_task() -> None:
    import modelpatch as mp

    backbone = mp.load_backbone("bundled:tiny")
    patch = mp.fit(
        backbone, corrupted(make_task(), "jpeg_compression"), mp.methods.LinearProbe(), epochs=1, image_size=32
    )
    assert patch.task.name == "waves, jpeg_compression 5"


@pytest.mark.parametrize(
    ("kind", "severity", "problem"),
    [("rain", 1, "there is no corruption 'rain'. Expected one of: gaussian_noise"), ("fog", 6, "the severity is 6")],
)
def test_what_is_no_corruption_is_refused(kind: str, severity: int, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        corrupt(picture(8, 8), kind, severity)
    with pytest.raises(DataError, match=problem):
        corrupted(make_task(), kind, severity)

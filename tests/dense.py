"""Made-up dense tasks: pictures of coloured squares with the class of every pixel, or with boxes around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.tasks.detection import Boxes
from modelpatch.tasks.record import TaskRecord
from modelpatch.tasks.segmentation import IGNORED, UNKNOWN, PixelMask

SHADES = ("ground", "red", "blue")


def mask_table(classes: int = 3) -> np.ndarray:
    """Values stand for themselves, 255 for nothing."""
    table = np.full(256, UNKNOWN, dtype=np.int16)
    table[:classes] = np.arange(classes)
    table[IGNORED] = IGNORED
    return table


def draw_scene(generator: np.random.Generator, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture (H, W, 3) with a red and a blue square on it, and its mask (H, W) with an edge that has no class."""
    image = generator.integers(90, 110, (pixels, pixels, 3), dtype=np.uint8)
    mask = np.zeros((pixels, pixels), dtype=np.uint8)
    side = pixels // 2
    for number, channel in ((1, 0), (2, 2)):
        top, left = generator.integers(0, pixels - side + 1, 2)
        image[top : top + side, left : left + side] = 20
        image[top : top + side, left : left + side, channel] = 230
        mask[top : top + side, left : left + side] = number
    mask[0, :] = IGNORED
    return image, mask


def square_task(count: int = 24, pixels: int = 16, seed: int = 0) -> Task:
    """Squares on a ground: a task that a decoder learns in a few epochs."""
    generator = np.random.default_rng(seed)
    table = mask_table()

    def split(rows: int) -> Split:
        scenes = [draw_scene(generator, pixels) for _ in range(rows)]
        masks = [PixelMask(mask, table) for _, mask in scenes]
        return Split([image for image, _ in scenes], np.zeros(rows, dtype=np.int64), masks)

    task = TaskRecord(name="squares", kind="segmentation", classes=SHADES, metric="miou")
    return Task(task, split(count), split(12))


def write_masks(root: Path, count: int = 12, pixels: int = 16) -> Path:
    """`train/` and `test/` with `images/` and `labels/`, and the classes' names."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            image, mask = draw_scene(generator, pixels)
            Image.fromarray(image).save(root / split / "images" / f"{number:02}.png")
            Image.fromarray(mask).save(root / split / "labels" / f"{number:02}.png")
    (root / "classes.txt").write_text("\n".join(SHADES) + "\n")
    return root


def box_task(count: int = 24, pixels: int = 32, seed: int = 0) -> Task:
    """The same squares with boxes around them."""
    generator = np.random.default_rng(seed)

    def split(rows: int) -> Split:
        scenes = [draw_scene(generator, pixels) for _ in range(rows)]
        return Split([image for image, _ in scenes], np.zeros(rows, dtype=np.int64), [boxes_of(m) for _, m in scenes])

    task = TaskRecord(name="boxes", kind="detection", classes=SHADES[1:], metric="map")
    return Task(task, split(count), split(8))


def boxes_of(mask: np.ndarray) -> Boxes:
    """The boxes around what a mask shows of each square."""
    corners, labels = [], []
    for number in (1, 2):
        rows, columns = np.nonzero(mask == number)
        if len(rows):
            corners.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            labels.append(number - 1)
    return Boxes(
        np.array(corners, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.zeros(len(labels), dtype=bool),
    )


def write_voc(root: Path, count: int = 6, pixels: int = 32) -> Path:
    """Pascal VOC's folders with squares, whose corners are counted from 1."""
    generator = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "test"):
        stems = [f"{split}{number}" for number in range(count)]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            image, mask = draw_scene(generator, pixels)
            Image.fromarray(image).save(root / "JPEGImages" / f"{stem}.png")
            found = boxes_of(mask)
            objects = [
                f"<object><name>{SHADES[label + 1]}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1:.0f}</xmin>"
                f"<ymin>{y0 + 1:.0f}</ymin><xmax>{x1:.0f}</xmax><ymax>{y1:.0f}</ymax></bndbox></object>"
                for (x0, y0, x1, y1), label in zip(found.corners, found.labels, strict=True)
            ]
            text = f"<annotation>{''.join(objects)}</annotation>"
            (root / "Annotations" / f"{stem}.xml").write_text(text)
    return root

"""Made-up tasks of several labels and of numbers: noisy squares whose colours are bright or dark on their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from conftest import CLASSES
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.tasks.vector import Vector

Read = Callable[[np.ndarray, np.ndarray], np.ndarray]  # the flags of the colours (3,) and the image, to targets


def _task(name: str, kind: str, classes: tuple[str, ...], read: Read, count: int, pixels: int, seed: int) -> Task:
    generator = np.random.default_rng(seed)

    def split(rows: int) -> Split:
        images, targets = [], []
        for _ in range(rows):
            flags = generator.random(3) < 0.5
            image = generator.integers(0, 100, (pixels, pixels, 3), dtype=np.uint8)
            image[:, :, flags] += 140
            images.append(image)
            targets.append(Vector(np.asarray(read(flags, image), dtype=np.float64)))
        return Split(images, np.array(kind_of(kind).list_strata(targets), dtype=np.int64), targets)

    return Task(TaskRecord(name=name, kind=kind, classes=classes), split(count), split(12))


def label_task(count: int = 40, pixels: int = 16, seed: int = 0, unknown: float = 0.0) -> Task:
    """The colours that are bright; a share of them is unknown."""
    hidden = np.random.default_rng(seed + 1)

    def read(flags: np.ndarray, image: np.ndarray) -> np.ndarray:
        return np.where(hidden.random(3) < unknown, np.nan, flags)

    return _task("lights", "multilabel", tuple(CLASSES), read, count, pixels, seed)


def number_task(count: int = 40, pixels: int = 16, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Task:
    """The brightness of the image, and that of its first colour, in a unit of one's choice."""

    def read(flags: np.ndarray, image: np.ndarray) -> np.ndarray:
        return scale * np.array([image.mean() / 255, image[:, :, 0].mean() / 255]) + shift

    return _task("brightness", "regression", ("whole", "first"), read, count, pixels, seed)

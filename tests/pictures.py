"""Small pictures in class folders, for tests of layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from modelpatch.data.task import Task

COLORS = {"cat": (200, 10, 10), "dog": (10, 10, 200), "bus": (10, 200, 10), "car": (90, 90, 9)}


def draw(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        color = next((color for name, color in COLORS.items() if name in str(file).lower()), (1, 2, 3))
        Image.new("RGB", (4, 4), color).save(file, format="PNG")


def write_classes(folder: Path, classes: Iterable[str] = ("cat", "dog"), count: int = 3) -> Path:
    draw(*(folder / name / f"{number}.png" for name in classes for number in range(count)))
    return folder


def counts(task: Task) -> dict[str, dict[str, int]]:
    """The number of images of each class by split."""
    found = {}
    for split, images in task.splits.items():
        found[split] = dict(Counter(task.classes[label] for label in images.labels))
    return found

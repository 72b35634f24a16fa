"""Several labels and numbers beside scikit-learn on the same frozen features of MobileNetV2 at 96 px, three seeds.

    composites   2 to 4 pictures of different classes of Caltech-101 in one, and the labels that it holds; error 1 - mAP
    angles       photos of imagenette turned by -45 to 45 degrees, without borders; the angle, error RMSE in degrees
    cells        blood cells of bccd: the number of red cells, counted from its boxes; error RMSE in cells

    python benchmarks/kinds.py --tasks composites --json benchmarks/results/kinds_composites.json

The baselines are one LogisticRegression a label, and Ridge, on standardised features; the strength of their regularisation is
the one that is best on a fifth of the training images, with which they are fitted again on all. Ours is the linear probe on
the same features, and ScaleBias, a patch that changes the backbone. Numbers of few images are fitted with early stopping.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, root_mean_squared_error
from sklearn.preprocessing import StandardScaler

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.train.evaluation import answers_of

PIXELS, SIDE, TILE = 96, 128, 64
CLASSES = 20  # of Caltech-101
STRENGTHS = tuple(10.0**power for power in range(-4, 5))
HELD = 0.2
STOPPING = {"validation": HELD, "early_stopping": 10}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "multilabel": {
        "linear-probe(head_lr=0.001)": {"epochs": 20, "batch_size": 64},
        "scale-bias": {"epochs": 12},
    },
    "regression": {
        "linear-probe(head_lr=0.001)": {"epochs": 60, "batch_size": 64, **STOPPING},
        "scale-bias": {"epochs": 12, **STOPPING},
    },
}
Example = tuple[Image.Image, Any]


class Examples(torch.utils.data.Dataset[Example]):
    """Pictures with labels, made beforehand."""

    def __init__(self, items: Sequence[Example]) -> None:
        self.items = items
        self.targets = [target for _, target in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Example:
        return self.items[row]


def read(path: Path, side: int) -> Image.Image:
    """The centre of a picture as a square."""
    picture = Image.open(path).convert("RGB")
    size = min(picture.size)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + size, top + size))


def composites(cache: Path, seed: int, counts: tuple[int, int]) -> mp.Task:
    """Grids of 2 x 2 places of which 2 to 4 hold a picture."""
    folder, made = unpack("caltech101", cache), []
    names = sorted(one.name for one in (folder / "train").iterdir() if one.is_dir())[:: 101 // CLASSES][:CLASSES]
    for split, count in zip(("train", "test"), counts, strict=True):
        generator = np.random.default_rng((seed, split == "test"))
        tiles = {name: [read(path, TILE) for path in sorted((folder / split / name).glob("*.jpg"))] for name in names}
        items = []
        for _ in range(count):
            grid = Image.new("RGB", (2 * TILE, 2 * TILE), (127, 127, 127))
            chosen = generator.choice(CLASSES, generator.integers(2, 5), replace=False)
            for place, index in zip(generator.permutation(4), chosen, strict=False):
                own = tiles[names[index]]
                grid.paste(own[generator.integers(len(own))], (TILE * int(place % 2), TILE * int(place // 2)))
            items.append((grid, [names[index] for index in chosen]))
        made.append(Examples(items))
    return mp.Task.from_datasets(*made, kind="multilabel", classes=names, name="composites")


def angles(cache: Path, seed: int, counts: tuple[int, int]) -> mp.Task:
    """Photos turned about their centres, cut so that no border shows."""
    folder, made = unpack("imagenette", cache), []
    for split, count in zip(("train", "test"), counts, strict=True):
        generator = np.random.default_rng((seed, split == "test"))
        files = generator.permutation(sorted((folder / split).rglob("*.jpg")))[:count]
        items = []
        for path in files:
            angle = float(generator.uniform(-45, 45))
            turned = read(path, 2 * SIDE).rotate(angle, Image.Resampling.BICUBIC)
            edge = round(SIDE * (1 - 2**-0.5))
            items.append((turned.crop((edge, edge, 2 * SIDE - edge, 2 * SIDE - edge)), angle))
        made.append(Examples(items))
    return mp.Task.from_datasets(*made, kind="regression", classes=["angle"], name="angles")


def cells(cache: Path, seed: int, counts: tuple[int, int]) -> mp.Task:
    """Pictures of blood cells with the number of red ones; the data set's own splits, whatever `counts` and seed are."""
    boxes = mp.load_task(unpack("bccd_voc", cache), kind="detection")
    red, made = boxes.classes.index("RBC"), []
    for split in (boxes.train, boxes.test):
        items = []
        for row in range(len(split)):
            image, target = split[row]
            picture = Image.open(str(image)).convert("RGB")
            items.append((picture, float((target.labels == red).sum())))  # type: ignore[union-attr]
        made.append(Examples(items))
    return mp.Task.from_datasets(*made, kind="regression", classes=["red cells"], name="cells")


TASKS: dict[str, Callable[[Path, int, tuple[int, int]], mp.Task]] = {
    "composites": composites,
    "angles": angles,
    "cells": cells,
}


def features_of(backbone: mp.Backbone, task: mp.Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frozen features and targets of the training and test images."""
    model = mp.methods.LinearProbe().build(backbone, 2)
    model.head = torch.nn.Flatten()
    seen = backbone.preprocessing.with_image_size(PIXELS)
    found = []
    for split in (task.train, task.test):
        read_features, targets = zip(*answers_of(model, split, seen), strict=True)
        found.append((torch.cat(read_features).numpy(), torch.cat(targets).numpy()))
    return found


def fit_baseline(kind: str, strength: float, x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit scikit-learn's model; return its answers as a function of features."""
    scaler = StandardScaler().fit(x)
    if kind == "regression":
        ridge = Ridge(alpha=1 / strength).fit(scaler.transform(x), y)
        return lambda given: ridge.predict(scaler.transform(given)).reshape(len(given), -1)
    models = [LogisticRegression(C=strength, max_iter=300).fit(scaler.transform(x), column) for column in y.T]
    return lambda given: np.stack([one.predict_proba(scaler.transform(given))[:, 1] for one in models], 1)


def error_of(kind: str, answers: np.ndarray, targets: np.ndarray) -> float:
    """1 - mAP, or the root of the mean squared error."""
    if kind == "regression":
        return float(root_mean_squared_error(targets, answers))
    return 1 - float(average_precision_score(targets, answers, average="macro"))


def baseline(kind: str, sets: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> tuple[float, float]:
    """The test error of the baseline, and the strength of its regularisation."""
    (x, y), (test_x, test_y) = sets
    rows = np.random.default_rng(seed).permutation(len(x))
    held, kept = rows[: int(HELD * len(x))], rows[int(HELD * len(x)) :]
    tried = {
        strength: error_of(kind, fit_baseline(kind, strength, x[kept], y[kept])(x[held]), y[held])
        for strength in STRENGTHS
    }
    best = min(tried, key=lambda strength: tried[strength])
    return error_of(kind, fit_baseline(kind, best, x, y)(test_x), test_y), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=3, help="settings were chosen on seeds 0 to 2")
    parser.add_argument("--images", default="600,300", help="of training and test")
    asked = parser.parse_args()
    train, test = map(int, asked.images.split(","))
    backbone, rows = mp.load_backbone(mobilenet()), []
    for name in asked.tasks.split(","):
        errors: dict[str, list[float]] = {}
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            task = TASKS[name](asked.cache, seed, (train, test))
            error, strength = baseline(task.task.kind, features_of(backbone, task), seed)
            errors.setdefault("scikit-learn", []).append(error)
            for method, own_settings in SETTINGS[task.task.kind].items():
                patch = mp.fit(backbone, task, method, image_size=PIXELS, augment="none", seed=seed, **own_settings)
                own = 1 - patch.metrics["test_map"] if task.task.kind == "multilabel" else patch.metrics["test_rmse"]
                errors.setdefault(method, []).append(own)
            print(
                name, seed, {way: round(found[-1], 4) for way, found in errors.items()}, f"C={strength:g}", flush=True
            )
        base = statistics.fmean(errors["scikit-learn"])
        for way, found in errors.items():
            spread = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
            rows.append(
                (name, way, round(statistics.fmean(found), 4), round(spread, 4), statistics.fmean(found) <= base)
            )
    columns = ("task", "method", "error", "standard error", "no worse than scikit-learn")
    report("several labels and numbers", columns, rows, asked.json)


if __name__ == "__main__":
    main()

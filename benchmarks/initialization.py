"""What masks need of the network below them: Piggyback on one architecture with three kinds of weights.

    imagenet    the real ImageNet MobileNetV2
    other       the same network, trained here from random weights on another data set (`--other`, CIFAR-10 photos)
    random      the same network, never trained

The paper's claim is that the error falls from random over other to ImageNet weights, and that even random ones are far
better than chance (Mallya et al., *Piggyback*, ECCV 2018, on the initialisation of the backbone). The linear probe on the
same weights says how much of it is the masks' doing. Same steps, seeds and test images for all.

    python benchmarks/initialization.py --json benchmarks/results/initialization.json
    python benchmarks/initialization.py --images 90 --other-images 200 --epochs 1 --other-epochs 1 --seeds 1 --pixels 32
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelpatch as mp
from common import SHARED, mobilenet, report, unpack
from modelpatch.data.task import Task
from modelpatch_studies.backbones import retrained, untrained

METHODS = ("linear-probe", "piggyback(lr=0.0003)", "piggyback(lr=0.0003,norms=trained)")
COLUMNS = ("weights", "method", "top-1", "standard error", "error", "chance")


def pretrained_on(data: Task, start: mp.Backbone, **settings: Any) -> mp.Backbone:
    """The network with all of its weights trained on another task from where it is; its own classifier stays."""
    return retrained(start, mp.fit(start, data, mp.methods.FullFinetune(lr=1e-3, statistics="learned"), **settings))


def study(
    backbones: Mapping[str, mp.Backbone], data: Task, methods: Sequence[str] = METHODS, **settings: Any
) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for each kind of weights and method; accuracies in [0, 1]."""
    rows: list[tuple[Any, ...]] = []
    for name, backbone in backbones.items():
        result = mp.compare(backbone, data, methods, **settings)
        if result.skipped:
            raise SystemExit(f"{name}: {result.skipped}")
        rows += [
            (name, row.method, row.top1, row.top1_error or 0.0, 1 - row.top1, 1 / len(data.classes))
            for row in result.rows
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gtsrb", help="what the masks are trained on")
    parser.add_argument("--other", default="cifar10_full", help="what the other weights are trained on")
    parser.add_argument("--images", type=int, help="of the task; by default all")
    parser.add_argument("--other-images", type=int, help="by default all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--other-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data, other = (load(name, given.cache, count) for name, count in
                   ((given.task, given.images), (given.other, given.other_images)))  # fmt: skip
    imagenet = mp.load_backbone(mobilenet())
    random = untrained(imagenet)
    settings = {"image_size": given.pixels, "progress": True}
    backbones = {
        "imagenet": imagenet,
        "other": pretrained_on(other, random, epochs=given.other_epochs, batch_size=128, **settings),
        "random": random,
    }
    rows = study(backbones, data, epochs=given.epochs, seeds=given.seeds, **settings)
    title = f"{data.task.name} at {given.pixels} px, {given.epochs} epochs; other: {other.task.name}"
    report(title, COLUMNS, rows, given.json)


def load(name: str, cache: Path, images: int | None) -> Task:
    """A real task by its name, from its archive or its folder, with a sample of its training images if a number is given."""
    folder = SHARED / "data" / name
    task = mp.load_task(str(folder if folder.is_dir() else unpack(name, cache)))
    return task if images is None else task.subsample(images)


if __name__ == "__main__":
    main()

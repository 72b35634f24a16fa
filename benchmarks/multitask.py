"""Two tasks on one MobileNetV2, trained together: what a private scale and bias gains over private heads alone.

    heads         all weights shared, a head a task
    scale-bias    the same, with a scale and a bias of every BatchNorm layer for each task
    independent   a network a task, trained alone as `scale-bias` is

Statistics of BatchNorm stay the base's: learned ones did worse on held-out images after so few epochs.

Mudrakarta et al., *K for the Price of 1* (ICLR 2019), section 5.4. At each of `--rates`, the learning rates of the shared
weights, all have the same batches and seeds, and make `--epochs` passes over all images; `numbers` are all that the two tasks
need, statistics included. `gain` is what `scale-bias` gains over `heads`, seed by seed. With `--held-out` a quarter of the
training images takes the place of the test images: choose rates and epochs there.

    python benchmarks/multitask.py --json benchmarks/results/multitask.json
    python benchmarks/multitask.py --images 60 --epochs 1 --seeds 1 --pixels 32
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.data.task import Task
from modelpatch.recipes import fit_multitask

WAYS = {"heads": "linear-probe", "scale-bias": "scale-bias(lr=0.001)"}
INDEPENDENT = "independent"


def train(backbone: mp.Backbone, tasks: Sequence[Task], **settings: Any) -> dict[str, tuple[list[float], int]]:
    """By way: the test accuracies of the tasks in percent, and the numbers that they need together."""
    results: dict[str, tuple[list[float], int]] = {}
    for way, private in WAYS.items():
        together = fit_multitask(backbone, tasks, private, progress=True, **settings)
        results[way] = [100 * patch.metrics["test_top1"] for patch in together.patches.values()], together.numbers
    alone = [fit_multitask(backbone, [task], WAYS["scale-bias"], progress=True, **settings) for task in tasks]
    results[INDEPENDENT] = [100 * one.top1 for one in alone], sum(one.numbers for one in alone)
    return results


def held_out(task: Task) -> Task:
    """The task with a quarter of its training images in the place of its test images."""
    split = task.with_validation(0.25, seed=0)
    assert split.validation is not None
    return replace(split, test=split.validation, validation=None)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; NaN for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(rate: float, runs: Sequence[dict[str, tuple[list[float], int]]]) -> list[tuple[Any, ...]]:
    """A row a way at this rate, then the gain: means over the runs and their standard errors."""
    rows: list[tuple[Any, ...]] = []
    fewest = runs[0]["heads"][1]
    for way, (_, numbers) in runs[0].items():
        columns = [*zip(*(run[way][0] for run in runs), strict=True), [statistics.fmean(run[way][0]) for run in runs]]
        figures = [figure for column in columns for figure in spread(column)]
        rows.append((f"{way}, {rate:g}", *figures, numbers, 100 * (numbers / fewest - 1)))
    gains = [
        [after - before for after, before in zip(run["scale-bias"][0], run["heads"][0], strict=True)] for run in runs
    ]
    columns = [*zip(*gains, strict=True), [statistics.fmean(gain) for gain in gains]]
    more = runs[0]["scale-bias"][1] - fewest
    rows.append((f"gain, {rate:g}", *(f for column in columns for f in spread(column)), more, 100 * more / fewest))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["imagenette", "gtsrb"])
    parser.add_argument("--images", type=int, default=1200, help="Training images of each task.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4], help="Of the shared weights.")
    parser.add_argument("--held-out", action="store_true", help="Measure on a quarter of the training images.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    tasks = [mp.load_task(unpack(name, given.cache)).subsample(given.images) for name in given.tasks]
    tasks = [held_out(task) for task in tasks] if given.held_out else tasks
    backbone = mp.load_backbone(mobilenet())
    rows: list[tuple[Any, ...]] = []
    for rate in given.rates:
        settings = {"epochs": given.epochs, "image_size": given.pixels, "shared": f"full-finetune(lr={rate})"}
        rows += table(rate, [train(backbone, tasks, seed=seed, **settings) for seed in range(given.seeds)])
    names = [f"{name}{more}" for name in (*given.tasks, "mean") for more in (" top-1", " error")]
    title = f"{len(tasks)} tasks, {given.pixels} px, {given.epochs} epochs, {given.seeds} seeds; error: of the mean"
    report(title, ("way", *names, "numbers", "% more"), rows, given.json)


if __name__ == "__main__":
    main()

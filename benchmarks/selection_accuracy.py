"""What selection gains: `select` against linear probe and full fine-tuning with the same epochs, test images, three seeds.

Birds and street signs, 600 training images each, on the ImageNet MobileNetV2; the seed moves the sample of images, the folds
and the training. Also draws the profile of every task, and active learning on CIFAR-10 by margin and at random.

    python benchmarks/selection_accuracy.py --tasks gtsrb --stages --folds 3 --out OUT
    python benchmarks/selection_accuracy.py --tasks cub80_2010 --stages --folds 4 --halving 3 --same-steps --rates 1e-4 \
        --rules code --out OUT
    python benchmarks/selection_accuracy.py --images 90 --epochs 1 --seeds 1 --folds 2 --pixels 32 --among blocks.6.0
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import modelpatch as mp
from common import SHARED, mobilenet, report, unpack
from modelpatch.data.task import Task
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.report.search import plot_curves
from modelpatch.report.selection import plot_order, plot_profile
from modelpatch.select import profile
from modelpatch.select.active import simulate
from modelpatch.select.greedy import Greedy, select
from modelpatch.select.study import Candidate, best, describe, open_study, score_by_halving, units

TASKS = {"cub80_2010": 96, "gtsrb": 64}  # pixels
BASELINES = ("linear-probe", "full-finetune")
RULES = {"paper": Greedy(), "code": Greedy(rule="code")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--pixels", type=int, help="for all tasks; by default each has its own")
    parser.add_argument("--among", help="comma-separated blocks to choose among; by default all")
    parser.add_argument("--stages", action="store_true", help="choose whole stages instead of blocks")
    parser.add_argument("--max-blocks", type=int, help="by default any number")
    parser.add_argument(
        "--halving", type=int, default=0, help="train all for a few epochs, the best of so many for more"
    )
    parser.add_argument("--same-steps", action="store_true", help="candidates take as many steps on folds as the patch")
    parser.add_argument("--no-profile", action="store_true", help="draw no profile")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--method", default="subset")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        help="learning rates to choose among on the folds of the first seed: for the method by its best single stage, for "
        "full fine-tuning as a whole; one alone is taken; by default each has its own",
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--labels", type=int, nargs="+", help="of the simulation on CIFAR-10, which runs if they are given"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-selection")
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    backbone = mp.load_backbone(mobilenet())
    rows: list[tuple[Any, ...]] = []
    for name in given.tasks:
        rows += _compare(backbone, name, given)
    if rows:
        columns = ("task", "method", "test top-1", "standard error", "each seed", "blocks of each seed")
        title = f"{given.images} training images, {given.epochs} epochs, {given.seeds} seeds"
        report(title, columns, rows, given.out / "accuracy.json")
    if given.labels:
        _simulate(backbone, given)


def _compare(backbone: mp.Backbone, name: str, given: argparse.Namespace) -> list[tuple[Any, ...]]:
    rules = {f"select, the {rule}'s rule": RULES[rule] for rule in given.rules}
    top1s: dict[str, list[float]] = {method: [] for method in (*BASELINES, *rules)}
    blocks: dict[str, list[str]] = {method: [] for method in top1s}
    folder = unpack(name, given.cache)
    among = tuple(given.among.split(",")) if given.among else ()
    shared = {
        "workers": given.workers,
        "trials": given.out / f"{name}.trials.jsonl",
        "same_steps": given.same_steps,
    }
    settings: dict[str, Any] = {"epochs": given.epochs, "image_size": given.pixels or TASKS[name]}
    first = mp.load_task(folder, seed=0).subsample(given.images, 0)
    method, full = _choose_rates(backbone, first, given, seed=0, **shared, **settings)
    methods = {"linear-probe": make_method("linear-probe"), "full-finetune": full}
    for seed in range(given.seeds):
        data = mp.load_task(folder, seed=seed).subsample(given.images, seed)
        settings["seed"] = seed
        if seed == 0 and not among and not given.no_profile:
            plot_profile(
                profile(backbone, data, method, folds=given.folds, halving=given.halving, **shared, **settings),
                given.out / f"{name}.png",
            )
        for baseline in BASELINES:
            top1s[baseline].append(mp.fit(backbone, data, methods[baseline], **settings).metrics["test_top1"])
        for rule, greedy in rules.items():
            chosen = select(
                backbone,
                data,
                method,
                greedy=replace(greedy, candidates=among, stages=given.stages, halving=given.halving),
                max_blocks=given.max_blocks,
                folds=given.folds,
                **shared,
                **settings,
            )
            top1s[rule].append(chosen.patch.metrics["test_top1"])
            blocks[rule].append(describe(backbone, [b.name for b in backbone.chain.blocks if b.name in chosen.blocks]))
            plot_order(chosen, given.out / f"{name}-{greedy.rule}-seed{seed}.png")
    return [
        (
            name,
            method,
            f"{100 * statistics.fmean(values):.1f}",
            f"{100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else "",
            " ".join(f"{100 * value:.1f}" for value in values),
            "; ".join(blocks[method]),
        )
        for method, values in top1s.items()
    ]


def _choose_rates(
    backbone: mp.Backbone, data: Task, given: argparse.Namespace, **options: Any
) -> tuple[Method, Method]:
    """The method and full fine-tuning at the rates whose trials do best on held-out training images."""
    method, full = make_method(given.method), make_method("full-finetune")
    if not given.rates:
        return method, full
    if len(given.rates) == 1:
        return replace(method, lr=given.rates[0]), replace(full, lr=given.rates[0])
    with open_study(backbone, data, title="rates", folds=given.folds, **options) as study:
        stages = [
            Candidate.of(replace(method, lr=rate), stage)
            for rate in given.rates
            for stage in units(backbone, stages=True)
        ]
        scores, _ = score_by_halving(study, stages, given.halving, "rates by stage")
        whole = [Candidate(f"full at {rate:g}", ("all",), replace(full, lr=rate)) for rate in given.rates]
        every = study.score(whole, title="rates of all")
    chosen = stages[best(scores, [True] * len(scores)) or 0].method
    kept = whole[best(every, [True] * len(every)) or 0].method
    print(f"{data.task.name}: {method.name} at {chosen.lr:g}, full fine-tuning at {kept.lr:g}", flush=True)
    return chosen, kept


def _simulate(backbone: mp.Backbone, given: argparse.Namespace) -> None:
    """Margins against random choice on CIFAR-10, a pool of twice the last number of labels, 2,000 test images."""
    data = mp.load_task(SHARED / "data" / "cifar10_full", name="cifar10").subsample(2 * given.labels[-1])
    data = _fewer_test_images(data, 2000)
    curves = simulate(
        backbone,
        data,
        given.method,
        labels=given.labels,
        seeds=given.seeds,
        rounds=given.out / "cifar10.rounds.jsonl",
        epochs=given.epochs,
        image_size=given.pixels or 64,
        progress=True,
    )
    plot_curves(curves, given.out / "cifar10-labels.png")
    rows = [
        (count, *(f"{100 * curves.mean(name)[n]:.1f} ± {100 * curves.error(name)[n]:.1f}" for name in curves.top1s))
        for n, count in enumerate(curves.labels)
    ]
    report("CIFAR-10, test top-1", ("labels", *curves.top1s), rows, given.out / "cifar10-labels.json")


def _fewer_test_images(data: Task, count: int) -> Task:
    rows = np.sort(np.random.default_rng(0).permutation(len(data.test))[:count])
    return replace(data, test=data.test.take(rows))


if __name__ == "__main__":
    main()

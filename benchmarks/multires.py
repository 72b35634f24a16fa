"""One MobileNetV2 at three resolutions: what a private scale and bias gains, and what a cascade over them saves.

    sharing   a private scale and bias for each resolution, beside sharing everything and beside independent models: test
              top-1 at every resolution and on average, over several seeds
    cascade   of the private patches of every seed: top-1 and multiply-adds an image, thresholds from held-out images, by the
              paper's rule (the smallest that hold there), and by those that hold with a standard error to spare

A fifth of the training images is held out: it chooses the epoch, and sets the thresholds. The paper's claims: private is at
least as good as shared at every resolution, most so at the lowest, and the cascade saves 15.2 % at equal accuracy (Mudrakarta
et al., *K for the Price of 1*; Streeter, *Approximation Algorithms for Cascading Prediction Models*).

    python benchmarks/multires.py --json benchmarks/results/multires.json
    python benchmarks/multires.py --images 90 --epochs 1 --seeds 1 --resolutions 32,48 --sharing private,shared
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.data.task import Task
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.recipes.cascading import CascadeResult, Figures
from modelpatch.recipes.sharing import SharingComparison, compare_sharing

HELD_OUT = 0.2
RULES: dict[str, dict[str, Any]] = {
    "paper's rule": {"caution": 0.0},
    "cautious": {},
    "cautious, fitted": {"confidence": "fitted"},
}
CASCADE = (
    "seed",
    "of",
    "stages",
    "held-out top-1",
    "test top-1",
    "M multiply-adds",
    "saved %",
    "points gained on test",
)


def sharing_rows(comparison: SharingComparison) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: test top-1 in percent with standard errors, trained parameters."""
    header = [
        "own",
        *(name for pixels in comparison.resolutions for name in (f"{pixels} px", f"± {pixels}")),
        "mean",
        "±",
    ]
    rows = [
        [
            row.sharing,
            *(100 * value for mean in (*row.top1.values(), row.mean) for value in (mean.value, mean.error or 0.0)),
            row.parameters,
        ]
        for row in comparison.rows
    ]
    return [*header, "parameters"], rows


def cascade_rows(results: Sequence[Mapping[str, CascadeResult]]) -> list[tuple[Any, ...]]:
    """A row of `CASCADE` for the best patch of every seed and for a cascade by each of `RULES`, and each rule's means."""
    rows: list[tuple[Any, ...]] = []
    for seed, by_rule in enumerate(results):
        first = next(iter(by_rule.values()))
        best = next(single for single in first.singles if single.name == first.reference)
        rows.append((seed, "best alone", best.name, *_figures(best.validation, best.test, best.test)))
        for rule, result in by_rule.items():
            rows.append((seed, rule, " -> ".join(result.order), *_figures(result.validation, result.test, best.test)))
    for rule in RULES:
        own = [row[3:] for row in rows if row[1] == rule]
        rows.append(("mean", rule, "", *(statistics.fmean(column) for column in zip(*own, strict=True))))
    return rows


def _figures(held: Figures, test: Figures, reference: Figures) -> tuple[float, ...]:
    """The last columns of `CASCADE`."""
    saved, gained = 100 * (1 - test.macs / reference.macs), 100 * (test.top1 - reference.top1)
    return 100 * held.top1, 100 * test.top1, test.macs / 1e6, saved, gained


def study(
    backbone: mp.Backbone, data: Task, resolutions: Sequence[int], sharings: Sequence[str], **settings: Any
) -> tuple[SharingComparison, list[dict[str, CascadeResult]]]:
    """The comparison, and cascades by all of `RULES` over the private patches of every seed."""
    comparison = compare_sharing(backbone, data, resolutions, sharings, validation=HELD_OUT, **settings)
    results = []
    for run in comparison.runs["private"]:
        named = {f"{pixels} px": patch for pixels, patch in run.patches.items()}
        results.append({rule: mp.cascade(run.backbone, named, data, **given) for rule, given in RULES.items()})
    return comparison, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gtsrb")
    parser.add_argument("--images", type=int, help="to train on, a fifth of them held out; by default all")
    parser.add_argument("--resolutions", default="32,48,64")
    parser.add_argument("--sharing", default="private,shared,independent", help="private must be among them")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=FullFinetune().lr)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep backbones and patches here, and go on from what is there")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(given.task, given.cache))
    if given.images is not None:
        data = data.subsample(given.images)
    resolutions = [int(pixels) for pixels in given.resolutions.split(",")]
    method = FullFinetune(statistics="learned", lr=given.lr)
    comparison, results = study(
        mp.load_backbone(mobilenet()),
        data,
        resolutions,
        given.sharing.split(","),
        method=method,
        epochs=given.epochs,
        batch_size=given.batch_size,
        seeds=given.seeds,
        out=given.out,
        progress=True,
    )
    title = f"{data.task.name}, {len(data.train)} images, {given.epochs} epochs, {given.seeds} seeds"
    columns, rows = sharing_rows(comparison)
    beside = None if given.json is None else given.json.with_name(f"{given.json.stem}-cascade.json")
    report(f"{title}: test top-1 in percent", columns, rows, given.json)
    report(f"{title}: cascades over the private patches", CASCADE, cascade_rows(results), beside)


if __name__ == "__main__":
    main()

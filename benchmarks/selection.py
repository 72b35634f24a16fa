"""Profile and greedy selection against the same candidates trained by a plain loop from pixels: MobileNetV2, 128 px.

Both sides train the same blocks on the same folds with the same batches, optimizer, learning rates and number of steps, and
score the same held-out images; images are decoded once for either. The plain loop runs the whole network in every step, as
one would write it; ours starts from activations shared by all candidates. Of the greedy selection's many trainings the plain
side runs every `--sample`-th one and is scaled up by the number of those left out; the profile's it runs all.

    python benchmarks/selection.py --json benchmarks/results/selection.json
    python benchmarks/selection.py --images 60 --epochs 1 --rounds 1 --sample 40      # does it run?
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import modelpatch as mp
from common import mobilenet, report, timed, unpack
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.select import profile
from modelpatch.select.greedy import Greedy, select
from modelpatch.select.trials import Folds
from modelpatch.train.settings import FitSettings

PIXELS, BATCH = 128, 32


class PlainLoop:
    """What one would write without this library."""

    def __init__(self, backbone: Backbone, data: Task, folds: int, epochs: int) -> None:
        self.backbone, self.classes, self.settings = backbone, len(data.classes), FitSettings(epochs=epochs)
        self.folds = Folds.of(data, folds, 0)
        store = ImageStore(self.folds.images, backbone.preprocessing.with_image_size(PIXELS), 2**33)
        self.images, self.labels = store.plain(torch.arange(len(store))), store.labels

    def train(self, blocks: Sequence[str], fold: int) -> float:
        """Train {blocks, head} on a fold from pixels. Returns the accuracy on what it holds out."""
        torch.manual_seed(0)
        model: Any = copy.deepcopy(self.backbone.module)
        model.classifier = torch.nn.Linear(1280, self.classes)
        tuned = [p for name in blocks for p in model.get_submodule(name).requires_grad_(True).parameters()]
        groups = [
            {"params": [p for p in tuned if p.ndim > 1], "lr": 1e-3, "weight_decay": 1e-2},
            {"params": [p for p in tuned if p.ndim <= 1], "lr": 1e-3, "weight_decay": 0.0},
            {"params": list(model.classifier.parameters()), "lr": 1e-2, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        rates = [group["lr"] for group in optimizer.param_groups]
        rows, held = (torch.from_numpy(part) for part in self.folds.rows[fold])
        total, step = self.settings.epochs * -(-len(rows) // BATCH), 0
        model.eval()
        for epoch in range(self.settings.epochs):
            for batch in torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).split(BATCH):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self.settings.factor(step, total)
                loss = F.cross_entropy(model(self.images[rows[batch]]), self.labels[rows[batch]])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        with torch.no_grad():
            answers = torch.cat([model(self.images[part]).argmax(1) for part in held.split(64)])
        return float((answers == self.labels[held]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--no-profile", action="store_true", help="time the greedy selection alone")
    parser.add_argument("--rounds", type=int, default=3, help="of the greedy selection, 0: only the profile")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--sample", type=int, default=12, help="the plain loop trains every so many of the selection's sets"
    )
    parser.add_argument("--halving", type=int, default=0)
    parser.add_argument("--warm-start", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", default="cub80_2010")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(given.data, given.cache)).subsample(given.images)
    backbone = mp.load_backbone(mobilenet())
    settings: dict[str, Any] = {"epochs": given.epochs, "batch_size": BATCH, "image_size": PIXELS, "augment": "none"}
    shared = {**settings, "halving": given.halving, "workers": given.workers}
    rows = []

    if not given.no_profile:
        ours, seconds = timed(lambda: profile(backbone, data, **shared))
        loop, decoding = timed(lambda: PlainLoop(backbone, data, 1, given.epochs))
        top1s, plain_seconds = timed(lambda: [loop.train(row.blocks, 0) for row in ours.rows])
        plain_seconds += decoding
        title = f"profile, {len(ours.rows)} blocks"
        apart = [abs(row.score.top1 - top1) for row, top1 in zip(ours.rows, top1s, strict=True)]
        means = (statistics.fmean(top1s), statistics.fmean(row.score.top1 for row in ours.rows))
        rows.append((title, "plain loop", plain_seconds, 1.0, f"{100 * means[0]:.1f}", ""))
        speed = plain_seconds / seconds
        rows.append((title, "ours", seconds, speed, f"{100 * means[1]:.1f}", f"{100 * max(apart):.1f}"))

    if given.rounds:
        # whatever a block gains, all rounds are made; both ends are left out, which the plain side does not train either
        greedy = Greedy(epsilon=0.99, rule="code", halving=given.halving, warm_start=given.warm_start, ends=False)
        del shared["halving"]
        chosen, seconds = timed(
            lambda: select(backbone, data, greedy=greedy, max_blocks=given.rounds, folds=given.folds, **shared)
        )
        loop, decoding = timed(lambda: PlainLoop(backbone, data, given.folds, given.epochs))
        sets = [(step.blocks, step.score) for one in chosen.rounds for step in one.steps if step.score is not None]
        work = [(blocks, score, fold) for blocks, score in sets for fold in range(given.folds)]
        sample = work[:: given.sample]
        top1s, part = timed(lambda: [loop.train(blocks, fold) for blocks, _, fold in sample])
        plain_seconds = decoding + part * len(work) / len(sample)
        title = f"greedy, {len(chosen.rounds)} rounds, {given.folds} folds, {len(work)} trainings"
        same = [score.top1s[fold] for _, score, fold in sample]
        apart = [abs(a - b) for a, b in zip(top1s, same, strict=True)]
        means = (statistics.fmean(top1s), statistics.fmean(same))
        note = f"plain loop, {len(sample)} of them, scaled"
        rows.append((title, note, plain_seconds, 1.0, f"{100 * means[0]:.1f}", ""))
        rows.append(
            (title, "ours", seconds, plain_seconds / seconds, f"{100 * means[1]:.1f}", f"{100 * max(apart):.1f}")
        )
    columns = ("work", "side", "seconds", "times faster", "mean held-out top-1", "farthest apart")
    options = [name for name in ("halving", "warm_start", "workers") if getattr(given, name) not in (0, False, 1)]
    title = f"{given.data}, {len(data.train)} images, {PIXELS} px, {given.epochs} epochs {' '.join(options)}".strip()
    report(title, columns, rows, given.json)


if __name__ == "__main__":
    main()

"""`fit` with nothing else said beside scale-bias, full fine-tuning and plain PyTorch loops: accuracies, bytes and seconds.

    default       the method and augmentation that held-out images choose
    scale-bias    at its defaults: what times are multiples of
    full-AUGMENT  full fine-tuning under every augmentation; the best of them by its test images is what is to be met
    hand-AUGMENT  full fine-tuning in a plain PyTorch loop (`by_hand.py`), without augmentation and with the standard one

    python benchmarks/default_fit.py --json benchmarks/results/default_fit.json
    python benchmarks/default_fit.py --json benchmarks/results/default_fit.json --backbone efficientnet_lite0 --seeds 0

96 px, 10 epochs. Each fit is a row of the file, and a run goes on where its file ends: `--sets`, `--ways` and `--seeds`
name parts, and `--table` alone for the summary of what is there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import modelpatch as mp
from by_hand import everything
from common import SETS, SHARED, Rows, report, timed, unpack
from modelpatch.data.augmentation import AUGMENTATIONS
from modelpatch.data.images import ImageStore

PIXELS, EPOCHS, BATCH = 96, 10, 32
NETWORKS = {
    "mobilenetv2": "mobilenetv2_100_imagenet.safetensors",
    "efficientnet_lite0": "efficientnet_lite0_imagenet.safetensors",
}
FULL = [f"full-{name}" for name in AUGMENTATIONS]
HAND = ["hand-none", "hand-standard"]
WAYS = ["default", "scale-bias", *FULL, *HAND]


def fit_by_hand(backbone: mp.Backbone, task: mp.Task, augment: str, seed: int) -> float:
    """The test accuracy of a plain loop over decoded images: AdamW, cosine, all parameters."""
    torch.manual_seed(seed)
    model, optimizer = everything(copy.deepcopy(backbone.module), len(task.classes))
    seen = backbone.preprocessing.with_image_size(PIXELS)
    train, test = ImageStore(task.train, seen, 2**31), ImageStore(task.test, seen, 2**31)
    steps = EPOCHS * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        rows = torch.randperm(len(train)).split(BATCH)
        for images, targets in train.batches(rows, AUGMENTATIONS[augment], seed, epoch):
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = 0
    with torch.no_grad():
        for rows in torch.arange(len(test)).split(64):
            right += int((model(test.plain(rows)).argmax(1) == test.labels[rows]).sum())
    return right / len(test)


def measure(backbone: mp.Backbone, name: str, way: str, seed: int, cache: Path) -> dict[str, Any]:
    """Accuracy in percent, bytes and seconds of one fit."""
    task = mp.load_task(unpack(name, cache))
    kind, _, augment = way.partition("-")
    if kind == "hand":
        accuracy, seconds = timed(lambda: fit_by_hand(backbone, task, augment, seed))
        return {"top1": 100 * accuracy, "bytes": 0.0, "seconds": seconds}
    settings: dict[str, Any] = {"image_size": PIXELS, "epochs": EPOCHS, "batch_size": BATCH, "seed": seed}
    if kind == "full":
        settings |= {"method": "full-finetune", "augment": augment}
    elif way == "scale-bias":
        settings["method"] = way
    patch, seconds = timed(lambda: mp.fit(backbone, task, **settings))
    chosen = patch.created.get("choice", {})
    facts = {"chosen": f"{chosen['method']}, {chosen['augment']}"} if chosen else {}
    size = float(patch.inspect().file_bytes)
    return {"top1": 100 * patch.metrics["test_top1"], "bytes": size, "seconds": seconds, **facts}


def summarize(found: dict[str, dict[str, Any]], network: str) -> None:
    """Print means over seeds: a row a set for which the default and what it is compared with are there."""
    by_set: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row, figures in found.items():
        own, name, way, _ = row.split(", ")
        if own == network:
            by_set[name][way].append(figures)
    table: list[tuple[Any, ...]] = []
    for name, ways in by_set.items():
        if not {"default", "scale-bias"} < ways.keys():
            continue

        def mean(way: str, figure: str, ways: Any = ways) -> float:
            return statistics.fmean(one[figure] for one in ways[way])

        full = max((way for way in FULL if way in ways), key=lambda way: mean(way, "top1"), default="")
        hand = [mean(way, "top1") for way in HAND if way in ways]
        default = mean("default", "top1")
        cells = (mean(full, "top1"), default - mean(full, "top1"), mean("default", "bytes") / mean(full, "bytes"))
        table.append(
            (
                name,
                default,
                mean("scale-bias", "top1"),
                *(cells if full else (float("nan"),) * 3),
                mean("default", "seconds") / mean("scale-bias", "seconds"),
                default - max(hand) if hand else float("nan"),
            )
        )
    if table:
        means = [statistics.fmean(row[place] for row in table) for place in range(1, len(table[0]))]
        columns = ("set", "default", "scale-bias", "full", "less full", "of its bytes", "of the time", "less by hand")
        report(f"{network}, {PIXELS} px, {EPOCHS} epochs", columns, [*table, ("mean", *means)], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=NETWORKS, default="mobilenetv2")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--table", action="store_true", help="Measure nothing.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    rows, network = Rows(arguments.json), arguments.backbone
    if not arguments.table:
        backbone = mp.load_backbone(f"file:{SHARED / 'weights' / NETWORKS[network]}")
        for seed in arguments.seeds:
            for name in arguments.sets:
                for way in arguments.ways:
                    work = partial(measure, backbone, name, way, seed, arguments.cache)
                    rows.add(f"{network}, {name}, {way}, seed {seed}", work)
    summarize(rows.found, network)


if __name__ == "__main__":
    main()

"""`fit` against a plain PyTorch loop for the same work: linear probe and last block, MobileNetV2, 1,000 images, 128 px.

Both sides decode once, use the same batches, optimizer and learning rates, no augmentation, and measure the same test
images; the plain loop runs the whole network in every step, `fit` runs the frozen prefix once. Rounds alternate after a
warm-up of both, and the ratio is that of the medians. The floor is what `fit` cannot avoid: one pass of the prefix and
the steps after it.

    python benchmarks/fit_speed.py --json benchmarks/results/fit_speed.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import modelpatch as mp
from common import mobilenet, report, timed, unpack

PIXELS, BATCH, IMAGES = 128, 32, 1000
METHODS: dict[str, mp.methods.Method] = {
    "linear-probe": mp.methods.LinearProbe(solver="steps"),
    "subset (last block)": mp.methods.Subset(),
}
SIDES = ("plain", "fit", "fit, cache off")


def plain_loop(data: Any, train_last_block: bool, epochs: int) -> float:
    """What one would write without this library. Returns the test accuracy."""
    from modelpatch.data.images import ImageStore

    torch.manual_seed(0)
    backbone = mp.load_backbone(mobilenet())  # only to get the same weights
    model: Any = backbone.module
    model.classifier = torch.nn.Linear(1280, len(data.classes))
    if train_last_block:
        model.blocks[-1].requires_grad_(True)
    preprocessing = backbone.preprocessing.with_image_size(PIXELS)
    train = ImageStore(data.train, preprocessing, 2**31)
    images, labels = train.plain(torch.arange(len(train))), train.labels
    block = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = [
        {"params": [p for p in block if p.ndim > 1], "lr": 1e-3, "weight_decay": 1e-2},
        {"params": [p for p in block if p.ndim <= 1], "lr": 1e-3, "weight_decay": 0.0},
        {"params": model.classifier.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.eval()
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    test = ImageStore(data.test, preprocessing, 2**31)
    with torch.no_grad():
        answers = torch.cat([model(test.plain(rows)).argmax(1) for rows in torch.arange(len(test)).split(64)])
    return float((answers == test.labels).double().mean())


def our_fit(data: Any, method: mp.methods.Method, epochs: int, cache: bool) -> float:
    """The same with `fit`. Returns the test accuracy."""
    backbone = mp.load_backbone(mobilenet())
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "image_size": PIXELS, "cache": cache}
    return mp.fit(backbone, data, method, augment="none", **settings).metrics["test_top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack("imagenette", arguments.cache)).subsample(IMAGES)
    rows = []
    for name in arguments.only:
        method = METHODS[name]
        seconds: dict[str, list[float]] = {side: [] for side in arguments.sides}
        accuracy: dict[str, float] = {}
        last_block = name != "linear-probe"
        if "plain" in seconds:  # neither side pays for what a process does once
            plain_loop(data, last_block, 1)
        our_fit(data, method, 1, True)
        for _ in range(arguments.rounds):
            for side in seconds:
                if side == "plain":
                    result, taken = timed(partial(plain_loop, data, last_block, arguments.epochs))
                else:
                    result, taken = timed(partial(our_fit, data, method, arguments.epochs, side == "fit"))
                seconds[side].append(taken)
                accuracy[side] = result
        median = {side: statistics.median(values) for side, values in seconds.items()}
        for side, value in median.items():
            faster = median["plain"] / value if "plain" in median else ""
            rows.append((name, side, value, faster, f"{100 * accuracy[side]:.1f}"))
    columns = ("method", "side", "seconds", "times faster than plain", "test top-1")
    title = f"{IMAGES} images, {PIXELS} px, {arguments.epochs} epochs, median of {arguments.rounds}"
    report(title, columns, rows, arguments.json)


if __name__ == "__main__":
    main()

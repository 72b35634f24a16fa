"""The loop of docs/own-loop.md against `fit` on traffic signs: test accuracy of both, for several seeds.

Both train scale and bias with the same steps, batch size, rates, schedule and augmentation; the plain loop is what one
writes without `fit`, on batches of a DataLoader.

    python benchmarks/own_loop.py --json benchmarks/results/own_loop.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.data.augmentation import choose_augmentation
from modelpatch.data.images import ImageStore

PIXELS, BATCH = 64, 32


class Signs(Dataset[Any]):
    """Decoded images (3, R, R) with their classes."""

    def __init__(self, task: mp.Task, preprocessing: mp.Preprocessing) -> None:
        self.store = ImageStore(task.train, preprocessing, 2**31)
        list(self.store.plain_batches())

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.store.pixels[row], int(self.store.labels[row])


def own_loop(backbone: mp.Backbone, task: mp.Task, epochs: int, seed: int) -> mp.Patch:
    """The guide's plain loop, with the augmentation that fit chooses."""
    torch.manual_seed(seed)
    seen = backbone.preprocessing.with_image_size(PIXELS)
    method = mp.methods.ScaleBias()
    model = method.build(backbone, task)
    loader = DataLoader(Signs(task, seen), BATCH, shuffle=True)
    augment, generator = choose_augmentation("auto", task.train), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, backbone))
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=total, pct_start=0.05
    )
    for _ in range(epochs):
        model.train()
        for pixels, labels in loader:
            images = seen.normalize(augment(pixels.float(), PIXELS, generator))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.to_patch(task, preprocessing=seen, method=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    task = mp.load_task(unpack("gtsrb", arguments.cache)).subsample(arguments.images)
    backbone = mp.load_backbone(mobilenet())
    rows: list[tuple[str | float, ...]] = []
    for seed in range(arguments.seeds):
        patches = {
            "own loop": own_loop(backbone, task, arguments.epochs, seed),
            "fit": mp.fit(
                backbone, task, "scale-bias", epochs=arguments.epochs, batch_size=BATCH, image_size=PIXELS, seed=seed
            ),
        }
        rows.append((seed, *(100 * mp.evaluate(backbone, patch, task).score for patch in patches.values())))
    rows.append(("mean", *(statistics.fmean(float(row[column]) for row in rows) for column in (1, 2))))
    title = f"gtsrb, {len(task.train)} images, {PIXELS} px, {arguments.epochs} epochs: test top-1 in percent"
    report(title, ("seed", "own loop", "fit"), rows, arguments.json)


if __name__ == "__main__":
    main()

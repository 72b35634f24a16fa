"""Train the bundled backbone `tiny` on CIFAR-10 and write it as a backbone file.

A ConvNeXt with BatchNorm (timm's `convnext_atto`, re-sized), so that it has what every method patches: BatchNorm,
depthwise convolutions and residual blocks. The 32 px photos are scaled up, which makes the 4 px patches of the stem see
little more than a pixel of the photo. Five cycles, each starting where the last one was cut: a cheap one at low resolution
with grey squares and smoothed labels, one with shifts and flips alone, two at the final resolution, and
one there with small turns and zooms.

    python scripts/train_tiny.py --data DIR --work WORK            # DIR holds train.parquet and test.parquet
    python scripts/train_tiny.py --data DIR --work WORK --export   # writes the asset and its log into the package

Training resumes from WORK after an interruption; every random choice follows --seed and the epoch.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.task import load_task
from modelpatch.train.evaluation import evaluate_base

ARCHITECTURE = "convnext_atto"
ARGUMENTS: dict[str, Any] = {
    "depths": [2, 2, 3, 1],
    "dims": [32, 64, 128, 160],
    "kernel_sizes": 3,
    "patch_size": 4,
    "conv_mlp": True,
    "norm_layer": "batchnorm2d",
    "act_layer": "relu",
    "ls_init_value": None,
    "num_classes": 10,
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PIXELS = 96
ASSETS = Path(__file__).parents[1] / "src" / "modelpatch" / "backbone" / "assets"


@dataclass(frozen=True)
class Cycle:
    """Epochs under one cosine of `horizon` epochs, which the next cycle may cut short."""

    epochs: int
    horizon: int
    warmup: float  # epochs
    lr: float
    pixels: tuple[int, int]  # before and from epoch `switch` on
    switch: int
    squares: bool
    label_smoothing: float
    warp: bool = False


CYCLES = (
    Cycle(22, 28, 2, 4e-3, (48, 64), 14, True, 0.1),
    Cycle(14, 16, 2, 2.5e-3, (64, 64), 0, False, 0.0),
    Cycle(6, 6, 0.5, 1.5e-3, (96, 96), 0, True, 0.1),
    Cycle(15, 15, 1, 2e-3, (96, 96), 0, True, 0.1),
    Cycle(10, 10, 0.5, 1.5e-3, (96, 96), 0, True, 0.1, warp=True),
)


def read_split(data: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 (N, 3, 32, 32) and labels as int64 (N,), decoded once into `cache`."""
    decoded = cache / f"{split}.safetensors"
    if not decoded.exists():
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(data / f"{split}.parquet").to_pydict()
        column = next(name for name in ("img", "image") if name in table)
        images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[column]])
        labels = torch.tensor(table["label"])
        save_file({"images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), "labels": labels}, decoded)
    tensors = load_file(decoded)
    return tensors["images"], tensors["labels"]


def prepare(images: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """uint8 (B, 3, 32, 32) to normalised float32 (B, 3, pixels, pixels), channels last.

    With a generator each image is turned by up to 12 degrees and zoomed by up to 15 percent on the way.
    """
    if generator is None:
        scaled = F.interpolate(images.float() / 255, size=pixels, mode="bilinear", align_corners=False)
    else:
        turn, zoom = (2 * torch.rand(2, len(images), generator=generator) - 1) * torch.tensor([[math.pi / 15], [0.15]])
        cos, sin = turn.cos() * zoom.exp(), turn.sin() * zoom.exp()
        rows = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        grid = F.affine_grid(F.pad(rows, (0, 1)), [len(images), 3, pixels, pixels], align_corners=False)
        scaled = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    return ((scaled - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator, squares: bool) -> Tensor:
    """Random 4 px shift, horizontal flip and, if `squares`, an 8 px grey square, each drawn per image."""
    count, _, height, width = images.shape
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    rows = torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(width)
    flip = torch.rand(count, generator=generator) < 0.5
    columns[flip] = columns[flip].flip(1)
    index = torch.arange(count).view(-1, 1, 1)
    shifted = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    top, left = (torch.randint(-4, 28, (count, 1), generator=generator) for _ in range(2))
    inside_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + 8)
    inside_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + 8)
    if squares:
        shifted[inside_rows[:, :, None] & inside_columns[:, None, :]] = 120
    return shifted.permute(0, 3, 1, 2)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, pixels: int) -> float:
    """Top-1 in [0, 1], in eval mode."""
    model.eval()
    with torch.inference_mode():
        batches = zip(images.split(500), labels.split(500), strict=True)
        correct = sum(int((model(prepare(x, pixels)).argmax(1) == y).sum()) for x, y in batches)
    return correct / len(labels)


def train(arguments: argparse.Namespace) -> None:
    images, labels = read_split(arguments.data, "train", arguments.work)
    test_images, test_labels = read_split(arguments.data, "test", arguments.work)
    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS).to(memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}],
    )
    steps = math.ceil(len(images) / arguments.batch)
    checkpoint, log = arguments.work / "checkpoint.pt", arguments.work / "log.csv"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    compiled = torch.compile(model, dynamic=False)  # a third faster than eager on two cores
    plan = [(cycle, number) for cycle in CYCLES for number in range(cycle.epochs)]
    for epoch, (cycle, number) in list(enumerate(plan))[start:]:
        begin = time.perf_counter()
        pixels = cycle.pixels[number >= cycle.switch]
        total, warmup = cycle.horizon * steps, round(cycle.warmup * steps)
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        losses: list[float] = []
        model.train()
        for step, rows in enumerate(order.split(arguments.batch), start=number * steps):
            share = (
                step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            )
            for group in optimizer.param_groups:
                group["lr"] = cycle.lr * share
            inputs = prepare(augment(images[rows], generator, cycle.squares), pixels, generator if cycle.warp else None)
            loss = F.cross_entropy(compiled(inputs), labels[rows], label_smoothing=cycle.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        row = {
            "epoch": epoch + 1,
            "pixels": pixels,
            "loss": round(float(np.mean(losses)), 4),
            "test_top1": round(accuracy(model, test_images, test_labels, cycle.pixels[-1]), 4),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        print(json.dumps(row), flush=True)
        new = not log.exists()
        with log.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)


def export(arguments: argparse.Namespace) -> None:
    """Write the trained weights as the package's asset in half precision, measured as the package will use it."""
    module = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    state = torch.load(arguments.work / "checkpoint.pt", weights_only=True)
    module.load_state_dict(state["model"])
    preprocessing = Preprocessing(
        input_size=(3, PIXELS, PIXELS), mean=MEAN, std=STD, interpolation="bilinear", crop_pct=1.0
    )
    backbone = Backbone(module, preprocessing, f"timm:{ARCHITECTURE}", ARGUMENTS, "head.fc", classes=tuple(CLASSES))
    about = {
        "data": "CIFAR-10, 50,000 training images",
        "script": "scripts/train_tiny.py",
        "seed": arguments.seed,
        "epochs": state["epoch"],
    }
    path = ASSETS / "tiny.safetensors"
    save_backbone(backbone, path, ARCHITECTURE, half=True, **about)
    result = evaluate_base(load_backbone(f"file:{path}"), load_task(arguments.data))
    save_backbone(backbone, path, ARCHITECTURE, half=True, cifar10_test_top1=round(result.top1, 4), **about)
    shutil.copy(arguments.work / "log.csv", Path(__file__).with_name("train_tiny_log.csv"))
    print(f"{path.name}: {path.stat().st_size:,} bytes, CIFAR-10 test top-1 {result.top1:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="write the asset instead of training")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()

"""Segmentation over one frozen ImageNet MobileNetV2: masks, Δ-modules, and both baselines, on CamVid's road scenes.

    linear-probe           the frozen backbone with a trained decoder
    piggyback              a binary mask over every weight, and normalisation layers
    delta(modules=4)       Δ-modules on the last four stages that have skips
    full-finetune          everything, the upper baseline

All have the same decoder, steps, seeds and views. Figures are means over seeds with standard errors: mean IoU over 11 classes
on the test images, and `of full`, the share of full fine-tuning's. `--overlays` draws the first test images as every method
answers them. The claim (Piggyback, ECCV 2018, section 4.4): masks reach full fine-tuning's mean IoU.

    python benchmarks/segmentation.py --json benchmarks/results/segmentation.json --overlays docs/segmentation
    python benchmarks/segmentation.py --images 8 --epochs 1 --seeds 1 --pixels 64
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import modelpatch as mp
from common import mobilenet, report, unpack, with_head_rate
from modelpatch.backbone.preprocess import ImageSource, open_image
from modelpatch.engine.overlay import class_map, paint
from modelpatch.train import TaskData
from modelpatch.train.evaluate import standard_error

CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
VOID = 11
METHODS = (
    "linear-probe",
    "piggyback(norms=trained,lr=0.0003)",
    "delta(modules=4)",
    "full-finetune(statistics=learned)",
)
COLUMNS = ("method", "mean IoU", "standard error", "of full", "pixel accuracy", "file bytes", "seconds")
DRAWN = 4  # test images


def study(
    backbone: mp.Backbone, data: TaskData, methods: list[str], seeds: int, **settings: Any
) -> tuple[list[tuple[Any, ...]], dict[str, mp.Patch]]:
    """A row a method, and the patches of the first seed. The last method is what the others are measured by."""
    rows, patches = [], {}
    for method in methods:
        fitted = [mp.fit(backbone, data, method, seed=seed, progress=True, **settings) for seed in range(seeds)]
        ious = [patch.metrics["test_miou"] for patch in fitted]
        pixels = statistics.fmean(patch.metrics["test_pixel_accuracy"] for patch in fitted)
        seconds = statistics.fmean(patch.created["seconds"] for patch in fitted)
        size = fitted[0].inspect().file_bytes
        rows.append((method, statistics.fmean(ious), standard_error(ious) or 0.0, pixels, size, seconds))
        patches[method] = fitted[0]
    full = rows[-1][1]
    return [(*row[:3], row[1] / full if full else 0.0, *row[3:]) for row in rows], patches


def draw(backbone: mp.Backbone, data: TaskData, patches: dict[str, mp.Patch], folder: Path) -> None:
    """One picture a test image: the image, its mask, and every method's answer, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(min(DRAWN, len(data.test))):
        source: ImageSource = data.test.images[row]
        image = open_image(source)
        tiles = [image, _truth(data, row, image)]
        for patch in patches.values():
            logits = backbone.patched(patch)(patch.preprocessing(source))[0]
            tiles.append(paint(image, class_map(logits), len(data.classes), patch.preprocessing))
        sheet = Image.new("RGB", (sum(tile.width for tile in tiles), image.height))
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (place * image.width, 0))
        sheet.save(folder / f"{row}.jpg", quality=85)


def _truth(data: TaskData, row: int, image: Image.Image) -> Image.Image:
    """The image with its own mask, black where there is no class."""
    assert data.test.targets is not None
    mask: Any = data.test.targets[row]
    values = np.array(mask.read())
    known = np.minimum(values, len(data.classes) - 1)
    whole = mp.Preprocessing(framing="stretch")
    painted = paint(image, known, len(data.classes), whole)
    void = Image.fromarray((values > known).astype(np.uint8) * 255)
    painted.paste("black", mask=void)
    return painted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="the last is what others are measured by")
    parser.add_argument("--decoder", default="deeplab")
    parser.add_argument("--images", type=int, help="training images; by default all")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--head-lr", type=float, default=3e-3, help="decoders want a lower rate than linear heads")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--overlays", type=Path, help="a folder for pictures")
    parser.add_argument("--patches", type=Path, help="a folder for the first seed's patches")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack("camvid", given.cache), classes=CLASSES, ignore=VOID)
    data = data if given.images is None else data.subsample(given.images)
    backbone = mp.load_backbone(mobilenet())
    settings = {"image_size": given.pixels, "epochs": given.epochs, "batch_size": given.batch_size}
    methods = [with_head_rate(method, given.head_lr) for method in given.methods]
    rows, patches = study(backbone, data, methods, given.seeds, decoder=given.decoder, **settings)
    if given.overlays:
        draw(backbone, data, patches, given.overlays)
    for name, patch in patches.items() if given.patches else ():
        given.patches.mkdir(parents=True, exist_ok=True)
        patch.save(given.patches / f"camvid-{name.partition('(')[0]}.safetensors")
    run = f"{given.pixels} px, {given.epochs} epochs, {given.decoder}, {given.seeds} seeds"
    title = f"camvid, {len(data.train)} images at {run}"
    report(title, COLUMNS, rows, given.json)


if __name__ == "__main__":
    main()

"""Detection over one frozen ImageNet MobileNetV2: scale-and-bias and Δ-modules beside a frozen backbone, on blood cells.

    linear-probe     the frozen backbone with a trained detector
    scale-bias       every normalisation layer's scale and bias
    delta(modules=4) Δ-modules on the last four stages that have skips

All have the same detector, steps, seeds and views. Figures are means over seeds with standard errors: mean average precision
at IoU 0.5, and over 0.5 to 0.95, on the test images. `--overlays` draws the first test images as every method answers them.
The claim (Δ-Networks, detection and segmentation): Δ beats the frozen backbone.

    python benchmarks/detection.py --json benchmarks/results/detection.json --overlays docs/detection
    python benchmarks/detection.py --images 6 --epochs 1 --seeds 1 --pixels 64
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import modelpatch as mp
from common import mobilenet, report, unpack, with_head_rate
from modelpatch.backbone.preprocess import open_image
from modelpatch.engine.overlay import boxes, draw_boxes
from modelpatch.train import TaskData
from modelpatch.train.evaluate import standard_error

METHODS = ("linear-probe", "scale-bias", "delta(modules=4)")
COLUMNS = ("method", "mAP@0.5", "standard error", "mAP@0.5:0.95", "file bytes", "seconds")
DRAWN = 4  # test images


def study(
    backbone: mp.Backbone, data: TaskData, methods: list[str], seeds: int, **settings: Any
) -> tuple[list[tuple[Any, ...]], dict[str, mp.Patch]]:
    """A row a method, and the patches of the first seed."""
    rows, patches = [], {}
    for method in methods:
        fitted = [mp.fit(backbone, data, method, seed=seed, progress=True, **settings) for seed in range(seeds)]
        halves = [patch.metrics["test_map50"] for patch in fitted]
        whole = statistics.fmean(patch.metrics["test_map"] for patch in fitted)
        seconds = statistics.fmean(patch.created["seconds"] for patch in fitted)
        size = fitted[0].inspect().file_bytes
        rows.append((method, statistics.fmean(halves), standard_error(halves) or 0.0, whole, size, seconds))
        patches[method] = fitted[0]
    return rows, patches


def draw(backbone: mp.Backbone, data: TaskData, patches: dict[str, mp.Patch], folder: Path) -> None:
    """One picture a test image: every method's boxes, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(min(DRAWN, len(data.test))):
        source = data.test.images[row]
        image = open_image(source)
        sheet = Image.new("RGB", (len(patches) * image.width, image.height))
        for place, patch in enumerate(patches.values()):
            answer = backbone.patched(patch)(patch.preprocessing(source))[0]
            found = boxes(answer, patch.preprocessing, image.size)
            sheet.paste(draw_boxes(image, found, data.classes), (place * image.width, 0))
        sheet.save(folder / f"{row}.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="bccd_voc", help="bccd_voc or raccoon_voc")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--decoder", default="faster-rcnn", help="faster-rcnn or ssdlite")
    parser.add_argument("--images", type=int, help="training images; by default all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--head-lr", type=float, default=1e-3, help="detectors want a lower rate than linear heads")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--overlays", type=Path, help="a folder for pictures")
    parser.add_argument("--patches", type=Path, help="a folder for the first seed's patches")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(given.task, given.cache))
    data = data if given.images is None else data.subsample(given.images)
    backbone = mp.load_backbone(mobilenet())
    settings = {"image_size": given.pixels, "epochs": given.epochs, "batch_size": given.batch_size, "clip": 5.0}
    methods = [with_head_rate(method, given.head_lr) for method in given.methods]
    rows, patches = study(backbone, data, methods, given.seeds, decoder=given.decoder, **settings)
    if given.overlays:
        draw(backbone, data, patches, given.overlays)
    for name, patch in patches.items() if given.patches else ():
        given.patches.mkdir(parents=True, exist_ok=True)
        patch.save(given.patches / f"{given.task}-{name.partition('(')[0]}.safetensors")
    run = f"{given.pixels} px, {given.epochs} epochs, {given.decoder}, {given.seeds} seeds"
    report(f"{given.task}, {len(data.train)} images at {run}", COLUMNS, rows, given.json)


if __name__ == "__main__":
    main()

"""Segmentation over one frozen ImageNet MobileNetV2: masks, Δ-modules, scale and bias, and both baselines, on CamVid.

    linear-probe           the frozen backbone with a trained decoder
    piggyback              a binary mask over every weight, and normalisation layers
    scale-bias             every normalisation layer's scale and bias
    delta(modules=4)       Δ-modules on the last four stages that have skips; alone, and with scale and bias
    full-finetune          everything, the upper baseline

All have the same decoder and rate of it, steps, seeds and views. The rates of masks, Δ-modules and full fine-tuning are those
of a few that did best on held-out images of one seed; scale and bias have the one that was tried. Figures are means over seeds
with standard errors: mean IoU over 11 classes on the test images, and `of full`, the share of full fine-tuning's. `--overlays`
draws the first test images as every method answers them.
The claim (Piggyback, ECCV 2018, section 4.4): masks reach full fine-tuning's mean IoU.

    python benchmarks/segmentation.py --json benchmarks/results/segmentation.json --overlays drawn/
    python benchmarks/segmentation.py --images 8 --epochs 1 --seeds 1 --pixels 64
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import modelpatch as mp
from common import mobilenet, report, unpack
from dense import options, study, title
from modelpatch.backbone.preprocessing import ImageSource, open_image
from modelpatch.data.task import Task
from modelpatch.tasks.kind import View
from modelpatch.tasks.segmentation import lay_over

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
    "scale-bias(lr=0.001)",
    "delta(modules=4,lr=0.03,start=identity)",
    "delta(modules=4,lr=0.03,start=identity)+scale-bias(lr=0.001)",
    "full-finetune(lr=0.0003)",
)
COLUMNS = ("method", "mean IoU", "standard error", "of full", "pixel accuracy", "file bytes", "seconds")
DRAWN = 4  # test images


def draw(backbone: mp.Backbone, data: Task, patches: dict[str, mp.Patch], folder: Path) -> None:
    """One picture a test image: the image, its mask, and every method's answer, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(min(DRAWN, len(data.test))):
        source: ImageSource = data.test.images[row]
        image = open_image(source)
        tiles = [image, _truth(data, row, image)]
        for patch in patches.values():
            best = backbone.patched(patch)(patch.preprocessing(source))[0].argmax(0).byte().numpy()
            tiles.append(lay_over(best, View(data.classes, patch.preprocessing, image)))
        sheet = Image.new("RGB", (sum(tile.width for tile in tiles), image.height))
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (place * image.width, 0))
        sheet.save(folder / f"{row}.jpg", quality=85)


def _truth(data: Task, row: int, image: Image.Image) -> Image.Image:
    """The image with its own mask, black where there is no class."""
    assert data.test.targets is not None
    mask: Any = data.test.targets[row]
    values = np.array(mask.read())
    known = np.minimum(values, len(data.classes) - 1)
    whole = mp.Preprocessing(framing="stretch")
    painted = lay_over(known, View(data.classes, whole, image))
    void = Image.fromarray((values > known).astype(np.uint8) * 255)
    painted.paste("black", mask=void)
    return painted


def main() -> None:
    given = options(__doc__, METHODS, "deeplab", pixels=128, epochs=60, head_lr=1e-2).parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack("camvid", given.cache), classes=CLASSES, ignore=VOID)
    data = data if given.images is None else data.subsample(given.images)
    backbone = mp.load_backbone(mobilenet())
    rows, patches = study(backbone, data, given, ("miou", "pixel_accuracy"))
    if given.overlays:
        draw(backbone, data, patches, given.overlays)
    full = rows[-1][1]  # the last method is what the others are measured by
    rows = [(*row[:3], row[1] / full if full else 0.0, *row[3:]) for row in rows]
    report(title(data, given), COLUMNS, rows, given.json)


if __name__ == "__main__":
    main()

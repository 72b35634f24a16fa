"""Detection over one frozen ImageNet MobileNetV2: scale-and-bias and Δ-modules beside a frozen backbone, on blood cells.

    linear-probe     the frozen backbone with a trained detector
    scale-bias       every normalisation layer's scale and bias
    delta(modules=4) Δ-modules on the last four stages that have skips

All have the same detector, steps, seeds and views, and the detector's rate that suits the frozen backbone best on held-out
images. Δ-modules start near the base: skips of a half, as in the paper, take longer. Figures are means over seeds with
standard errors: mean average precision at IoU 0.5, and over 0.5 to 0.95, on the test images. `--overlays` draws the first test
images as every method answers them.
The claim (Δ-Networks, detection and segmentation): Δ beats the frozen backbone.

    python benchmarks/detection.py --json benchmarks/results/detection.json --overlays drawn/
    python benchmarks/detection.py --images 6 --epochs 1 --seeds 1 --pixels 64
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import modelpatch as mp
from common import mobilenet, report, unpack
from dense import options, study, title
from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.task import Task
from modelpatch.tasks.detection import Detection
from modelpatch.tasks.kind import View

METHODS = (
    "linear-probe",
    "scale-bias",
    "delta(modules=4,lr=0.01,start=identity)",
)
COLUMNS = ("method", "mAP@0.5", "standard error", "mAP@0.5:0.95", "file bytes", "seconds")
DRAWN = 4  # test images


def draw(backbone: mp.Backbone, data: Task, patches: dict[str, mp.Patch], folder: Path) -> None:
    """One picture a test image: every method's boxes, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(min(DRAWN, len(data.test))):
        source = data.test.images[row]
        image = open_image(source)
        sheet = Image.new("RGB", (len(patches) * image.width, image.height))
        for place, patch in enumerate(patches.values()):
            answer = backbone.patched(patch)(patch.preprocessing(source))[0]
            view = View(data.classes, patch.preprocessing, image)
            sheet.paste(Detection().draw(answer, view), (place * image.width, 0))
        sheet.save(folder / f"{row}.jpg", quality=85)


def main() -> None:
    parser = options(__doc__, METHODS, "faster-rcnn", pixels=160, epochs=8, head_lr=1e-3)
    parser.add_argument("--task", default="bccd_voc", help="bccd_voc or raccoon_voc")
    given = parser.parse_args()
    given.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(given.task, given.cache))
    data = data if given.images is None else data.subsample(given.images)
    backbone = mp.load_backbone(mobilenet())
    rows, patches = study(backbone, data, given, ("map50", "map"), clip=5.0)
    if given.overlays:
        draw(backbone, data, patches, given.overlays)
    report(title(data, given), COLUMNS, rows, given.json)


if __name__ == "__main__":
    main()

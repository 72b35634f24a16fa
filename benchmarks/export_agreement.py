"""Exported ONNX graphs of a patch of every kind beside PyTorch: equal answers and the largest difference of a logit.

Patches are trained for a moment on a few real images, so that no change is zero, and answer real images of the task.

    python benchmarks/export_agreement.py --images 500 --json benchmarks/results/export_agreement.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.convert.exporting import check_onnx, export

KINDS = (
    "linear-probe",
    "head2toe",
    "scale-bias",
    "scale-bias(layers=channel)",
    "depthwise",
    "delta",
    "delta(modules=all,batch_norm=true)",
    "subset",
    "pruned",
    "lora",
    "piggyback(start=uniform)",
    "piggyback(ternary=true,start=uniform)",
    "packnet",
    "paint",
    "full-finetune",
    "scale-bias+depthwise",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gtsrb")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--train", type=int, default=129)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(arguments.task, arguments.cache)).subsample(arguments.train)
    rows: list[tuple[Any, ...]] = []
    for kind in arguments.only:
        backbone = mp.load_backbone(mobilenet())
        patch = mp.fit(backbone, data, kind, epochs=1, image_size=arguments.image_size, views=1)
        chosen = torch.linspace(0, len(data.test) - 1, min(arguments.images, len(data.test))).long().tolist()
        images = patch.preprocessing(*(data.test.images[row] for row in chosen))
        with tempfile.TemporaryDirectory() as folder:
            path = export(backbone, patch, Path(folder) / "model.onnx", "onnx")
            agreement = check_onnx(path, backbone.patched(patch), images)
            size = path.stat().st_size
        rows.append(
            (kind, agreement.images, agreement.equal_answers, f"{agreement.max_difference:.1e}", size, agreement.holds)
        )
    columns = ("method", "images", "equal answers", "largest difference", "ONNX bytes", "agrees")
    report(f"ONNX beside PyTorch, {arguments.task}, {arguments.image_size} px", columns, rows, arguments.json)
    if not all(row[-1] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

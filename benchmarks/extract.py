"""What `extract` keeps of a fully fine-tuned MobileNetV2, codec by codec: accuracy and bytes.

Fine-tunes the real MobileNetV2 on a real task, writes it as an ordinary checkpoint, forgets the patch, and extracts one from
the checkpoint with every codec. Figures are medians over the seeds.

    python benchmarks/extract.py --task gtsrb --json benchmarks/results/extract.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.convert.exporting import export
from modelpatch.convert.extraction import read_finetuned
from modelpatch.report.measures import CodecRow, compare_codecs
from modelpatch.train import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gtsrb")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=mp.methods.FullFinetune().lr)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--calibrate", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, help="training images at most")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack(arguments.task, arguments.cache))
    if arguments.images:
        data = data.subsample(arguments.images)
    found: dict[str, list[CodecRow]] = {}
    whole = []
    for seed in range(arguments.seeds):
        backbone = mp.load_backbone(mobilenet())
        method = mp.methods.FullFinetune(lr=arguments.lr)
        settings = {"epochs": arguments.epochs, "image_size": arguments.image_size, "seed": seed}
        patch = mp.fit(backbone, data, method, progress=True, **settings)
        whole.append(evaluate(backbone, patch, data).score)
        with tempfile.TemporaryDirectory() as folder:
            file = export(backbone, patch, Path(folder) / "checkpoint.safetensors", "safetensors")
            state = read_finetuned(backbone, file)
        rows, _ = compare_codecs(
            backbone, state, data, image_size=arguments.image_size, rank=arguments.rank, calibration=arguments.calibrate
        )
        for row in rows:
            found.setdefault(row.codec, []).append(row)
    size = sum(tensor.nbytes for tensor in state.values())
    table = [("checkpoint", f"{100 * statistics.median(whole):.2f}", size, "100.0")]
    for codec, rows in found.items():
        top1, share = statistics.median(row.top1 for row in rows), statistics.median(row.share for row in rows)
        table.append(
            (codec, f"{100 * top1:.2f}", round(statistics.median(row.file_bytes for row in rows)), f"{100 * share:.1f}")
        )
    title = f"{arguments.task}, {arguments.image_size} px, {arguments.epochs} epochs, median of {arguments.seeds}"
    report(title, ("codec", "test top-1", "bytes", "% of the checkpoint"), table, arguments.json)


if __name__ == "__main__":
    main()

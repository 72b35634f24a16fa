"""Time to the first step of a fit, and its peak memory, on many small images in files.

    python benchmarks/first_step.py                                  # this code
    python benchmarks/first_step.py --against /path/to/other/src     # another one in the same run, alternating

A row is a method at an image size: 20,000 JPEG and PNG files of 64 x 64 pixels in class folders, with a test split of 200,
fitted from the start until 20 steps are done. Memory is the peak of resident memory of the process, shared pages of
temporary files included, and of the largest of its reading processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROWS = (("scale-bias", 64), ("linear-probe", 64), ("scale-bias", 224), ("linear-probe", 224))
CLASSES = 10
STEPS = 20


def write_images(root: Path, count: int, pixels: int = 64) -> None:
    """Class folders with smooth random pictures, half of them JPEG, half PNG."""
    generator = np.random.default_rng(0)
    for split, number in (("train", count), ("test", 200)):
        for index in range(number):
            folder = root / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((pixels, pixels), Image.Resampling.BICUBIC)
            picture.save(folder / f"{index:06}.{('jpg', 'png')[index // CLASSES % 2]}")


def measure(root: Path, method: str, pixels: int) -> dict[str, float]:
    """Seconds to the first step and peak memory in MiB of one fit in this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import modelpatch as mp

    backbone = mp.load_backbone("bundled:tiny")
    task = mp.load_task(str(root))
    began, steps = time.perf_counter(), []

    def count(*_: object) -> None:
        steps.append(time.perf_counter() - began)
        if len(steps) == STEPS:
            raise KeyboardInterrupt

    register_optimizer_step_post_hook(count)
    with contextlib.suppress(KeyboardInterrupt):
        mp.fit(backbone, task, method, epochs=1, image_size=pixels)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"first_step_s": steps[0], "peak_mib": peaks[0], "reader_mib": peaks[1]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the src folder of another version")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(Path(given.one[0]), given.one[1], int(given.one[2]))))
        return
    sources = {"this": Path(__file__).parents[1] / "src"} | ({"against": given.against} if given.against else {})
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), given.images)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {given.images} images")
        for method, pixels in [ROWS[row] for row in given.rows]:
            for name, source in sources.items():
                found = subprocess.run(
                    [sys.executable, __file__, "--one", folder, method, str(pixels)],
                    env={**os.environ, "PYTHONPATH": str(source)},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert found.returncode == 0, found.stderr
                print(f"{method:13} {pixels:4} px  {name:8} {found.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()

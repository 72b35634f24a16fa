"""Resident memory of many bound patches: 50 scale-and-bias patches of MobileNetV2, each used once.

Prints the growth of resident memory beside the bytes of the patch files (the floor) and beside 50 copies of the network.
Each side runs in a process of its own.

    python benchmarks/bound_memory.py --json benchmarks/results/bound_memory.json
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import modelpatch as mp
from common import mobilenet, report, untrained
from modelpatch.engine import BoundPatch

CLASSES = 43
WARM = 3  # patches before the first measurement: the shared structure and the allocator's pools are paid once


def resident() -> int:
    """Bytes of this process that lie in memory, after freed heap was given back: it would hide what is taken next."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def make_files(folder: Path, count: int) -> list[Path]:
    """`count` patch files that differ in every number."""
    backbone = mp.load_backbone(mobilenet())
    patch = untrained(backbone, mp.methods.ScaleBias(), CLASSES, pixels=64)
    paths = [folder / f"{number:03}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        noise = torch.Generator().manual_seed(number)
        tensors = {n: t + 0.01 * torch.rand(t.shape, generator=noise) for n, t in patch.tensors.items()}
        replace(patch, tensors=tensors).save(path)
    return paths


def measure(side: str, paths: list[Path]) -> None:
    """Print by how many bytes resident memory grows with all files but the first `WARM`."""
    backbone = mp.load_backbone(mobilenet())
    images = torch.randn(1, 3, 64, 64)
    kept: list[Any] = []

    def add(path: Path) -> None:
        if side == "bound patches":
            kept.append(BoundPatch(backbone, mp.Patch.load(path)))
        elif side == "patched models":
            kept.append(backbone.patched(mp.Patch.load(path)))
        else:
            kept.append(copy.deepcopy(backbone.module))
        with torch.no_grad():
            kept[-1](images)

    for path in paths[:WARM]:
        add(path)
    before = resident()
    for path in paths[WARM:]:
        add(path)
    print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side, sorted(arguments.folder.iterdir()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), WARM + arguments.count)
        floor = sum(path.stat().st_size for path in paths[WARM:])
        for side in ("bound patches", "patched models", "copies of the network"):
            command = [sys.executable, __file__, "--side", side, "--folder", folder]
            growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append((side, round(growth / 1000), round(floor / 1000), growth / floor))
    columns = (f"{arguments.count} of", "resident kB", "patch files kB (floor)", "ratio")
    report("Memory of bound scale-and-bias patches, each used once", columns, rows, arguments.json)


if __name__ == "__main__":
    main()

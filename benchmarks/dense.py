"""What the benchmarks of segmentation and detection share: their options, and fits of every method over several seeds."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modelpatch as mp
from common import with_head_rate
from modelpatch.data.task import Task
from modelpatch.train.evaluation import standard_error


def options(
    description: str | None, methods: Sequence[str], decoder: str, *, pixels: int, epochs: int, head_lr: float
) -> argparse.ArgumentParser:
    """A parser with what both take, and these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(methods))
    parser.add_argument("--decoder", default=decoder)
    parser.add_argument("--images", type=int, help="training images; by default all")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=pixels)
    parser.add_argument("--head-lr", type=float, default=head_lr, help="decoders want a lower rate than linear heads")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--overlays", type=Path, help="a folder for pictures")
    parser.add_argument("--patches", type=Path, help="a folder for the first seed's patches")
    parser.add_argument("--json", type=Path)
    return parser


def study(
    backbone: mp.Backbone, data: Task, given: argparse.Namespace, metrics: tuple[str, str], **settings: Any
) -> tuple[list[tuple[Any, ...]], dict[str, mp.Patch]]:
    """A row a method and the first seed's patches, which are also written where `given` names a folder for them.

    A row holds the method's name, the first metric, its standard error, the second metric, bytes, seconds.
    """
    rows: list[tuple[Any, ...]] = []
    patches = {}
    settings |= {"image_size": given.pixels, "epochs": given.epochs, "batch_size": given.batch_size}
    for method in [with_head_rate(method, given.head_lr) for method in given.methods]:
        fitted = [
            mp.fit(backbone, data, method, seed=seed, progress=True, decoder=given.decoder, **settings)
            for seed in range(given.seeds)
        ]
        first, second = ([patch.metrics[f"test_{metric}"] for patch in fitted] for metric in metrics)
        seconds = statistics.fmean(patch.created["seconds"] for patch in fitted)
        size = fitted[0].inspect().file_bytes
        means = statistics.fmean(first), standard_error(first) or 0.0, statistics.fmean(second)
        rows.append((method, *means, size, seconds))
        patches[method] = fitted[0]
    if given.patches:
        given.patches.mkdir(parents=True, exist_ok=True)
        for name, patch in patches.items():
            patch.save(given.patches / f"{data.task.name}-{name.partition('(')[0]}.safetensors")
    return rows, patches


def title(data: Task, given: argparse.Namespace) -> str:
    """What a table was measured on."""
    run = f"{given.pixels} px, {given.epochs} epochs, {given.decoder}, {given.seeds} seeds"
    return f"{data.task.name}, {len(data.train)} images at {run}"

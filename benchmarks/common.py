"""What every benchmark shares: facts about the machine, the real inputs, one table and one JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import modelpatch as mp
from modelpatch_studies.data import Sources

T = TypeVar("T")
SHARED = Path(os.environ.get("MODELPATCH_SHARED", Path(__file__).parents[2] / "shared"))
SETS = ("gtsrb", "cub80_2010", "caltech101", "dtd10", "rsscn7", "pacs_sketch", "imagenette", "mnist")


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions: figures mean nothing without them."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def unpack(name: str, into: Path) -> Path:
    """A real data set, unpacked into a cache folder."""
    return Path(Sources(SHARED / "data", into).find(name))


def mobilenet() -> str:
    """The specification of the real ImageNet MobileNetV2."""
    return f"file:{SHARED / 'weights' / 'mobilenetv2_100_imagenet.safetensors'}"


def untrained(
    backbone: mp.Backbone, method: mp.methods.Method, classes: int, seed: int = 0, pixels: int = 0
) -> mp.Patch:
    """A patch as `fit` would give it, with noise where training would have moved a number and masks that keep 95 %."""
    torch.manual_seed(seed)
    model: mp.PatchedModel = method.draft(backbone, classes)
    tensors = {name: tensor.clone() for name, tensor in model.tensors().items()}
    for name, tensor in tensors.items():
        if name.startswith("mask/"):
            tensors[name] = torch.rand(tensor.shape) < 0.95
        elif tensor.is_floating_point():
            tensors[name] = tensor * (1 + 0.01 * torch.rand(tensor.shape))
    task = ("untrained", [f"class {number}" for number in range(classes)])
    preprocessing = backbone.preprocessing.with_image_size(pixels or None)
    return replace(model.to_patch(task, preprocessing=preprocessing, method=method.name), tensors=tensors)


def compare_ways(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every way in paired rounds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(rounds + 1):
        for name, way in ways.items():
            _, seconds = timed(way)
            if trial:
                times[name].append(1000 * seconds)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of paired ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result and the wall seconds it took."""
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], json_path: Path | None) -> None:
    """Print the machine and the table; write both as JSON."""
    facts = machine()
    table = Table(title=title, caption=", ".join(f"{key} {value}" for key, value in facts.items()))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)
    if json_path is not None:
        described = [dict(zip(columns, row, strict=True)) for row in rows]
        json_path.write_text(json.dumps({"title": title, "machine": facts, "rows": described}, indent=2) + "\n")


class Rows:
    """Figures by the name of their row, in a file of JSON that is written after each, so that a run goes on where it ended."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, dict[str, dict[str, Any]]()
        if path is not None and path.exists():
            self.found = {row.pop("row"): row for row in json.loads(path.read_text())["rows"]}

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless the file has it."""
        if name in self.found:
            return
        self.found[name] = measure()
        print(
            name,
            {key: round(value, 3) for key, value in self.found[name].items() if isinstance(value, float)},
            flush=True,
        )
        if self.path is not None:
            rows = [{"row": one, **figures} for one, figures in self.found.items()]
            self.path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")

    def report(self, title: str) -> None:
        """Print a table of all rows and their means."""
        columns = [key for key, value in next(iter(self.found.values())).items() if isinstance(value, float)]
        rows = [(name, *(figures[key] for key in columns)) for name, figures in self.found.items()]
        means = [statistics.fmean(float(row[place]) for row in rows) for place in range(1, len(columns) + 1)]
        report(title, ("set", *columns), [*rows, ("mean", *means)], None)

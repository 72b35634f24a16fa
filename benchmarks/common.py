"""What every benchmark shares: facts about the machine, the real inputs, one table and one JSON file."""

from __future__ import annotations

import json
import os
import platform
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

T = TypeVar("T")
SHARED = Path(os.environ.get("MODELPATCH_SHARED", Path(__file__).parents[2] / "shared"))


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
    if not (into / name).exists():
        with tarfile.open(SHARED / "data" / f"{name}.tar") as archive:
            archive.extractall(into, filter="data")
    return into / name


def mobilenet() -> str:
    """The specification of the real ImageNet MobileNetV2."""
    return f"file:{SHARED / 'weights' / 'mobilenetv2_100_imagenet.safetensors'}"


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

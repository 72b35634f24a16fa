"""Limits that a patch must keep: blocks, bytes of its file, and the time it adds to the base's.

    added latency = (t(base and patch) - t(base)) / t(base)          what both share runs once

It is measured by running both in turns on this machine at batch 1. The fastest of many runs of each counts: whatever else the
machine does makes runs slower, never faster.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.errors import TrainingError
from modelpatch.methods.method import Method
from modelpatch.patch.contents import Patch
from modelpatch.select.study import Candidate
from modelpatch.select.trials import Bench, file_bytes
from modelpatch.tasks.record import TaskRecord

WARM_UP, RUNS, PATIENCE = 5, 31, 4


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that a function takes, work on a GPU included."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def added_latency(
    backbone: Backbone,
    patch: Patch,
    *,
    batch: int = 1,
    runs: int = RUNS,
    limit: float | None = None,
    tuning: Tuning | None = None,
    timer: Callable[[Callable[[], object]], float] = seconds_of,
) -> float:
    """The share of the base's time that the patch adds, 0 for nothing; the fastest of `runs` runs of each counts.

    Both run at the patch's image size. With a `limit`, a share, up to `PATIENCE` times as many runs are made while the patch
    seems to break it. `timer` runs a function and returns the seconds that it took.
    """
    engine = Engine(backbone, {"patch": patch}, tuning=tuning or Tuning(channels_last=True), budget=2**62)
    images = torch.randn(batch, *patch.preprocessing.input_size)
    ways = partial(engine, images, only=["base"]), partial(engine, images)
    for way in ways * WARM_UP:
        way()
    times: list[tuple[float, float]] = []
    added = 0.0
    for _ in range(1 if limit is None else PATIENCE):
        times += [(timer(ways[0]), timer(ways[1])) for _ in range(runs)]
        alone, together = (min(column) for column in zip(*times, strict=True))
        added = max(0.0, (together - alone) / alone)
        if limit is None or added <= limit:
            break
    return added


def is_busy() -> bool:
    """True if other work seems to use this machine's cores now, so that measured times cannot be trusted."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    except OSError:  # this system counts no load
        return False


UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass
class Budget:
    """`blocks`, `bytes` and `latency` (0.15: the base and the patch together may take 15 % longer than the base).

    None is no limit. Latencies are measured on this machine once for every structure.
    """

    blocks: int | None = None
    bytes: int | None = None
    latency: float | None = None
    _latencies: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def why_not(self, bench: Bench, candidate: Candidate) -> str | None:
        """The reason that no patch of this candidate can keep the budget, known without training it; None if one may."""
        if self.blocks is not None and len(candidate.blocks) > self.blocks:
            return f"{len(candidate.blocks)} blocks"
        if self.bytes is not None:
            size = file_bytes(_draft_on(bench, candidate.method).astype(candidate.dtype or bench.settings.dtype))
            if size > self.bytes:
                return f"{size:,} bytes"
        if self.latency is not None and (added := self.added(bench, candidate.method)) > self.latency:
            return f"+{added:.0%} time"
        return None

    def added(self, bench: Bench, method: Method) -> float:
        """The added latency of the method's patches, measured once for all of their structure."""
        key = f"{method.blueprint(bench.backbone).model_dump_json()} {method.head} {method.name}"
        if key not in self._latencies:
            self._latencies[key] = added_latency(bench.backbone, _draft_on(bench, method), limit=self.latency)
        return self._latencies[key]

    def broken_by(self, backbone: Backbone, patch: Patch) -> str | None:
        """The limit that a trained patch breaks, measured anew; None if it keeps all."""
        size = file_bytes(patch)
        if self.bytes is not None and size > self.bytes:
            return f"its file has {size:,} bytes of {self.bytes:,}"
        if self.latency is not None:
            added = added_latency(backbone, patch, limit=self.latency)
            if added > self.latency:
                return f"it adds {added:.0%} time of {self.latency:.0%}"
        return None


def _draft_on(bench: Bench, method: Method) -> Patch:
    size = bench.settings.image_size or bench.backbone.preprocessing.image_size
    return draft_patch(bench.backbone, bench.data[0].task, method, size)


def draft_patch(backbone: Backbone, task: TaskRecord, method: Method, image_size: int) -> Patch:
    """An untrained patch of the method: as large as a trained one, but for masks and the facts of a run."""
    with torch.random.fork_rng(devices=[]):
        model = method.draft(backbone, len(task.classes))
    return model.to_patch(task, preprocessing=backbone.preprocessing.with_image_size(image_size), method=method)


def parse_bytes(text: str) -> int:
    """`200KB`, `1.5 MiB` or a plain number of bytes. Raises `TrainingError`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip().replace(",", "").replace("_", ""))
    if match is None or match[2].lower() not in UNITS:
        raise TrainingError(f"{text!r} is no number of bytes. Expected one like 200KB, 1.5MB or 64KiB.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_latency(text: str) -> float:
    """`+15%`, `15%` or `0.15` of the base's time. Raises `TrainingError`."""
    match = re.fullmatch(r"\+?([0-9]+(?:\.[0-9]+)?)(\s*%)?", text.strip())
    if match is None:
        raise TrainingError(f"{text!r} is no added latency. Expected a share of the base's time like +15% or 0.15.")
    return float(match[1]) / (100 if match[2] else 1)

"""What a patch adds to the time of the base, when the engine answers with both for the same image.

    added = (t(base and patch) - t(base)) / t(base)          what both share runs once

Measured here by running both in turns on this machine at batch 1. The fastest of many runs of each counts: whatever else
the machine does makes runs slower, never faster. A limit that seems broken is measured on, up to `PATIENCE` times as long,
before the patch is given up for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.patch.contents import Patch

WARM_UP, RUNS, PATIENCE = 5, 31, 4


def added_latency(
    backbone: Backbone,
    patch: Patch,
    *,
    batch: int = 1,
    runs: int = RUNS,
    limit: float | None = None,
    tuning: Tuning | None = None,
) -> float:
    """The share of the base's time that the patch adds, 0 for nothing; the fastest of `runs` runs of each counts.

    Both run at the patch's image size. With a `limit`, a share, up to `PATIENCE` times as many runs are made while the patch
    seems to break it. `tuning` is how the engine computes; by default with channels last and as it is.
    """
    engine = Engine(backbone, {"patch": patch}, tuning=tuning or Tuning(channels_last=True), budget=2**62)
    images = torch.randn(batch, *patch.preprocessing.input_size)
    ways = partial(engine, images, only=["base"]), partial(engine, images)
    for _ in range(WARM_UP):
        for way in ways:
            way()
    times: list[tuple[float, float]] = []
    added = 0.0
    for _ in range(1 if limit is None else PATIENCE):
        times += [(_seconds(ways[0]), _seconds(ways[1])) for _ in range(runs)]
        alone, together = (min(column) for column in zip(*times, strict=True))
        added = max(0.0, (together - alone) / alone)
        if limit is None or added <= limit:
            break
    return added


def is_busy() -> bool:
    """Whether other work seems to use this machine's cores now, so that times measured here are not to be trusted."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    except OSError:  # this system counts no load
        return False


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin

"""What a patch adds to the time of the base, when the engine answers with both for the same image.

    added = (t(base and patch) - t(base)) / t(base)          what both share runs once

Measured here by running both in turns on this machine at batch 1. The fastest of many runs of each counts: whatever else
the machine does makes runs slower, never faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from modelpatch.backbone import Backbone
from modelpatch.engine import Engine, Tuning
from modelpatch.patch import Patch

WARM_UP, RUNS = 5, 31


def added_latency(
    backbone: Backbone, patch: Patch, *, batch: int = 1, runs: int = RUNS, tuning: Tuning | None = None
) -> float:
    """The share of the base's time that the patch adds, 0 for nothing; the fastest of `runs` runs of each counts.

    Both run at the patch's image size. `tuning` is how the engine computes; by default with channels last and as it is.
    """
    engine = Engine(backbone, {"patch": patch}, tuning=tuning or Tuning(channels_last=True), budget=2**62)
    images = torch.randn(batch, *patch.preprocessing.input_size)
    ways = partial(engine, images, only=["base"]), partial(engine, images)
    for _ in range(WARM_UP):
        for way in ways:
            way()
    alone, together = (
        min(times) for times in zip(*([_seconds(way) for way in ways] for _ in range(runs)), strict=True)
    )
    return max(0.0, (together - alone) / alone)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin

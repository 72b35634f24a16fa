"""What a patch adds to the time of the base, when both answer for the same image.

    added = (t(base and patch) - t(base)) / t(base)          the frozen prefix runs once for both

Measured here by running both in turns on this machine at batch 1. The fastest of many runs of each counts: whatever else
the machine does makes runs slower, never faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from modelpatch.backbone import Backbone
from modelpatch.patch import PatchedModel

WARM_UP, RUNS = 5, 31


@torch.no_grad()
def added_latency(
    backbone: Backbone, model: PatchedModel, image_size: int, *, batch: int = 1, runs: int = RUNS
) -> float:
    """The share of the base's time that the patch adds, 0 for nothing; the fastest of `runs` runs of each counts."""
    images = torch.randn(batch, *backbone.preprocessing.with_image_size(image_size).input_size)
    images = images.to(backbone.device).contiguous(memory_format=torch.channels_last)
    chain, end, first = backbone.chain, len(backbone.chain), model.eval().first

    def base() -> None:
        chain.head(chain.run(images, 0, end))

    def both() -> None:
        x = chain.run(images, 0, first)
        features, base = model.streams(x, first)
        if base is None:
            chain.head(chain.run(x, first, end))
            model.head(features)
        else:
            chain.head(base)
            model.head(torch.cat([features, base], 1))

    for _ in range(WARM_UP):
        base()
        both()
    pairs = [(_seconds(base), _seconds(both)) for _ in range(runs)]
    alone, together = (min(seconds) for seconds in zip(*pairs, strict=True))
    return max(0.0, (together - alone) / alone)


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin

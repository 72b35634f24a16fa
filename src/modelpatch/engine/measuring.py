"""The settings that are faster on this machine: the backbone is timed with and without each, alternately, the others being on.

Settings depend on one another (folded convolutions are fast on channels-last images), so all are on at first, and those that
make nothing faster are switched off. The least of all times counts: other work on the machine only adds to it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import CACHE, FrozenBackbone, Tuning, has_bfloat16, lay, sample

NOTICEABLE = 1.02  # a setting that is not at least this much faster stays off
MOST_PAIRS = 15


def measure(backbone: Backbone, *, bfloat16: bool = False, rows: int = 8, seconds: float = 4.0) -> Tuning:
    """Time the backbone with and without each setting, on `rows` images and on one, and keep what makes it faster.

    Takes about `seconds`, and at least two passes of every way. `bfloat16` allows 16 bits where the processor has them.
    """
    images = sample(backbone.input_size, backbone.device)[:1].repeat(rows, 1, 1, 1)
    trials: dict[str, Any] = {"channels_last": True, "fold": True}
    trials |= {"piece_bytes": CACHE} if backbone.device.type == "cpu" else {}
    trials |= {"bfloat16": True} if bfloat16 and has_bfloat16(backbone.device) else {}
    chosen, notes = Tuning(**trials), []
    share = seconds / (2 * len(trials) + 3)
    for name in trials:
        without = replace(chosen, **{name: getattr(Tuning(), name)})
        frozen = [FrozenBackbone(backbone, tuning) for tuning in (without, chosen)]
        ways = [partial(one.run, end=len(backbone.chain)) for one in frozen]
        speedups = [_ratio(ways, batch, share) for batch in (images[:1], images)]
        better = prod(speedups) > NOTICEABLE
        chosen = chosen if better else without
        state = "on" if better else "off"
        notes.append(f"  {name}: {speedups[0]:.2f}x on 1 image, {speedups[1]:.2f}x on {rows}: {state}")
    merge_rows, note = _measure_merging(backbone, chosen, share)
    return replace(chosen, merge_rows=merge_rows, measured=(*notes, note))


def _measure_merging(backbone: Backbone, tuning: Tuning, seconds: float) -> tuple[int, str]:
    """The largest of 1, 4 and 16 rows at which four streams through the last stage are faster concatenated."""
    segments = backbone.chain.stages[-1] if backbone.chain.stages else backbone.chain.segments[-1:]
    frozen = FrozenBackbone(backbone, replace(tuning, bfloat16=False))
    modules = [frozen.module(segment.index) for segment in segments]
    largest, notes = 0, []

    def through(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    for rows in (1, 4, 16):
        stream = lay(torch.randn(rows, *segments[0].input_shape, device=backbone.device), tuning)
        ways = [lambda x: [through(x) for _ in range(4)], lambda x: through(torch.cat([x, x, x, x])).split(len(x))]
        speedup = _ratio(ways, stream, seconds)
        notes.append(f"{speedup:.2f}x at {rows}")
        if speedup > NOTICEABLE:
            largest = rows
    return largest, f"  4 streams concatenated: {', '.join(notes)} rows: up to {largest}"


def least_seconds(work: Callable[[], object], device: torch.device, runs: int = 15) -> float:
    """The least time of `runs` runs, after two that do not count."""
    times = [_seconds(lambda _: work(), torch.empty(0, device=device)) for _ in range(2 + runs)]
    return min(times[2:])


@torch.inference_mode()
def _ratio(ways: Sequence[Callable[[Tensor], object]], x: Tensor, seconds: float) -> float:
    """The speedup of the second way: the least times of paired runs, as many as fit, after one that compiles."""
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    for way in ways:
        _seconds(way, x)
    while not pairs or (time.perf_counter() < end and len(pairs) < MOST_PAIRS):
        pairs.append((_seconds(ways[0], x), _seconds(ways[1], x)))
    return min(first for first, _ in pairs) / min(second for _, second in pairs)


def _seconds(way: Callable[[Tensor], object], x: Tensor) -> float:
    start = time.perf_counter()
    way(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start

"""PAINT's curve beside the ways that fix the trade-off while training: one task patched, others supported.

    paint            alpha from 0 to 1 over one fine-tuning
    early stopping   the weights at several moments of the same fine-tuning
    EMA              the moving average of the weights in the same fine-tuning
    l2, ewc, lwf, mix   one fine-tuning for each of several strengths (see `methods/keeping.py`)
    lr               one fine-tuning for each of several learning rates

Ilharco et al. (NeurIPS 2022), figure 5: the alpha-curve should match or dominate all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.methods.keeping import EWC, L2, Keeper, LwF, Mix, Recorder
from modelpatch.methods.paint import Paint
from modelpatch.recipes.painting import HeadMaker, Painter, PaintSettings
from modelpatch.recipes.tradeoff import Point

BASELINES = ("early-stopping", "ema", "l2", "ewc", "lwf", "mix", "lr")
STRENGTHS = {"l2": (1e-2, 1e-1, 1.0), "ewc": (1.0, 1e2, 1e4), "lwf": (0.1, 1.0, 10.0), "mix": (0.1, 1.0, 10.0)}
RATES = (0.01, 0.1, 3.0)  # times the method's learning rate
FISHER_IMAGES = 256  # of every supported task


@dataclass(frozen=True)
class Frontier:
    """Trade-offs by the name of what made them; `base` is the unpatched model."""

    base: Point
    curves: dict[str, tuple[Point, ...]]

    def best(self, name: str) -> float:
        """The highest combined accuracy of a curve's points that validation images choose."""
        return max(self.curves[name], key=lambda point: point.combined("validation")).combined("test")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        curves = {name: [point.as_dict() for point in points] for name, points in self.curves.items()}
        return {"base": self.base.as_dict(), "curves": curves}


def frontier(
    backbone: Backbone,
    data: Task,
    supported: Sequence[Task],
    baselines: Sequence[str] = BASELINES,
    *,
    method: Paint | None = None,
    heads: HeadMaker | None = None,
    progress: bool = False,
    exploration: PaintSettings | None = None,
    moments: int = 8,
    decay: float = 0.99,
    **settings: Any,
) -> Frontier:
    """PAINT's curve and those of `baselines` with the same heads, images and steps. Raises `TrainingError`."""
    if unknown := sorted(set(baselines) - set(BASELINES)):
        raise TrainingError(f"there is no baseline {unknown[0]!r}. Expected some of: {', '.join(BASELINES)}.")
    painter = Painter(
        backbone, [data], supported, method or Paint(), heads, exploration or PaintSettings(), progress, settings
    )
    recorder = Recorder(moments, decay)
    batch, heads_kept = settings.get("batch_size", 32), [one.head for one in painter.supported]

    def images(limit: int | None = None) -> list[Callable[[], Any]]:
        return [partial(painter.scorer.labelled, one.data.train, batch, limit) for one in painter.supported]

    keepers: dict[str, Callable[[float], Keeper]] = {
        "l2": L2,
        "ewc": lambda strength: EWC(strength, heads_kept, images(FISHER_IMAGES)),
        "lwf": lambda strength: LwF(strength, heads_kept),
        "mix": lambda strength: Mix(strength, heads_kept, images()),
    }
    patch, tuned = painter.fine_tune(painter.patched, keeper=recorder)
    tasks = [*tuned, *painter.supported]
    curves = {"paint": tuple(painter.sweep([patch], [(alpha,) for alpha in painter.grid], tasks))}
    moved = [*recorder.snapshots, dict(patch.tensors)]
    recorded = {
        "early-stopping": [(number / recorder.moments, one) for number, one in enumerate(moved, 1)],
        "ema": [(recorder.decay, recorder.average)],
    }
    for name in baselines:
        if name in recorded:
            points = [
                painter.scorer.point(replace(patch, tensors=one), tasks, (place,)) for place, one in recorded[name]
            ]
        elif name in keepers:
            points = [_trained(painter, strength, keepers[name](strength)) for strength in STRENGTHS[name]]
        else:
            continue
        curves[name] = tuple(points)
    if "lr" in baselines:
        rate, points = painter.method.lr, []
        for factor in RATES:
            painter.method = replace(painter.method, lr=rate * factor)
            points.append(_trained(painter, rate * factor))
        curves["lr"] = tuple(points)
    backbone.verify()
    return Frontier(painter.base(), curves)


def _trained(painter: Painter, place: float, keeper: Keeper | None = None) -> Point:
    """One fine-tuning as it ends."""
    patch, tuned = painter.fine_tune(painter.patched, keeper=keeper)
    return painter.scorer.point(patch, [*tuned, *painter.supported], (place,))

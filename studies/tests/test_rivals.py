"""What PAINT is compared with: every rival trades off on the same tasks, and a strong penalty keeps the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelpatch as mp
from conftest import color_task
from modelpatch.errors import TrainingError
from modelpatch.heads import LinearHead
from modelpatch.methods import L2, Keeper, LwF, Paint, with_loss
from modelpatch.recipes import PaintSettings
from modelpatch.tasks import TaskRecord
from modelpatch_studies.rivals import BASELINES, EWC, STRENGTHS, Mix, frontier
from modelpatch_studies.scoring import Reader

pytestmark = pytest.mark.slow


def task(name: str, classes: tuple[str, ...], seed: int) -> mp.Task:
    return replace(color_task(24, seed=seed), task=TaskRecord(name=name, classes=classes))


NEW, OLD = task("new", ("red", "green", "blue"), 0), task("old", ("x", "y", "z"), 3)


def heads(classes: Sequence[str]) -> nn.Module:
    """A head that depends on the names of its classes alone."""
    torch.manual_seed(sum(map(ord, "".join(classes))))
    return LinearHead(16, len(classes)).requires_grad_(False)


def test_all_baselines_trade_off_on_the_same_tasks(tiny: mp.Backbone) -> None:
    curves = frontier(tiny, NEW, [OLD], heads, moments=4, exploration=PaintSettings(steps=3), epochs=1, batch_size=4)
    assert list(curves) == ["paint", *BASELINES[:2], *STRENGTHS, "lr"]
    lengths = {name: len(points) for name, points in curves.items()}
    assert lengths == {"paint": 3, "early-stopping": 4, "ema": 1, "l2": 3, "ewc": 3, "lwf": 3, "mix": 3, "lr": 3}
    assert curves["early-stopping"][-1].tasks == curves["paint"][-1].tasks
    assert [point.weights for point in curves["ewc"]] == [(strength,) for strength in STRENGTHS["ewc"]]
    with pytest.raises(TrainingError, match="no baseline 'magic'"):
        frontier(tiny, NEW, [OLD], heads, ["magic"])


@pytest.mark.parametrize("name", ["l2", "ewc", "lwf", "mix"])
def test_a_strong_keeper_keeps(tiny: mp.Backbone, name: str) -> None:
    """With a huge strength the change is smaller (l2, ewc) or its effect on the supported task is (lwf, mix)."""
    reader, old = Reader(tiny, tiny.preprocessing), heads(OLD.classes)
    labelled = partial(reader.images, OLD.train, 8, shuffle=True)

    def keeper(strength: float) -> Keeper:
        if name == "l2":
            return L2(strength)
        if name == "lwf":
            return LwF(strength, [old])
        return (EWC if name == "ewc" else Mix)(strength, [old], [labelled])

    def cost(strength: float) -> float:
        settings = {"exploration": PaintSettings(steps=2, interpolate=False), "epochs": 3, "batch_size": 8}
        method = with_loss(Paint(lr=3e-2), keeper(strength))
        painting = mp.paint(tiny, NEW, OLD, method=method, heads=heads, **settings)  # type: ignore[arg-type]
        if name == "l2":
            return 1 - painting.cosine
        base, moved = (
            old(reader.features(tiny.patched(painting.patch.at_strength(alpha)), OLD.test)) for alpha in (0, 1)
        )
        if name == "mix":
            return float(F.cross_entropy(moved, torch.from_numpy(OLD.test.labels)))
        return float(F.kl_div(moved.log_softmax(1), base.softmax(1), reduction="batchmean"))

    assert cost(30.0) < cost(0.0)

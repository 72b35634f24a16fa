"""A search keeps its budget, proposes what can be made, and reports what no other proposal beats."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from conftest import color_task, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import MethodError, TrainingError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.registry import make_method, spellings
from modelpatch.patch.contents import Patch
from modelpatch.select import search
from modelpatch.select.budget import PATIENCE, added_latency, draft_patch
from modelpatch.select.searching import Proposal, Search, front, propose, weigh
from modelpatch.select.study import Candidate, Score, profile
from modelpatch.select.trials import file_bytes

pytestmark = pytest.mark.slow

FAST = {"epochs": 3, "batch_size": 8, "tries": 6}


def run(backbone: Backbone, *arguments: object, **options: object) -> Search:
    return search(backbone, color_task(30), *arguments, **{**FAST, **options})  # type: ignore[arg-type]


def test_the_patch_keeps_the_bytes_and_is_the_best_of_those_that_do(tiny: Backbone) -> None:
    limit = 5000
    result = run(tiny, max_bytes=limit)
    assert file_bytes(result.patch) == result.patch.inspect().file_bytes <= limit
    kept = [one for one in result.proposals if one.kept and one.score.file_bytes <= limit]
    best = max(kept, key=lambda one: (one.score.top1, -one.score.file_bytes))
    near = [one for one in kept if one.score.top1 >= best.score.top1 - result.error]
    assert result.best is best.candidate
    assert result.chosen in [one.candidate for one in near]
    assert any(reason.endswith("bytes") for reason in result.left_out.values())
    assert {tensor.dtype for tensor in result.patch.tensors.values() if tensor.is_floating_point()} == {torch.float16}
    json.dumps(result.as_dict())


def test_a_latency_of_nothing_leaves_the_methods_that_add_none(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(backbone: Backbone, patch: Patch, **_: object) -> float:
        return (len(backbone.chain) - backbone.patched(patch).first) / len(backbone.chain)

    monkeypatch.setattr("modelpatch.select.budget.added_latency", known)
    assert run(tiny, max_latency=0.0).chosen.method == LinearProbe()
    loose = run(tiny, max_latency=0.5)
    assert all(one.latency <= 0.5 for one in loose.proposals)
    assert any(one.latency > 0 for one in loose.proposals)


def test_the_linear_probe_is_always_drawn(tiny: Backbone) -> None:
    for seed in range(3):
        result = run(tiny, tries=2, seed=seed)
        assert len(result.proposals) == 2
        assert sum(isinstance(one.candidate.method, LinearProbe) for one in result.proposals) == 1
        assert "not drawn among 2 tries" in set(result.left_out.values())


@pytest.mark.parametrize(("calm", "rounds"), [(1, 1), (3, 3), (9, PATIENCE)])
def test_a_latency_above_its_limit_is_measured_on(tiny: Backbone, calm: int, rounds: int) -> None:
    """The base takes 1 s, base and patch 2 s beside other work, and 1.1 s from the run `calm` on."""
    calls: list[None] = []

    def seconds(work: object) -> float:
        calls.append(None)
        return 1.0 if len(calls) % 2 else (1.1 if len(calls) // 2 >= calm else 2.0)

    patch = draft_patch(tiny, color_task().task, LinearProbe(), 16)
    added = added_latency(tiny, patch, runs=1, limit=0.15, timer=seconds)
    assert added == pytest.approx(0.1 if calm <= PATIENCE else 1.0)
    assert len(calls) == 2 * rounds


def test_a_budget_that_nothing_keeps_names_what_comes_closest(tiny: Backbone) -> None:
    with pytest.raises(TrainingError, match="nothing keeps the budget, stored as float16"):
        run(tiny, max_bytes=10)


def test_proposals_are_all_different_and_hold_every_number_of_modules(tiny: Backbone) -> None:
    left_out: dict[str, str] = {}
    profiled = profile(tiny, color_task(), epochs=1, batch_size=8)
    found = list(propose(tiny, spellings("searched"), profiled, left_out))
    known = [json.dumps([one.method.name, one.method.hyperparameters()]) for one in found]
    assert len(set(known)) == len(known)
    changes = [
        (one.method.name, getattr(one.method, "lr", None), one.method.blueprint(tiny).model_dump_json())
        for one in found
        if one.method.name == "subset"
    ]
    assert len(set(changes)) == len(changes)  # blocks=last is the last block by name
    assert len({one.name for one in found}) == len(found)
    numbers = {one.method.modules for one in found if isinstance(one.method, DeltaNetwork)}
    assert numbers == {1, 2}
    best = max(profiled.rows, key=lambda row: row.score.top1).blocks
    assert best in {one.blocks for one in found}
    assert sum(one.method.name == "linear-probe" for one in found) == 1


def test_the_front_holds_what_nothing_beats() -> None:
    def proposal(top1: float, size: int, latency: float, kept: bool = True) -> Proposal:
        return Proposal(Candidate("c", (), LinearProbe()), Score(1, (top1,), size, 1.0), latency, kept)

    good, small, beaten, early = (
        proposal(0.9, 100, 0.5),
        proposal(0.5, 10, 0.5),
        proposal(0.4, 10, 0.5),
        proposal(1.0, 1, 0.0, kept=False),
    )
    assert good.beats(proposal(0.9, 100, 0.6))
    assert not good.beats(good)
    assert front((good, small, beaten, early)) == (good, small)


def proposal(top1: float, size: int = 10, latency: float = 0.0, epochs: int = 1) -> Proposal:
    return Proposal(Candidate("c", (), LinearProbe()), Score(epochs, (top1,), size, 1.0), latency, True)


def test_a_cheaper_proposal_within_the_error_comes_first() -> None:
    best, cheap, small, worse = (
        proposal(0.9, 90, 0.85),
        proposal(0.875, 90, 0.04),
        proposal(0.86, 9, 0.06),
        proposal(0.6, 1),
    )
    unfinished = proposal(0.9, 1, 0.0, epochs=0)
    every = [best, cheap, small, worse, unfinished]
    assert best.score.error_on(40) == pytest.approx(math.sqrt(37 / 42 * 5 / 42 / 40))
    assert weigh(every, 40, 1.0) == [small, cheap, best, worse, unfinished]  # one picture of 40 is no difference
    assert weigh(every, 40_000, 1.0) == every
    assert weigh(every, 40, 0.0) == every
    assert weigh([], 40, 1.0) == []
    assert proposal(1.0).score.error_on(40) > 0


def test_folds_that_disagree_make_the_error_larger() -> None:
    score = Score(1, (0.5, 0.9), 10, 1.0)
    assert score.error_on(10_000) == pytest.approx(score.error) == pytest.approx(0.2)


def test_what_fits_as_int8_alone_is_proposed_so() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU()) for _ in range(2)]
    layers = [nn.Conv2d(3, 48, 3, 4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)]
    backbone = load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())
    task, method = color_task(30).task, make_method("subset")
    half, packed = (file_bytes(draft_patch(backbone, task, method, 16).astype(dtype)) for dtype in ("float16", "int8"))
    limit = (half + packed) // 2
    result = run(backbone, ["subset"], max_bytes=limit, epochs=1)
    stored = {one.candidate.name: one.candidate.dtype for one in result.proposals}
    assert "int8" in stored.values()
    assert all(name.endswith(", int8") == (dtype == "int8") for name, dtype in stored.items())
    assert result.patch.int8
    assert file_bytes(result.patch) <= limit
    plain = run(backbone, ["subset"], max_bytes=limit, dtype="float16", epochs=1)
    assert not any(one.candidate.dtype for one in plain.proposals)


def test_a_margin_that_makes_no_sense_is_refused(tiny: Backbone) -> None:
    with pytest.raises(TrainingError, match="margin = -1 is not valid"):
        run(tiny, margin=-1)


def test_a_method_that_does_not_exist_is_refused_before_any_work(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match="no method 'best'"):
        run(tiny, ["best"])

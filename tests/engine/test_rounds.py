"""Cascades in an engine: rows leave when a stage is sure, and what stages share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.cascade import Cascade, Confidence
from modelpatch.engine.engine import Engine
from modelpatch.errors import EngineError
from modelpatch.heads.base import HeadRecord
from modelpatch.heads.reading import pooled_width
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from tolerance import close

pytestmark = pytest.mark.slow

PICTURES = list(np.random.default_rng(0).integers(0, 255, (9, 40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


def patch_of(backbone: Backbone, method: Method, pixels: int = 16, seed: int = 0) -> Patch:
    patch = draft_patch(backbone, method, seed=seed)
    return replace(patch, preprocessing=patch.preprocessing.with_image_size(pixels))


def exit_at(backbone: Backbone, tap: int) -> Patch:
    """A patch whose head reads an inner segment alone."""
    width = pooled_width(backbone.chain, tap)
    generator = torch.Generator().manual_seed(tap)
    return replace(
        draft_patch(backbone),
        head=HeadRecord(kind="selected", features=width, outputs=3, taps=(tap,)),
        tensors={
            "head.weight": torch.randn(3, width, generator=generator),
            "head.bias": torch.zeros(3),
            "head.selected": torch.arange(width, dtype=torch.int32),
        },
    )


def solo(backbone: Backbone, patch: Patch) -> Tensor:
    with torch.no_grad():
        return backbone.patched(patch)(patch.preprocessing(*PICTURES))


def by_hand(backbone: Backbone, cascade: Cascade) -> tuple[Tensor, Tensor]:
    """Logits and stages of a cascade whose patches all see all pictures."""
    answers = [solo(backbone, patch) for patch in cascade.patches]
    stages = torch.full((len(PICTURES),), -1)
    for number, (logits, confidence) in enumerate(zip(answers, cascade.confidences, strict=True)):
        stages[(stages < 0) & confidence.sure(logits)] = number
    return torch.stack(answers)[stages, torch.arange(len(PICTURES))], stages


def splitting(backbone: Backbone, patches: Sequence[Patch]) -> Cascade:
    """A cascade whose stages each answer about a third of what reaches them."""
    confidences, left = [], torch.ones(len(PICTURES), dtype=torch.bool)
    for patch in patches[:-1]:
        scores = Confidence().score(solo(backbone, patch))
        threshold = float(scores[left].quantile(0.66))
        confidences.append(Confidence(threshold=threshold))
        left &= scores < threshold
    return Cascade(patches=tuple(patches), confidences=(*confidences, Confidence()))


CASES = ("resolutions", "fork", "heads", "exit", "siamese", "three")


def case(backbone: Backbone, name: str) -> list[Patch]:
    last, early = Subset(("stage2.1",)), Subset(("stage2.0", "stage2.1"))
    return {
        "resolutions": [patch_of(backbone, ScaleBias(), size, seed=size) for size in (16, 24, 32)],
        "fork": [patch_of(backbone, last, seed=1), patch_of(backbone, early, seed=2)],
        "heads": [patch_of(backbone, LinearProbe(), seed=1), patch_of(backbone, LinearProbe(), seed=2)],
        "exit": [exit_at(backbone, 3), patch_of(backbone, last, seed=2)],
        "siamese": [patch_of(backbone, last, seed=1), patch_of(backbone, Subset(("last",), head="siamese"), seed=2)],
        "three": [
            patch_of(backbone, LinearProbe(), seed=1),
            patch_of(backbone, last, seed=2),
            patch_of(backbone, early, seed=3),
            patch_of(backbone, Subset(("stage2.1",)), 24, seed=4),
        ],
    }[name]


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_answer_of_the_stage_that_is_sure_of_it(backbone: Backbone, name: str) -> None:
    cascade = splitting(backbone, case(backbone, name))
    expected, stages = by_hand(backbone, cascade)
    assert len(set(stages.tolist())) == len(cascade.patches)  # every stage has something to answer
    engine = Engine(backbone, {"signs": cascade, "other": draft_patch(backbone, seed=5)}, tuning=Tuning())
    routed = engine.route(PICTURES)["signs"]
    assert torch.equal(routed.stages, stages)
    torch.testing.assert_close(routed.logits, expected)
    answers = engine(PICTURES)
    assert list(answers) == ["base", "signs", "other"]
    assert close(answers["signs"], routed.logits)
    alone = Engine(backbone, {"other": draft_patch(backbone, seed=5)}, tuning=Tuning())
    torch.testing.assert_close(answers["other"], alone(PICTURES)["other"])


@pytest.mark.parametrize("name", CASES)
def test_what_stages_compute_alike_is_computed_once(backbone: Backbone, name: str) -> None:
    """The operations that torch counts are those of the rows that reach each stage, shared prefixes left out."""
    patches = case(backbone, name)
    cascade = splitting(backbone, patches)
    _, stages = by_hand(backbone, cascade)
    names = [f"p{number}" for number in range(len(patches))]
    costs = Engine(backbone, dict(zip(names, patches, strict=True)), tuning=Tuning()).stage_costs(names)
    reached = [int((stages >= number).sum()) for number in range(len(patches))]
    heads = [rows * patch.head.features * patch.head.outputs for rows, patch in zip(reached, patches, strict=True)]
    engine = Engine(backbone, {"signs": cascade}, tuning=Tuning())
    batches = engine.read(PICTURES, ["signs"])
    with FlopCounterMode(display=False) as counter:
        engine.route(batches, ["signs"])
    counted = counter.get_total_flops() // 2
    assert counted == round(sum(c * r for c, r in zip(costs, reached, strict=True))) + sum(heads)


def test_shared_prefixes_make_later_stages_cheap(backbone: Backbone) -> None:
    engine = Engine(
        backbone,
        {
            "head": patch_of(backbone, LinearProbe()),
            "last": patch_of(backbone, Subset(("stage2.1",))),
            "large": patch_of(backbone, Subset(("stage2.1",)), 32),
        },
        tuning=Tuning(),
    )
    whole = sum(segment.macs for segment in backbone.chain)
    first, last, large = engine.stage_costs(["head", "last", "large"])
    assert first == pytest.approx(whole)
    after = next(segment.index for segment in backbone.chain if segment.name == "stage2.1")
    assert last == pytest.approx(sum(segment.macs for segment in backbone.chain[after:]))
    assert large == pytest.approx(4 * whole)  # four times the pixels, and nothing to share with 16 px


@pytest.mark.parametrize(("threshold", "stage"), [(-1.0, 0), (2.0, 1)])
def test_one_stage_may_answer_all(backbone: Backbone, threshold: float, stage: int) -> None:
    patches = case(backbone, "fork")
    cascade = Cascade(patches=tuple(patches), confidences=(Confidence(threshold=threshold), Confidence()))
    routed = Engine(backbone, {"signs": cascade}, tuning=Tuning()).route(PICTURES, ["signs"])["signs"]
    assert set(routed.stages.tolist()) == {stage}
    torch.testing.assert_close(routed.logits, solo(backbone, patches[stage]))


def test_rows_and_streams_take_a_cascade_for_one_task(backbone: Backbone) -> None:
    cascade = splitting(backbone, case(backbone, "resolutions"))
    engine = Engine(backbone, {"signs": cascade, "other": draft_patch(backbone)}, tuning=Tuning())
    whole = engine(PICTURES)
    names = ["signs", "other", "base"] * 3
    for row, (name, logits) in enumerate(zip(names, engine(PICTURES, tasks=names), strict=True)):
        torch.testing.assert_close(logits, whole[name][row])
    torch.testing.assert_close(engine.answer(PICTURES, {"signs": [1, 4, 7]})["signs"], whole["signs"][[1, 4, 7]])
    streamed = torch.cat([one.logits["signs"] for one in engine.stream(PICTURES, only=["signs"], batch_size=4)])
    torch.testing.assert_close(streamed, whole["signs"])
    assert engine.route([], ["signs"])["signs"].logits.shape == (0, 3)


def test_one_batch_does_for_a_cascade_of_one_resolution(backbone: Backbone) -> None:
    one = Engine(backbone, {"signs": splitting(backbone, case(backbone, "fork"))}, tuning=Tuning())
    images = backbone.preprocessing(*PICTURES)
    torch.testing.assert_close(one(images)["signs"], one(PICTURES)["signs"])
    several = Engine(backbone, {"signs": splitting(backbone, case(backbone, "resolutions"))}, tuning=Tuning())
    with pytest.raises(EngineError, match="signs sees images in 3 ways, at 16, 24, 32 px"):
        several(images, only=["signs"])
    assert several(images, only=["base"])["base"].shape == (9, 5)


def test_the_plan_and_its_times_are_those_of_all_stages(backbone: Backbone) -> None:
    engine = Engine(backbone, {"signs": splitting(backbone, case(backbone, "fork"))}, tuning=Tuning())
    plan = engine.plan_for(4, ["signs"])
    assert [member.name for member in plan.members] == ["signs (stage 1)", "signs (stage 2)"]
    assert plan.flops < plan.separate_flops
    explained, timings = engine.explain(PICTURES, ["signs"])
    assert explained.members == engine.plan_for(9, ["signs"]).members
    assert timings


def test_programs_of_a_cascade_are_kept_and_leave_with_it(backbone: Backbone) -> None:
    engine = Engine(backbone, {"signs": splitting(backbone, case(backbone, "fork"))}, tuning=Tuning())
    for _ in range(3):
        engine(PICTURES, only=["signs"])
    assert len(engine._programs) == 2
    engine.swap("signs", draft_patch(backbone))
    assert not engine._programs
    engine.remove("signs")
    assert engine.residency._known == {}


def test_a_cascade_file_is_a_task(backbone: Backbone, tmp_path: Path) -> None:
    cascade = splitting(backbone, case(backbone, "fork"))
    path = cascade.save(tmp_path / "signs.json")
    read = Engine(backbone, {"signs": path}, tuning=Tuning())(PICTURES)["signs"]
    assert close(read, Engine(backbone, {"signs": cascade}, tuning=Tuning())(PICTURES)["signs"])


def test_any_tuning_gives_the_same_answers(backbone: Backbone) -> None:
    cascade = splitting(backbone, case(backbone, "three"))
    expected, _ = by_hand(backbone, cascade)
    tuning = Tuning(channels_last=True, fold=True, piece_bytes=2**16, merge_rows=8)
    engine = Engine(backbone, {"signs": cascade}, tuning=tuning, eager=True)
    torch.testing.assert_close(engine(PICTURES)["signs"], expected, rtol=1e-4, atol=1e-4)

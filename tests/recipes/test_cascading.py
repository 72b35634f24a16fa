"""Cascades are built greedily: never less accurate than asked on held-out images, and never without an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import color_task, draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.engine.cascade import Cascade, Confidence
from modelpatch.errors import CascadeError, DataError
from modelpatch.patch.contents import Patch
from modelpatch.recipes.cascading import (
    PROBABILITY,
    CascadeResult,
    cascade,
    evaluate_cascade,
    fit_confidence,
    greedy,
    held_out,
    run,
    smallest_threshold,
)
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import fit

COSTS = {"small": 1e6, "middle": 2e6, "large": 4e6}


def plain_cost(name: str, before: Sequence[str] = ()) -> float:
    return COSTS[name]


def answers(right: Tensor, sure: Tensor) -> Tensor:
    """Logits of two classes, class 0 being right, whose largest probability is the sigmoid of `sure`."""
    return torch.stack([torch.where(right, sure, -sure), torch.zeros(len(right))], 1)


def random_answers(seed: int, count: int = 40) -> tuple[dict[str, Tensor], Tensor]:
    """Patches that are right more often where they are sure; the costly ones more often everywhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = {}
    for name, skill in zip(COSTS, (0.45, 0.6, 0.7), strict=True):
        sure = (3 * torch.rand(count, generator=generator)).round(decimals=1) + 0.1  # with ties
        right = torch.rand(count, generator=generator) < skill + 0.1 * sure
        logits[name] = answers(right, sure)
    return logits, torch.zeros(count, dtype=torch.long)


# thresholds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_threshold_is_that_of_trying_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (5 * torch.rand(12, generator=generator)).round() / 5
    gains = torch.randint(-1, 2, (12,), generator=generator).double()
    allowed = [float(t) for t in scores.unique() if float(gains[scores >= t].sum()) >= 0]
    assert smallest_threshold(scores, gains) == (min(allowed) if allowed else None)


@pytest.mark.parametrize("seed", range(20))
def test_caution_asks_for_standard_errors_to_spare(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (5 * torch.rand(12, generator=generator)).round() / 5
    gains = torch.randint(-1, 3, (12,), generator=generator).double()
    allowed = []
    for t in scores.unique():
        own = gains[scores >= t]
        error = float(own.std(correction=0)) * len(own) ** 0.5  # of the sum
        if float(own.sum()) >= 1.5 * error - 1e-9:
            allowed.append(float(t))
    assert smallest_threshold(scores, gains, 1.5) == (min(allowed) if allowed else None)


def test_what_luck_allows_caution_does_not() -> None:
    """`small` wins one image and loses the next two: one is even, so that the rule without caution takes both."""
    right = torch.tensor([True] * 6 + [True, False, False])
    logits = {
        "small": answers(right, torch.tensor([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.0, 1.9, 1.8])),
        "large": answers(torch.tensor([True] * 6 + [False, True, True]), torch.full((9,), 1.0)),
    }
    labels = torch.zeros(9, dtype=torch.long)
    weights = dict.fromkeys(logits, PROBABILITY)
    answered = {}
    for caution in (0.0, 2.0):
        order, confidences, reference = greedy(logits, labels, weights, plain_cost, caution=caution)
        assert (order, reference) == (("small", "large"), "large")
        answered[caution] = int(confidences[0].sure(logits["small"]).sum())
    assert answered == {0.0: 8, 2.0: 6}


def test_the_reference_is_the_best_of_all_held_out_images_not_of_those_that_set_thresholds() -> None:
    logits, labels = random_answers(0)
    weights = dict.fromkeys(logits, PROBABILITY)
    for name in logits:
        tops = {other: 0.9 if other == name else 0.5 for other in logits}
        order, confidences, reference = greedy(logits, labels, weights, plain_cost, tops=tops)
        alone = float((logits[name].argmax(1) == labels).double().mean())
        assert reference == name
        assert run(order, confidences, logits, labels, plain_cost).top1 >= alone - 1e-12


def test_the_reference_needs_nothing_to_spare() -> None:
    """At an accuracy below its own it is right on a part only of what it answers, and is taken all the same."""
    logits, labels = random_answers(0)
    order, confidences, reference = greedy(logits, labels, dict.fromkeys(logits, PROBABILITY), plain_cost, caution=1e6)
    assert (order[-1], confidences[-1].threshold) == (reference, None)


# the algorithm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_a_cascade_is_as_accurate_as_the_reference_and_answers_everything(seed: int) -> None:
    logits, labels = random_answers(seed)
    tops = {name: float((own.argmax(1) == labels).double().mean()) for name, own in logits.items()}
    order, confidences, reference = greedy(logits, labels, dict.fromkeys(logits, PROBABILITY), plain_cost)
    assert tops[reference] == max(tops.values())
    assert confidences[-1].threshold is None
    assert len(set(order)) == len(order)
    figures = run(order, confidences, logits, labels, plain_cost)
    assert figures.top1 >= tops[reference] - 1e-12
    assert sum(figures.answered) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_less_accuracy_costs_less_work(seed: int) -> None:
    logits, labels = random_answers(seed, 200)
    weights = dict.fromkeys(logits, PROBABILITY)
    tops = {name: float((own.argmax(1) == labels).double().mean()) for name, own in logits.items()}
    figures = []
    for share in (1.0, 0.9, 0.5):
        accuracy = share * max(tops.values())
        order, confidences, reference = greedy(logits, labels, weights, plain_cost, accuracy)
        figures.append(run(order, confidences, logits, labels, plain_cost))
        assert figures[-1].top1 >= accuracy - 1e-12
        assert figures[-1].macs <= plain_cost(reference)  # a stage is only taken where it saves work
    assert figures[2].macs <= figures[1].macs <= figures[0].macs
    assert figures[2].macs < figures[0].macs


def test_the_first_stage_is_the_one_with_most_answers_for_its_work() -> None:
    """`small` is right on half of the images, where it is sure: 0.5 / 1e6 beats 1 / 4e6."""
    right = torch.arange(10) < 5
    sure = torch.where(right, 2.0, 0.5)
    logits = {"small": answers(right, sure), "large": answers(torch.ones(10, dtype=torch.bool), torch.full((10,), 1.0))}
    labels = torch.zeros(10, dtype=torch.long)
    order, confidences, reference = greedy(logits, labels, dict.fromkeys(logits, PROBABILITY), plain_cost)
    assert (order, reference) == (("small", "large"), "large")
    assert confidences[0].threshold == pytest.approx(1 / (1 + np.exp(-2.0)))
    figures = run(order, confidences, logits, labels, plain_cost)
    assert (figures.top1, figures.answered) == (1.0, (0.5, 0.5))
    assert figures.macs == pytest.approx(0.5 * 1e6 + 0.5 * 5e6)


def test_work_that_is_done_already_costs_nothing_again() -> None:
    """After `small`, `middle` is almost free, so that it comes before `large` although it answers less."""
    every = torch.ones(12, dtype=torch.bool)
    sure = torch.full((12,), 1.0)
    logits = {
        "small": answers(torch.arange(12) < 6, torch.where(torch.arange(12) < 6, 2.0, 0.5)),
        "middle": answers(torch.arange(12) < 8, torch.where(torch.arange(12) < 8, 2.0, 0.5)),
        "large": answers(every, sure),
    }

    def shared(name: str, before: Sequence[str] = ()) -> float:
        return 1.0 if name == "middle" and "small" in before else {"small": 1.0, "middle": 5.0, "large": 100.0}[name]

    order, _, _ = greedy(logits, torch.zeros(12, dtype=torch.long), dict.fromkeys(logits, PROBABILITY), shared)
    assert order == ("small", "middle", "large")


@pytest.mark.parametrize("accuracy", [0.0, -1.0, 1.01, float("nan")])
def test_an_accuracy_that_no_patch_has_is_refused(accuracy: float) -> None:
    logits, labels = random_answers(0)
    with pytest.raises(CascadeError, match="the accuracy to keep is"):
        greedy(logits, labels, dict.fromkeys(logits, PROBABILITY), plain_cost, accuracy)


def test_fitted_confidence_tells_right_from_wrong() -> None:
    """Answers are right where the runner-up is far, whatever the best probability is: three classes, one of them noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=generator) * 2
    shares = logits.softmax(1).topk(2, dim=1).values
    right = (shares[:, 0] - shares[:, 1]) > 0.4
    labels = torch.where(right, logits.argmax(1), (logits.argmax(1) + 1) % 3)
    fitted = Confidence(weights=fit_confidence(logits, labels)).score(logits)
    ranks = {name: _area(score, right) for name, score in (("fitted", fitted), ("plain", Confidence().score(logits)))}
    assert ranks["fitted"] > 0.98
    assert ranks["fitted"] >= ranks["plain"]


def _area(scores: Tensor, right: Tensor) -> float:
    """The share of pairs of a right and a wrong answer in which the right one has the higher score."""
    return float((scores[right][:, None] > scores[~right][None]).double().mean())


# whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture(scope="module")
def data() -> Task:
    return color_task(60)


@pytest.fixture(scope="module")
def patches(backbone: Backbone, data: Task) -> dict[str, Patch]:
    """Two patches at different resolutions, fits that held out the same fifth of the training images."""
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 12, "validation": 0.2, "seed": 1}
    return {f"{pixels} px": fit(backbone, data, "scale-bias", image_size=pixels, **settings) for pixels in (16, 32)}


@pytest.fixture(scope="module")
def built(backbone: Backbone, data: Task, patches: dict[str, Patch]) -> CascadeResult:
    return cascade(backbone, patches, data, accuracy=0.5)


def test_a_cascade_of_patches_is_measured_as_the_engine_runs_it(
    built: CascadeResult, backbone: Backbone, data: Task
) -> None:
    evaluation, figures = evaluate_cascade(backbone, built.cascade, data)
    assert evaluation.top1 == figures.top1 == built.test.top1 == built.cascade.metrics["test_top1"]
    assert figures.macs == pytest.approx(built.test.macs)
    assert figures.answered == pytest.approx(built.test.answered)
    assert built.validation.top1 >= 0.5
    large = next(single for single in built.singles if single.name == "32 px")
    small = next(single for single in built.singles if single.name == "16 px")
    assert large.test.macs == pytest.approx(4 * small.test.macs)
    assert json.loads(json.dumps(built.as_dict()))["order"] == list(built.order)


def test_the_held_out_images_are_those_that_no_fit_saw(
    built: CascadeResult, patches: dict[str, Patch], data: Task
) -> None:
    held = held_out(list(patches.values()), data)
    split = data.with_validation(0.2, 1).validation
    assert split is not None
    assert held.digest == split.digest
    assert built.cascade.created["held_out_images"] == len(held) == 12
    own = replace(data, validation=data.test)
    assert held_out(list(patches.values()), own) is data.test


def test_data_without_held_out_images_is_refused(backbone: Backbone, data: Task, patches: dict[str, Patch]) -> None:
    one = next(iter(patches.values()))
    other = replace(one, created={**one.created, "settings": {**one.created["settings"], "seed": 2}})
    for several in ([draft_patch(backbone)] * 2, [one, other]):
        renamed = [replace(patch, task=one.task) for patch in several]
        with pytest.raises(DataError, match="has no validation images, and the patches' fits did not all hold out"):
            held_out(renamed, data)
    elsewhere = Task(TaskRecord(name="else", classes=("a", "b", "c")), data.train, data.test, data.test)
    with pytest.raises(DataError, match="else has other classes than the patches of colors"):
        cascade(backbone, patches, elsewhere)
    with pytest.raises(DataError, match="else has other classes"):
        evaluate_cascade(backbone, Cascade(patches=(one,), confidences=(Confidence(),)), elsewhere)


def test_fitted_confidence_uses_one_half_to_fit_and_the_other_for_thresholds(
    backbone: Backbone, data: Task, patches: dict[str, Patch]
) -> None:
    result = cascade(backbone, list(patches.values()), data, confidence="fitted", accuracy=0.3)
    assert set(result.order) <= {"scale-bias 16 px", "scale-bias 32 px"}
    assert all(confidence.weights != PROBABILITY for confidence in result.cascade.confidences)
    assert result.cascade.created["confidence"] == "fitted"


def test_what_makes_no_cascade_is_refused(backbone: Backbone, data: Task, patches: dict[str, Patch]) -> None:
    with pytest.raises(CascadeError, match="1 patches; a cascade is built of 2 to 32"):
        cascade(backbone, list(patches.values())[:1], data)
    with pytest.raises(CascadeError, match="confidence is 'gut'; expected one of: probability, fitted"):
        cascade(backbone, patches, data, confidence="gut")
    for caution in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CascadeError, match="expected a number of standard errors from 0 on"):
            cascade(backbone, patches, data, caution=caution)
    with pytest.raises(CascadeError, match="one and two are the same patch"):
        cascade(backbone, dict.fromkeys(("one", "two"), patches["16 px"]), data)


def test_patches_of_one_name_are_numbered(backbone: Backbone, data: Task, patches: dict[str, Patch]) -> None:
    first = patches["16 px"]
    other = fit(backbone, data, "scale-bias", **{**first.created["settings"], "epochs": 1})
    result = cascade(backbone, [first, other], data)
    assert [single.name for single in result.singles] == ["scale-bias 16 px (1)", "scale-bias 16 px (2)"]


def test_images_in_files_are_read(backbone: Backbone, patches: dict[str, Patch], data: Task) -> None:
    held = Split(data.test.images[:6], data.test.labels[:6])
    result = cascade(backbone, patches, replace(data, validation=held))
    assert result.cascade.created["held_out_images"] == 6

"""Heads that are solved: the least of their loss, the same as another solver's, and chosen on held-out images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.train.fitting import fit
from modelpatch.train.solving import Examples, Scales, Solver

PLAIN = {"augment": "none", "epochs": 1}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


def blobs(count: int, seed: int) -> Examples:
    """Three classes around their own means, whose features differ in size by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    features = torch.randn(count, 6, generator=generator) + 2 * F.one_hot(labels, 6)
    return Examples([(features * torch.logspace(-1, 1, 6), labels)], torch.device("cpu"))


def solver_of(examples: Examples) -> Solver:
    return Solver(Scales.of(examples), 3, F.cross_entropy, lambda targets: torch.ones(len(targets)))


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_gradient_of_a_solution_is_that_of_its_penalty(penalty: float) -> None:
    examples = blobs(90, 0)
    solver = solver_of(examples)
    found = solver.solve(examples, penalty)
    inner = found.inner.clone().requires_grad_()
    offset = found.offset.clone().requires_grad_()
    (x, y), scales = examples.parts[0], solver.scales
    loss = F.cross_entropy((x - scales.mean) / scales.deviation @ inner.T + offset, y)
    loss = loss + penalty / 2 * inner.square().sum()
    for slope in torch.autograd.grad(loss, [inner, offset]):
        assert slope.abs().max() < 1e-3


def test_a_path_ends_after_its_best_penalty_and_beats_its_ends() -> None:
    examples, held_out = blobs(30, 1), blobs(300, 2)
    losses = [loss for _, loss in solver_of(examples).follow(examples, held_out)]
    assert min(losses) < losses[0]
    assert min(losses) < losses[-1]


def test_features_without_a_spread_are_harmless() -> None:
    features = torch.cat([blobs(60, 3).parts[0][0], torch.full((60, 2), 4.0)], 1)
    examples = Examples([(features, blobs(60, 3).parts[0][1])], torch.device("cpu"))
    weight, bias = solver_of(examples).fold(solver_of(examples).solve(examples, 1e-3))
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    assert weight[:, 6:].abs().max() < 1e-2


def test_features_that_differ_by_rounding_alone_are_answered_by_the_shares_of_the_classes() -> None:
    noise = torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    examples = Examples([(0.1 + 1e-9 * noise, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2]))], torch.device("cpu"))
    solver = solver_of(examples)
    weight, bias = solver.fold(solver.solve(examples, 0.1))
    shares = F.linear(examples.parts[0][0], weight, bias).softmax(1)
    assert torch.allclose(shares, torch.tensor([6, 2, 1]) / 9, atol=1e-2)


def test_a_probe_does_not_depend_on_the_epochs_and_is_reproducible(backbone: Backbone, colors: Task) -> None:
    one, other = (fit(backbone, colors, LinearProbe(), **{**PLAIN, "epochs": epochs}) for epochs in (1, 7))
    assert torch.equal(one.tensors["head.weight"], other.tensors["head.weight"])
    assert one.created["solved"]["held_out_images"] == round(0.2 * len(colors.train))


def test_what_is_said_about_steps_is_done_by_steps(backbone: Backbone, colors: Task) -> None:
    for method, settings in (
        (LinearProbe(solver="steps"), {}),
        (LinearProbe(head_lr=0.1), {}),
        (LinearProbe(), {"schedule": "constant"}),
        (LinearProbe(), {"accumulate": 2}),
        (LinearProbe(), {"cache": False}),
    ):
        assert "solved" not in fit(backbone, colors, method, **PLAIN, **settings).created


def test_a_log_holds_a_row_a_penalty_and_named_validation_images_choose(
    backbone: Backbone, colors: Task, tmp_path: Path
) -> None:
    task = replace(colors, validation=colors.test)
    patch = fit(backbone, task, LinearProbe(), validation=0.25, log=tmp_path, **PLAIN)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.startswith("epoch,views,penalty,loss,validation_loss,validation_top1")
    assert [row.split(",")[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert patch.created["solved"]["held_out_images"] == len(colors.test)
    assert patch.metrics["validation_top1"] == patch.metrics["test_top1"]


def test_features_that_have_faded_to_nothing_are_harmless() -> None:
    noise = 1e-26 * torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    examples = Examples([(noise, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2]))], torch.device("cpu"))
    weight, bias = solver_of(examples).fold(solver_of(examples).solve(examples, 1e-3))
    assert weight.isfinite().all()
    assert torch.allclose(bias.softmax(0), torch.tensor([6, 2, 1]) / 9, atol=1e-2)


@pytest.mark.parametrize("augment", ["auto", "none", "light", "standard"])
def test_a_set_too_small_to_hold_images_out_is_solved(augment: str, backbone: Backbone) -> None:
    patch = fit(backbone, color_task(3), LinearProbe(), **{**PLAIN, "augment": augment})
    assert patch.created["solved"]["held_out_images"] == 0
    assert patch.tensors["head.weight"].isfinite().all()

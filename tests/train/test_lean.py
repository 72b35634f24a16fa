"""Training in little memory takes the very same steps."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.method import Method
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.piggyback import Piggyback
from modelpatch.patch.model import PatchedModel
from modelpatch.train import callbacks
from modelpatch.train.callbacks import EagerSteps
from modelpatch.train.fitting import RemadeWeights

METHODS: list[Method] = [
    Piggyback(),
    Piggyback(ternary=True, norms="trained"),
    PackNet(),
    FullFinetune(optimizer="sgd"),
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


def draft(backbone: Backbone, method: Method) -> PatchedModel:
    torch.manual_seed(0)
    model = method.draft(backbone, 3)
    model.train()
    return model


def train(backbone: Backbone, method: Method, frugal: bool) -> dict[str, Tensor]:
    """Three steps, with or without what saves memory."""
    model = draft(backbone, method)
    optimizer = method.make_optimizer(model, backbone)
    remade = RemadeWeights(model) if frugal else nullcontext
    if frugal:
        EagerSteps().watch(optimizer)
    images = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for batch in images:
        with remade():
            loss = model(batch).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state().items()}


@pytest.mark.parametrize("least", [1, 500, 2**20])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.optimizer}")
def test_the_steps_are_the_same_bit_for_bit(
    backbone: Backbone, method: Method, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "LEAST", least)
    plain, frugal = train(backbone, method, frugal=False), train(backbone, method, frugal=True)
    assert any(not torch.equal(tensor, draft(backbone, method).state()[name]) for name, tensor in plain.items())
    for name, tensor in plain.items():
        assert torch.equal(tensor, frugal[name]), name


def test_no_masked_weight_outlives_the_forward_pass(backbone: Backbone) -> None:
    model = draft(backbone, Piggyback())
    made: list[weakref.ref[Tensor]] = []
    for path in model.reweighted.values():
        model.get_submodule(path).register_forward_hook(
            lambda *call: made.append(weakref.ref(call[2].untyped_storage()))
        )

    def alive() -> int:
        return sum(storage() is not None for storage in made)

    images = torch.randn(2, 3, 16, 16)
    kept = model(images)
    assert alive() == len(made) == len(model.reweighted)
    del kept
    made.clear()
    with RemadeWeights(model)():
        loss = model(images).sum()
    assert (len(made), alive()) == (len(model.reweighted), 0)
    loss.backward()


def test_gradients_are_freed_within_the_backward_pass(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "LEAST", 1)
    monkeypatch.setattr(callbacks, "SHARE", 10**9)
    method = Piggyback()
    model = draft(backbone, method)
    optimizer = method.make_optimizer(model, backbone)
    EagerSteps().watch(optimizer)
    most = 0

    def count(_: Any) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for _, parameter in model.trainable()))

    for _, parameter in model.trainable():
        parameter.register_post_accumulate_grad_hook(count)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert most == 0  # the step before this hook has freed the only one there was
    assert len(optimizer.state) == len(list(model.trainable()))

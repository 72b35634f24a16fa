"""Losses of the hosts: the value of each, the direction it moves the body in, and fits with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import modelpatch as mp
from conftest import color_task
from modelpatch.heads import LinearHead
from modelpatch.methods import Batch, Custom, DeltaNetwork, FullFinetune, Hook, Method, ScaleBias, with_loss
from modelpatch_studies.losses import BSS, DELTA, Confusion, UniformPrior, contrast_classes

pytestmark = pytest.mark.slow

DATA = color_task(24)
SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "augment": "none", "schedule": "constant", "warmup": 0}


def batches(backbone: mp.Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and their classes, eight at a time."""
    labels = torch.from_numpy(DATA.train.labels)
    for rows in torch.arange(len(labels)).split(8):
        yield backbone.preprocessing(*(DATA.train.images[row] for row in rows)), labels[rows]


def probe() -> LinearHead:
    torch.manual_seed(0)
    return LinearHead(16, 3)


def keepers(backbone: mp.Backbone) -> dict[str, Hook]:
    return {
        "bss": BSS(0.1),
        "delta": DELTA(backbone, probe(), lambda: batches(backbone)),
        "contrast": Custom(contrast_classes),
        "uniform": UniformPrior(),
        "confusion": Confusion(images=lambda: (images for images, _ in batches(backbone))),
    }


@pytest.mark.parametrize("name", ["bss", "delta", "contrast", "uniform", "confusion"])
@pytest.mark.parametrize("method", [ScaleBias(), FullFinetune() + DeltaNetwork()], ids=lambda method: method.name)
def test_a_loss_changes_what_is_trained_and_follows_the_seed(tiny: mp.Backbone, method: Method, name: str) -> None:
    plain = mp.fit(tiny, DATA, method, **SETTINGS)
    patch, again = (mp.fit(tiny, DATA, with_loss(method, keepers(tiny)[name]), **SETTINGS) for _ in range(2))
    assert patch.tensors.keys() == plain.tensors.keys()
    assert any(not torch.equal(patch.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert all(torch.equal(patch.tensors[key], again.tensors[key]) for key in patch.tensors)
    assert patch.method.hyperparameters["loss"]["kind"] == type(keepers(tiny)[name]).__name__


def begun(
    backbone: mp.Backbone, method: Method, keeper: Hook
) -> tuple[mp.PatchedModel, Callable[[], tuple[Batch, Tensor]]]:
    """A model whose keeper has begun, and a function that gives a batch and what the keeper adds to its loss."""
    model = method.draft(backbone, 3)
    images, labels = next(batches(backbone))
    keeper.begin(model, lambda: iter([images]))

    def step() -> tuple[Batch, Tensor]:
        batch = Batch(images, 0, model(images), labels)
        return batch, torch.as_tensor(keeper.added_loss(model, batch))

    return model, step


def features_of(model: mp.PatchedModel, images: Tensor) -> Tensor:
    """The head's input, with gradients."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    model(images)
    hook.remove()
    return seen[0]


def test_spectral_shrinkage_is_the_sum_of_the_smallest_squares(tiny: mp.Backbone) -> None:
    model, step = begun(tiny, FullFinetune(), BSS(0.5, count=2))
    batch, added = step()
    features = features_of(model, batch.inputs)
    squares = torch.linalg.eigvalsh(features @ features.T)
    assert added.item() == pytest.approx(0.5 * squares.clamp(min=0).sort().values[:2].sum().item(), abs=1e-5)


def test_held_behaviour_costs_nothing_at_the_start_and_more_the_further_the_body_moves(tiny: mp.Backbone) -> None:
    keeper = DELTA(tiny, probe(), lambda: batches(tiny), strength=0.2, head_strength=0.0)
    model, step = begun(tiny, FullFinetune(), keeper)
    assert step()[1].item() == pytest.approx(0, abs=1e-6)
    costs = []
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not name.startswith("head."):
                    parameter.mul_(1.1)
        costs.append(step()[1].item())
    assert 0 < costs[0] < costs[1]
    keeper.strength *= 2
    assert step()[1].item() == pytest.approx(2 * costs[1], rel=1e-4)


def test_attention_is_highest_where_a_channel_is_needed_most(tiny: mp.Backbone) -> None:
    """A probe that reads one feature alone depends, of the last stage's channels, on that one."""
    last = tiny.chain.stages[-1][-1].index
    head = LinearHead(16, 3)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, 5] = torch.tensor([4.0, -4.0, 0.0])
    keeper = DELTA(tiny, head, lambda: batches(tiny))
    begun(tiny, FullFinetune(), keeper)
    assert [weight.sum().item() for weight in keeper.attention.values()] == pytest.approx([1.0] * len(keeper.attention))
    weight = keeper.attention[last]
    others = torch.cat([weight[:5], weight[6:]])
    assert others == pytest.approx(others[0].expand(15), rel=1e-4)
    assert weight[5] != pytest.approx(others[0].item(), rel=1e-3)


def test_contrast_is_low_where_classes_lie_together() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    batch = Batch(torch.zeros(4, 1), 0, torch.zeros(4, 2), labels)
    together = F.one_hot(labels).float()
    apart = F.one_hot(torch.tensor([0, 1, 0, 1])).float()
    assert contrast_classes(together, batch) < 0.01 < 10 < contrast_classes(apart, batch)
    alone = Batch(torch.zeros(2, 1), 0, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert contrast_classes(torch.eye(2), alone) == 0


def test_an_adversary_moves_the_body_against_its_discriminator(tiny: mp.Backbone) -> None:
    """The gradient of the body is that of the discriminator's loss with the other sign."""
    keeper = UniformPrior(strength=1.0)
    model, step = begun(tiny, ScaleBias(), keeper)
    step()  # makes the discriminator
    assert keeper.discriminator is not None
    body = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")]
    torch.manual_seed(1)
    batch, added = step()
    reversed_ = torch.autograd.grad(added, body)
    features = F.normalize(features_of(model, batch.inputs), dim=1)
    torch.manual_seed(1)
    others = F.normalize(torch.randn_like(features), dim=1)
    logits = keeper.discriminator(torch.cat([features, others])).flatten()
    kinds = torch.cat([torch.zeros(len(features)), torch.ones(len(others))])
    straight = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, kinds), body)
    for a, b in zip(reversed_, straight, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-3, atol=1e-6)
    assert any(a.abs().max() > 0 for a in reversed_)


def test_the_discriminator_learns_beside_the_body(tiny: mp.Backbone) -> None:
    keeper = Confusion(images=lambda: (images for images, _ in batches(tiny)), strength=1.0)
    model, step = begun(tiny, ScaleBias(), keeper)
    step()[1].backward()
    assert keeper.discriminator is not None
    before = [p.clone() for p in keeper.discriminator.parameters()]
    keeper.step(model, 1, 10)
    assert any(not torch.equal(a, b) for a, b in zip(before, keeper.discriminator.parameters(), strict=True))

"""Losses that any method can add: what each computes, that it moves the body as it should, and that any method takes one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import color_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.heads.base import LinearHead
from modelpatch.methods.added import with_loss
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.keeping import L2, Keeper, LwF
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.losses import BSS, DELTA, Confusion, Custom, UniformPrior, contrast_classes
from modelpatch.methods.method import Batch, Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.recipes.scoring import Scorer
from modelpatch.train import fit
from modelpatch.train.fitting import Fit, FitSettings
from modelpatch.train.logs import RunLog
from modelpatch.train.progress import quiet_progress

DATA = color_task(24)
SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "augment": "none", "schedule": "constant", "warmup": 0}


def begun(backbone: Backbone, method: Method) -> Fit:
    run = Fit(backbone, DATA, method, FitSettings(**SETTINGS), quiet_progress(), RunLog(None), None)
    run.begin()
    run.train_mode()
    return run


def labelled(backbone: Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    return Scorer(backbone, backbone.preprocessing).labelled(DATA.train, 8)


def unlabelled(backbone: Backbone) -> Iterator[Tensor]:
    return (images for images, _ in labelled(backbone))


def keepers(backbone: Backbone) -> dict[str, Keeper]:
    probe = Scorer(backbone, backbone.preprocessing).probe(DATA)
    return {
        "l2-sp": L2(0.1, head_strength=0.1),
        "lwf": LwF(1.0, [LinearHead(16, 5)], temperature=2.0),
        "bss": BSS(0.1),
        "delta": DELTA(backbone, probe, lambda: labelled(backbone)),
        "contrast": Custom(contrast_classes),
        "uniform": UniformPrior(),
        "confusion": Confusion(images=lambda: unlabelled(backbone)),
    }


# any method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2-sp", "lwf", "bss", "delta", "contrast", "uniform", "confusion"])
@pytest.mark.parametrize("method", [ScaleBias(), FullFinetune() + DeltaNetwork()], ids=lambda method: method.name)
def test_a_loss_changes_what_is_trained_and_the_patch_says_so(tiny: Backbone, method: Method, name: str) -> None:
    plain = fit(tiny, DATA, method, **SETTINGS)
    patch = fit(tiny, DATA, with_loss(method, keepers(tiny)[name]), **SETTINGS)
    again = fit(tiny, DATA, with_loss(method, keepers(tiny)[name]), **SETTINGS)
    assert patch.tensors.keys() == plain.tensors.keys()
    assert any(not torch.equal(patch.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert all(torch.equal(patch.tensors[key], again.tensors[key]) for key in patch.tensors), "all follows the seed"
    assert patch.method.name == method.name
    assert patch.method.hyperparameters["loss"]["kind"] == type(keepers(tiny)[name]).__name__
    tiny.verify()


def test_a_patch_with_a_loss_is_a_file_like_any_other(tiny: Backbone, tmp_path: Path) -> None:
    patch = fit(tiny, DATA, with_loss(ScaleBias(), BSS(0.5, count=2)), **SETTINGS)
    patch.save(tmp_path / "patch.safetensors")
    read = Patch.load(tmp_path / "patch.safetensors")
    assert read.method.hyperparameters["loss"] == {"kind": "BSS", "strength": 0.5, "count": 2}


def test_a_loss_can_go_with_a_method_that_trains_the_head_alone(tiny: Backbone) -> None:
    method = with_loss(LinearProbe(), L2(1.0, head_strength=30.0))
    free, held = fit(tiny, DATA, "linear-probe", **SETTINGS), fit(tiny, DATA, method, **SETTINGS)
    assert held.tensors["head.weight"].norm() < free.tensors["head.weight"].norm()


def test_a_run_that_begins_in_the_middle_is_refused(tiny: Backbone) -> None:
    first = begun(tiny, with_loss(ScaleBias(), BSS()))
    method = with_loss(ScaleBias(), BSS())
    run = Fit(tiny, DATA, method, FitSettings(**SETTINGS), quiet_progress(), RunLog(None), None)
    run.begin(first.snapshot())
    with pytest.raises(MethodError, match=r"scale-bias with BSS cannot go on from a checkpoint.*--restart"):
        next(run.steps(4))


# what they compute ----------------------------------------------------------------------------------------------------


def step(run: Fit) -> tuple[Batch, Tensor]:
    """A batch as the loop makes it, and what is added to its loss."""
    rows = torch.arange(8)
    x = run._to_device(run.inputs.batch(rows, 0, 0))
    batch = Batch(x, run.inputs.start, run._forward(x, run.labels[rows]), run.labels[rows])
    return batch, torch.as_tensor(run.method.added_loss(run.model, batch))


def features_of(model: PatchedModel, batch: Batch) -> Tensor:
    return model.streams(batch.inputs, batch.start)[0].flatten(1)


def test_spectral_shrinkage_is_the_sum_of_the_smallest_squares(tiny: Backbone) -> None:
    run = begun(tiny, with_loss(FullFinetune(), BSS(0.5, count=2)))
    batch, added = step(run)
    squares = torch.linalg.eigvalsh(features_of(run.model, batch) @ features_of(run.model, batch).T)
    assert added.item() == pytest.approx(0.5 * squares.clamp(min=0).sort().values[:2].sum().item(), abs=1e-5)


def test_held_behaviour_costs_nothing_at_the_start_and_what_the_formula_says_behind_it(tiny: Backbone) -> None:
    probe = Scorer(tiny, tiny.preprocessing).probe(DATA)
    keeper = DELTA(tiny, probe, lambda: labelled(tiny), strength=0.2, head_strength=0.0)
    run = begun(tiny, with_loss(FullFinetune(), keeper))
    assert step(run)[1].item() == pytest.approx(0, abs=1e-6)
    assert [weight.sum().item() for weight in keeper.attention.values()] == pytest.approx([1.0] * len(keeper.attention))
    with torch.no_grad():
        for _, parameter in run.model.trainable():
            parameter.mul_(1.1)
    batch, added = step(run)
    expected = torch.zeros(())
    for last, weight in keeper.attention.items():
        ours = run.model._run(batch.inputs, 0, last + 1)
        distance = (ours - tiny.chain.run(batch.inputs, 0, last + 1)).square().mean((2, 3))
        expected += 0.1 * len(weight) * (distance * weight).sum()
    assert added.item() == pytest.approx(expected.item(), rel=1e-4)
    assert added > 0


def test_attention_is_highest_where_a_channel_is_needed_most(tiny: Backbone) -> None:
    """A probe that reads one feature alone depends, of the last stage's channels, on that one."""
    last = tiny.chain.stages[-1][-1].index
    probe = LinearHead(16, 3)
    with torch.no_grad():
        probe.weight.zero_()
        probe.weight[:, 5] = torch.tensor([4.0, -4.0, 0.0])
    keeper = DELTA(tiny, probe, lambda: labelled(tiny))
    weight = keeper._attend([last])[last]
    others = torch.cat([weight[:5], weight[6:]])
    assert torch.allclose(others, others[0].expand(15))
    assert weight[5] != others[0]


def test_contrast_is_low_where_classes_lie_together() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    batch = Batch(torch.zeros(4, 1), 0, torch.zeros(4, 2), labels)
    together = F.one_hot(labels).float()
    apart = F.one_hot(torch.tensor([0, 1, 0, 1])).float()
    assert contrast_classes(together, batch) < 0.01 < 10 < contrast_classes(apart, batch)
    alone = Batch(torch.zeros(2, 1), 0, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert contrast_classes(torch.eye(2), alone) == 0


def test_a_function_of_features_logits_and_classes_is_a_loss(tiny: Backbone) -> None:
    seen: dict[str, Any] = {}

    def mine(features: Tensor, batch: Batch) -> Tensor:
        seen.update(features=features, logits=batch.logits, labels=batch.labels)
        return features.square().mean()

    run = begun(tiny, with_loss(ScaleBias(), Custom(mine, strength=3.0)))
    batch, added = step(run)
    assert added.item() == pytest.approx(3 * features_of(run.model, batch).square().mean().item(), rel=1e-5)
    assert seen["features"].requires_grad
    assert (seen["logits"] is batch.logits, seen["labels"] is batch.labels) == (True, True)
    assert "mine" in run.method.hyperparameters()["loss"]["loss"]


def test_an_adversary_pulls_the_body_against_its_discriminator(tiny: Backbone) -> None:
    """The gradient of the body is that of the discriminator's loss turned around."""
    run = begun(tiny, with_loss(ScaleBias(), UniformPrior(strength=1.0)))
    keeper: Any = run.method.keeper  # type: ignore[attr-defined]
    torch.manual_seed(1)
    batch, first = step(run)
    parameters = [p for name, p in run.model.trainable() if not name.startswith("head.")]
    turned = torch.autograd.grad(first, parameters)
    torch.manual_seed(1)
    features = F.normalize(features_of(run.model, batch), dim=1)
    others = F.normalize(torch.randn_like(features), dim=1)
    torch.manual_seed(1)
    run._forward(batch.inputs, batch.labels)
    logits = keeper.discriminator(torch.cat([features, others])).flatten()
    kinds = torch.cat([torch.zeros(len(features)), torch.ones(len(others))])
    straight = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, kinds), parameters)
    for a, b in zip(turned, straight, strict=True):
        assert a.flatten().dot(b.flatten()) <= 0
    assert any(a.abs().max() > 0 for a in turned)


def test_the_discriminator_learns_beside_the_body(tiny: Backbone) -> None:
    run = begun(tiny, with_loss(ScaleBias(), Confusion(images=lambda: unlabelled(tiny), strength=1.0)))
    keeper: Any = run.method.keeper  # type: ignore[attr-defined]
    step(run)
    before = [p.clone() for p in keeper.discriminator.parameters()]
    run._step(torch.arange(8), 0, 0, 10, None)
    run.state.step = 1
    run._step(torch.arange(8), 0, 1, 10, None)
    assert any(not torch.equal(a, b) for a, b in zip(before, keeper.discriminator.parameters(), strict=True))

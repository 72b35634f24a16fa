"""Losses that any method can add: a patch records them, a file keeps the record, a checkpoint is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import color_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.hooks import L2, Custom, Hook, LwF
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Batch, Method, with_loss
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.train import Trainer, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.fitting import Fit
from modelpatch.train.settings import FitSettings

DATA = color_task(24)
SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "augment": "none", "schedule": "constant", "warmup": 0}


def begun(backbone: Backbone, method: Method) -> tuple[PatchedModel, Minibatch]:
    """A model before its first step, and its first batch."""
    run = Fit(backbone, DATA, method, FitSettings(**SETTINGS))
    model = run.build()
    trainer = run.make_trainer(model)
    trainer.begin()
    return model.train(), next(trainer.data.batches(0)).to(run.device)


def spread(features: Tensor, batch: Batch) -> Tensor:
    """A loss of features alone."""
    return features.square().mean()


def keepers() -> dict[str, Hook]:
    return {
        "l2-sp": L2(0.1, head_strength=0.1),
        "lwf": LwF(1.0, [LinearHead(16, 5)], temperature=2.0),
        "custom": Custom(spread),
    }


# any method ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l2-sp", "lwf", "custom"])
@pytest.mark.parametrize("method", [ScaleBias(), FullFinetune() + DeltaNetwork()], ids=lambda method: method.name)
def test_a_loss_changes_what_is_trained_and_the_patch_says_so(tiny: Backbone, method: Method, name: str) -> None:
    plain = fit(tiny, DATA, method, **SETTINGS)
    patch = fit(tiny, DATA, with_loss(method, keepers()[name]), **SETTINGS)
    again = fit(tiny, DATA, with_loss(method, keepers()[name]), **SETTINGS)
    assert patch.tensors.keys() == plain.tensors.keys()
    assert any(not torch.equal(patch.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert all(torch.equal(patch.tensors[key], again.tensors[key]) for key in patch.tensors), "all follows the seed"
    assert patch.method.name == method.name
    assert patch.method.hyperparameters["loss"]["kind"] == type(keepers()[name]).__name__
    tiny.verify()


def test_a_patch_with_a_loss_is_a_file_like_any_other(tiny: Backbone, tmp_path: Path) -> None:
    patch = fit(tiny, DATA, with_loss(ScaleBias(), L2(0.5)), **SETTINGS)
    patch.save(tmp_path / "patch.safetensors")
    read = Patch.load(tmp_path / "patch.safetensors")
    assert read.method.hyperparameters["loss"] == {"kind": "L2", "strength": 0.5, "head_strength": 0.0}


def test_a_loss_can_go_with_a_method_that_trains_the_head_alone(tiny: Backbone) -> None:
    method = with_loss(LinearProbe(), L2(1.0, head_strength=30.0))
    free, held = fit(tiny, DATA, "linear-probe", **SETTINGS), fit(tiny, DATA, method, **SETTINGS)
    assert held.tensors["head.weight"].norm() < free.tensors["head.weight"].norm()


def test_a_loss_stays_when_other_methods_join(tiny: Backbone) -> None:
    held = with_loss(with_loss(ScaleBias(), L2(1.0)) + DeltaNetwork(), keepers()["custom"])
    joined = held + Subset()
    assert [type(hook) for hook in joined.all_hooks()] == [L2, Custom]
    assert joined.hyperparameters()["loss"]["kind"] == "L2"


def test_a_run_that_begins_in_the_middle_is_refused(tiny: Backbone) -> None:
    def trainer() -> Trainer:
        run = Fit(tiny, DATA, with_loss(ScaleBias(), L2(0.1)), FitSettings(**SETTINGS))
        return run.make_trainer(run.build())

    first, second = trainer(), trainer()
    first.begin()
    with pytest.raises(MethodError, match=r"scale-bias with L2 cannot go on from a checkpoint.*--restart"):
        second.begin(first.state_dict())


# what they compute ----------------------------------------------------------------------------------------------------


def features_of(model: PatchedModel, batch: Batch) -> Tensor:
    return model.head_input(batch.inputs, batch.start).flatten(1)


def test_a_function_of_features_logits_and_classes_is_a_loss(tiny: Backbone) -> None:
    seen: dict[str, Any] = {}

    def mine(features: Tensor, batch: Batch) -> Tensor:
        seen.update(features=features, logits=batch.logits, labels=batch.labels)
        return features.square().mean()

    method = with_loss(ScaleBias(), Custom(mine, strength=3.0))
    model, given = begun(tiny, method)
    batch = Batch(given.inputs, given.start, model.run_from(given.inputs, given.start), given.targets)
    added = torch.as_tensor(method.losses[0].added_loss(model, batch))
    assert added.item() == pytest.approx(3 * features_of(model, batch).square().mean().item(), rel=1e-5)
    assert seen["features"].requires_grad
    assert (seen["logits"] is batch.logits, seen["labels"] is batch.labels) == (True, True)
    assert "mine" in method.hyperparameters()["loss"]["loss"]

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
from modelpatch.methods.added import Custom, with_loss
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.keeping import L2, Keeper, LwF
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Batch, Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
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


def spread(features: Tensor, batch: Batch) -> Tensor:
    """A loss of features alone."""
    return features.square().mean()


def keepers() -> dict[str, Keeper]:
    return {
        "l2-sp": L2(0.1, head_strength=0.1),
        "lwf": LwF(1.0, [LinearHead(16, 5)], temperature=2.0),
        "custom": Custom(spread),
    }


# any method ---------------------------------------------------------------------------------------------------------


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


def test_a_run_that_begins_in_the_middle_is_refused(tiny: Backbone) -> None:
    first = begun(tiny, with_loss(ScaleBias(), L2(0.1)))
    method = with_loss(ScaleBias(), L2(0.1))
    run = Fit(tiny, DATA, method, FitSettings(**SETTINGS), quiet_progress(), RunLog(None), None)
    run.begin(first.snapshot())
    with pytest.raises(MethodError, match=r"scale-bias with L2 cannot go on from a checkpoint.*--restart"):
        next(run.steps(4))


# what they compute ----------------------------------------------------------------------------------------------------


def step(run: Fit) -> tuple[Batch, Tensor]:
    """A batch as the loop makes it, and what is added to its loss."""
    rows = torch.arange(8)
    x = run._to_device(run.inputs.batch(rows, 0, 0))
    batch = Batch(x, run.inputs.start, run._forward(x, run.labels[rows]), run.labels[rows])
    return batch, torch.as_tensor(run.method.added_loss(run.model, batch))


def features_of(model: PatchedModel, batch: Batch) -> Tensor:
    return model.head_input(batch.inputs, batch.start).flatten(1)


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

"""Checkpoints of training scripts as the weights of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from modelpatch.backbone.load import load_backbone
from modelpatch.errors import BackboneError, CheckpointError, CheckpointWarning

SMALL = "test_resnet"


def trained(classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(timm.create_model(SMALL, num_classes=classes).state_dict())


def load(path: Path) -> Any:
    return load_backbone(f"timm:{SMALL}", weights=path)


@pytest.mark.parametrize(
    ("prefix", "holder"), [("", None), ("module.", "state_dict"), ("_orig_mod.model.", "model"), ("backbone.", None)]
)
def test_weights_may_be_a_checkpoint_of_a_training_script(tmp_path: Path, prefix: str, holder: str | None) -> None:
    state = trained()
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save(named if holder is None else {holder: named, "epoch": 3}, tmp_path / "own.pth")
    loaded = load(tmp_path / "own.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.module.state_dict().items())
    assert (loaded.spec, loaded.arguments) == (f"timm:{SMALL}", {})


def test_the_classifier_has_the_outputs_of_the_checkpoint(tmp_path: Path) -> None:
    save_file(trained(7), tmp_path / "own.safetensors")
    loaded = load(tmp_path / "own.safetensors")
    assert loaded(torch.zeros(1, 3, 160, 160)).shape == (1, 7)
    assert loaded.module.num_classes == 7
    assert loaded.arguments == {"num_classes": 7}


def test_foreign_tensors_and_a_missing_classifier_are_told(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in trained().items() if not name.startswith("fc.")}
    save_file(state | {"projector.weight": torch.zeros(2)}, tmp_path / "own.safetensors")
    with pytest.warns(CheckpointWarning) as told:
        loaded = load(tmp_path / "own.safetensors")
    assert "projector.weight" in str(told[0].message)
    assert "classifier 'fc'" in str(told[1].message)
    assert torch.equal(loaded.module.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": None}, "lacks 1 of"),
        ({"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}, "1 tensors of .* do not fit"),
        ({"bn1.bias": torch.tensor([float("nan")]).expand(16).clone()}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state = {**trained(), **change}
    if "bn1.bias" in change:
        state["bn1.bias"] = torch.full_like(trained()["bn1.bias"], float("nan"))
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "own.safetensors")
    with pytest.raises(BackboneError, match=message):
        load(tmp_path / "own.safetensors")


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist"):
        load(tmp_path / "absent.pth")

"""Exported models answer as the patched model does, without this library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from conftest import draft_patch, make_timm
from modelpatch.backbone import graphs
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.convert.exporting import check_onnx, export
from modelpatch.errors import MissingExtraError, PatchError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.widened import Widened
from tolerance import close

pytestmark = pytest.mark.slow

METHODS: dict[str, Method] = {
    "full": FullFinetune(),
    "mask": Piggyback(),
    "delta": DeltaNetwork(),
    "lora": LoRA(),
    "widened": Widened(),
    "head2toe": Head2Toe(),
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_state_dict_loads_in_timm_and_answers_the_same(tmp_path: Path) -> None:
    backbone = make_timm("mobilenetv2_100", 32)
    patch = draft_patch(backbone, ScaleBias())
    path = export(backbone, patch, tmp_path / "model.safetensors", "safetensors")
    module = timm.create_model("mobilenetv2_100", num_classes=3).eval()
    module.load_state_dict(safetensors.torch.load_file(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert close(module(images), backbone.patched(patch)(images))
    again = load_backbone(f"file:{path}")
    assert again.classes == patch.task.classes
    assert close(again(images), backbone.patched(patch)(images))


@pytest.mark.parametrize("name", ["full", "delta"])
def test_a_program_answers_batches_of_any_size(tiny: Backbone, name: str, images: Tensor, tmp_path: Path) -> None:
    patch = draft_patch(tiny, METHODS[name])
    program = torch.export.load(export(tiny, patch, tmp_path / "model.pt2", "torch-export")).module()
    with torch.no_grad():
        for count in (1, 5):
            assert torch.allclose(program(images[:count]), tiny.patched(patch)(images[:count]), atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_an_onnx_graph_answers_as_pytorch_does(tiny: Backbone, name: str, images: Tensor, tmp_path: Path) -> None:
    patch = draft_patch(tiny, METHODS[name])
    path = export(tiny, patch, tmp_path / "model.onnx", "onnx")
    agreement = check_onnx(path, tiny.patched(patch), images, batch=3)
    assert agreement.holds, agreement
    other = check_onnx(path, tiny.patched(draft_patch(tiny, METHODS[name], seed=9)), images)
    assert not other.holds


def test_what_a_state_dict_cannot_hold_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    for method in (DeltaNetwork(), Head2Toe()):
        with pytest.raises(PatchError, match="Use the format torch-export or onnx"):
            export(tiny, draft_patch(tiny, method), tmp_path / "x", "safetensors")
    with pytest.raises(PatchError, match="unknown format 'tflite'"):
        export(tiny, draft_patch(tiny), tmp_path / "x", "tflite")
    assert not list(tmp_path.iterdir())


def test_more_weights_than_an_onnx_file_holds_are_refused_with_another_format(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_ONNX", 1000)
    with pytest.raises(PatchError, match=r"bytes of weights; a file of the format onnx holds 1,000\. Use torch-export"):
        export(tiny, draft_patch(tiny), tmp_path / "x.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[export\]"):
        export(tiny, draft_patch(tiny), tmp_path / "x.onnx", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[export\]"):
        check_onnx(tmp_path / "x.onnx", tiny.module, torch.zeros(1, 3, 16, 16))

"""A patch by itself: its types, its hash, and what `inspect` says about its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from conftest import draft_patch, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import BackboneError, PatchError
from modelpatch.heads.base import HeadRecord
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.codec import PLAIN
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import BackboneRecord
from modelpatch.patch.model import PatchedModel
from modelpatch.tasks.record import TaskRecord
from tolerance import close

METHODS = [LinearProbe(), ScaleBias(), ScaleBias(layers="channel"), Subset()]


@pytest.fixture
def patch(tiny: Backbone) -> Patch:
    return draft_patch(tiny, ScaleBias())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_patch_is_stored_in_the_type_it_is_given(dtype: str, patch: Patch, tmp_path: Path) -> None:
    stored = Patch.load(patch.astype(dtype).save(tmp_path / "patch.safetensors"))
    assert {tensor.dtype for tensor in stored.tensors.values()} == {PLAIN[dtype]}
    for name, tensor in patch.tensors.items():
        assert torch.equal(stored.tensors[name], tensor.to(PLAIN[dtype]))


def test_half_precision_saves_two_bytes_a_number(patch: Patch) -> None:
    full, half = patch.inspect(), patch.astype("float16").inspect()
    assert full.tensor_bytes == 4 * full.numbers
    assert half.tensor_bytes == 2 * full.numbers
    assert half.file_bytes < full.file_bytes


def test_int8_leaves_vectors_float32_and_says_so(patch: Patch, tmp_path: Path) -> None:
    vectors = sum(tensor.numel() for tensor in patch.tensors.values() if tensor.ndim == 1)
    matrices = sum(tensor.numel() for tensor in patch.tensors.values() if tensor.ndim > 1)
    loaded = Patch.load(patch.astype("int8").save(tmp_path / "patch.safetensors"))
    for name, tensor in patch.tensors.items():
        if tensor.ndim == 1:
            assert torch.equal(loaded.tensors[name], tensor)
    inspection = loaded.inspect()
    assert inspection.stored == {"int8": matrices, "float32": vectors}
    assert sum(inspection.stored.values()) == inspection.numbers
    assert patch.inspect().stored == {"float32": inspection.numbers}


def test_another_type_is_refused_with_those_there_are(patch: Patch) -> None:
    with pytest.raises(PatchError, match=r"'int4'.*float32, float16, bfloat16, int8"):
        patch.astype("int4")


def test_the_content_hash_follows_what_the_patch_computes_and_nothing_else(patch: Patch) -> None:
    assert len(patch.content_hash) == 64
    same = [
        patch.with_metrics(top1=0.9),
        replace(patch, created={"seed": 7}),
        replace(patch, task=TaskRecord(name="other", classes=("x", "y", "z"))),
        replace(patch, tensors=dict(reversed(patch.tensors.items()))),
    ]
    assert {other.content_hash for other in same} == {patch.content_hash}
    name, tensor = next(iter(patch.tensors.items()))
    different = [
        patch.astype("float16"),
        replace(patch, tensors={**patch.tensors, name: tensor + 1}),
        replace(patch, grafts=(Graft(kind="channel-affine", start=0, end=1),)),
        draft_patch(make_tiny(1), ScaleBias()),
    ]
    assert len({patch.content_hash, *(other.content_hash for other in different)}) == 1 + len(different)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_inspect_tells_the_files_size_and_hash_exactly(method: Method, tiny: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(tiny, method).with_metrics(top1=0.5)
    data = patch.save(tmp_path / "patch.safetensors").read_bytes()
    inspection = patch.inspect()
    assert inspection.file_bytes == len(data)
    assert inspection.file_sha256 == hashlib.sha256(data).hexdigest()
    assert inspection.numbers == sum(tensor.numel() for tensor in patch.tensors.values())
    assert inspection.numbers == sum(part.numbers for part in inspection.parts)
    assert inspection.tensor_bytes == sum(part.bytes for part in inspection.parts)
    assert sum(part.tensors for part in inspection.parts) == len(patch.tensors)
    assert inspection.metrics == {"top1": 0.5}
    assert Patch.load(tmp_path / "patch.safetensors").inspect() == inspection


def test_inspect_groups_tensors_by_module_and_prints_them(patch: Patch) -> None:
    inspection = patch.inspect()
    parts = {(part.kind, part.name): part for part in inspection.parts}
    assert parts["head", "head"].numbers == patch.head.outputs * (patch.head.features + 1)
    assert parts["replace", "stage1.0.bn1"].numbers == 2 * 8
    assert parts["replace", "stage1.0.bn1"].codecs == ("float32",)
    text = str(inspection)
    assert f"{inspection.file_bytes:,} bytes" in text
    assert "stage1.0.bn1" in text
    assert json.loads(json.dumps(inspection.as_dict()))["content_hash"] == patch.content_hash


def test_metrics_are_added_not_replaced(patch: Patch) -> None:
    assert patch.with_metrics(a=1).with_metrics(b=2, a=3).metrics == {"a": 3, "b": 2}
    assert patch.metrics == {}


def test_the_structure_ignores_numbers_and_classes(tiny: Backbone, patch: Patch) -> None:
    assert draft_patch(tiny, ScaleBias(), classes=9, seed=4).blueprint == patch.blueprint
    assert draft_patch(tiny, Subset()).blueprint != patch.blueprint
    assert patch.blueprint.owned == tuple(sorted(patch.blueprint.owned))


def test_a_patch_reads_as_what_it_is(patch: Patch) -> None:
    assert repr(patch).startswith("Patch('draft', scale-bias, ")
    assert patch.backbone.spec in repr(patch)


@pytest.mark.parametrize("wrong", [{"classes": ()}, {"classes": ("a\n",)}, {"kind": "poetry"}, {"name": "\x00"}])
def test_an_impossible_task_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TaskRecord(**{"name": "task", "classes": ("a", "b"), **wrong})


def test_a_head_maps_features_to_outputs() -> None:
    head = HeadRecord(features=4, outputs=3).build()
    x = torch.randn(2, 4)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)
    assert close(head(x.view(2, 4, 1, 1)), head(x))


@pytest.mark.parametrize(
    "arguments", [{"pretrained_cfg_overlay": {"num_classes": 3}}, {"norm_layer": torch.nn.BatchNorm2d}, {"dims": {}}]
)
def test_a_backbone_that_no_file_could_name_is_an_error_that_says_so(arguments: dict[str, object]) -> None:
    backbone = make_tiny()
    backbone.arguments = arguments
    with pytest.raises(
        PatchError, match=f"no patch file could say how module:TinyNet was loaded: .*{next(iter(arguments))}"
    ):
        BackboneRecord.of(backbone)


@pytest.mark.parametrize(
    ("spec", "hub"),
    [("timm:resnet18", None), ("timm:hf-hub:a/b", "a/b"), ("timm:HF_hub:a/b@c", "a/b@c"), ("bundled:tiny", None)],
)
def test_a_repository_that_anybody_may_have_made_is_told_apart(spec: str, hub: str | None) -> None:
    record = BackboneRecord.of(make_tiny())
    assert BackboneRecord(**record.model_dump(exclude={"spec"}), spec=spec).hub == hub


def test_a_patch_for_images_that_its_backbone_does_not_take_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    patch = draft_patch(backbone)
    for bind in (PatchedModel, BoundPatch):
        bind(backbone, replace(patch, preprocessing=small_preprocessing(24)))
        with pytest.raises(BackboneError, match="no images of 2 x 2 pixels"):
            bind(backbone, replace(patch, preprocessing=small_preprocessing(2)))

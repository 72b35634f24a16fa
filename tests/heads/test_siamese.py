"""A siamese head reads the patch's features beside the base's, wherever the patch runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import color_task, draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, MethodError
from modelpatch.heads.base import HeadRecord
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.registry import make_method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.train import fit
from tolerance import close

METHODS = [
    Subset(blocks=("stage1.1",), head="siamese"),
    Subset(blocks=("stage1.0", "stage2.0"), head="siamese"),
    ScaleBias(head="siamese"),
    DeltaNetwork(head="siamese"),
    Piggyback(lr=1e-2, head="siamese"),
]
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name} {getattr(method, 'blocks', '')}")
def test_logits_are_those_of_both_features_side_by_side(tiny: Backbone, method: Method) -> None:
    patch = draft_patch(tiny, method)
    plain = replace(patch, head=HeadRecord(features=16, outputs=3))
    own = nn.Linear(32, 3)
    own.load_state_dict({"weight": patch.tensors["head.weight"], "bias": patch.tensors["head.bias"]})
    plain = replace(plain, tensors={**patch.tensors, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)})
    features = tiny.patched(plain).head_input(IMAGES, 0)
    with torch.no_grad():
        expected = own(torch.cat([features, tiny.chain(IMAGES)], 1))
        assert torch.allclose(tiny.patched(patch)(IMAGES), expected, atol=1e-5)
        assert close(BoundPatch(tiny, patch)(IMAGES), tiny.patched(patch)(IMAGES))


def test_the_base_s_stream_is_the_base_and_stays_so_while_the_patch_is_trained(tiny: Backbone) -> None:
    method = Subset(blocks=("stage2",), statistics="learned", head="siamese")
    model = method.draft(tiny, 3)
    model.train()
    optimizer = method.make_optimizer(model, tiny)
    for _ in range(3):
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    own, base = model.eval().head_input(IMAGES, 0).chunk(2, 1)
    assert close(base, tiny.chain(IMAGES))
    assert not close(own, base)


def test_frozen_prefixes_are_cached_and_give_the_same_patch(tiny: Backbone) -> None:
    task = color_task()
    one, other = (
        fit(tiny, task, METHODS[0], epochs=2, batch_size=8, augment="none", cache=cache) for cache in (True, False)
    )
    for name, tensor in one.tensors.items():
        assert torch.allclose(other.tensors[name], tensor, atol=1e-5), name


def test_a_siamese_patch_is_written_read_and_inspected(tiny: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(tiny, METHODS[0])
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert loaded.head == HeadRecord(kind="siamese", features=32, outputs=3)
    assert close(tiny.patched(loaded)(IMAGES), tiny.patched(patch)(IMAGES))
    head = loaded.inspect().parts[-1]
    assert (head.kind, head.numbers) == ("head", 32 * 3 + 3)


def test_siamese_and_plain_patches_share_no_structure(tiny: Backbone) -> None:
    siamese, plain = draft_patch(tiny, METHODS[0]), draft_patch(tiny, Subset(blocks=("stage1.1",)))
    assert BoundPatch(tiny, siamese).structure is not BoundPatch(tiny, plain).structure


@pytest.mark.parametrize("features", [16, 31, 64])
def test_a_head_of_another_width_is_refused(tiny: Backbone, features: int) -> None:
    patch = draft_patch(tiny, METHODS[0])
    head = HeadRecord(kind="siamese", features=features, outputs=3)
    with pytest.raises(ForeignTensorError, match="the backbone gives 32"):
        tiny.patched(replace(patch, head=head, tensors={**patch.tensors, "head.weight": torch.zeros(3, features)}))


def test_methods_that_cannot_be_siamese_say_so() -> None:
    backbone = make_tiny()
    with pytest.raises(MethodError, match="changes no features"):
        LinearProbe(head="siamese").draft(backbone, 3)
    with pytest.raises(MethodError, match="head of its own"):
        Head2Toe(head="siamese").draft(backbone, 3)
    both = make_method("scale-bias(head=siamese)+subset(head=siamese)")
    assert both.draft(backbone, 3).head.record.kind == "siamese"
    with pytest.raises(MethodError, match="head must agree"):
        make_method("scale-bias(head=siamese)+subset")

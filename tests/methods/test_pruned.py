"""Pruned blocks are smaller, keep what enters and leaves them, and start at the base's strongest channels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from timm.layers import GluMlp
from torch import nn

from conftest import color_task, draft_patch, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, MethodError, MethodNotApplicableError, MissingExtraError, PatchError
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.subset import Subset
from modelpatch.patch.blueprint import Graft
from modelpatch.train import fit
from tolerance import close

BLOCK = "blocks.2.1"  # an inverted residual: 32 channels, 192 within


@pytest.fixture(scope="module")
def mobilenet() -> Backbone:
    return make_timm("mobilenetv2_100", 32)


def variant(backbone: Backbone, method: Pruned) -> nn.Module:
    return method.draft(backbone, 3).variants[0]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_the_ratio_of_inner_channels_is_gone(mobilenet: Backbone, ratio: float) -> None:
    block = variant(mobilenet, Pruned(blocks=(BLOCK,), ratio=ratio))
    left = 192 - int(192 * ratio)
    assert block.conv_pw.weight.shape == (left, 32, 1, 1)
    assert block.conv_dw.weight.shape == (left, 1, 3, 3)
    assert block.conv_dw.groups == left
    assert block.conv_pwl.weight.shape == (32, left, 1, 1)
    assert block.bn3.weight.shape == (32,)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_what_is_left_are_the_channels_with_the_largest_norms(norm: str, order: int) -> None:
    backbone = make_timm("resnet18", 32)
    base = backbone.module.layer1[0]
    block = variant(backbone, Pruned(blocks=("layer1.0",), norm=norm))  # type: ignore[arg-type]
    kept = [next(n for n in range(64) if torch.equal(base.conv1.weight[n], row)) for row in block.conv1.weight.detach()]
    assert len(kept) == 32
    out, into = base.conv1.weight.abs() ** order, base.conv2.weight.abs() ** order
    scores = [values.sum(axes) for values, axes in ((out, (1, 2, 3)), (into, (0, 2, 3)))]
    strength = sum((score ** (1 / order) for score in (*scores, base.bn1.weight.abs())), torch.zeros(64))
    raw = sum((score for score in (*scores, base.bn1.weight.abs() ** order)), torch.zeros(64))
    assert set(kept) in ({*strength.topk(32).indices.tolist()}, {*raw.topk(32).indices.tolist()})
    assert torch.equal(block.conv2.weight, base.conv2.weight[:, kept])
    assert torch.equal(block.bn1.running_var, base.bn1.running_var[kept])


def test_a_global_ratio_holds_for_all_groups_together() -> None:
    backbone = make_timm("resnet18", 32)
    with torch.no_grad():  # all channels but a few of one block are weak, relative to those few
        backbone.module.layer1[0].conv1.weight[:60] *= 1e-3
        backbone.module.layer1[0].conv2.weight[:, :60] *= 1e-3
        backbone.module.layer1[0].bn1.weight[:60] *= 1e-3
    method = Pruned(blocks=("layer1.0", "layer2.1"), ratio=0.3, scope="global")
    first, second = (part.conv1.weight.shape[0] for part in method.draft(backbone, 3).variants)
    assert first == 64 - int(0.9 * 64)  # more would be weak: a tenth of a group stays
    assert second > (1 - 0.3) * 128
    local = [part.conv1.weight.shape[0] for part in replace(method, scope="local").draft(backbone, 3).variants]
    assert local == [64 - int(0.3 * 64), 128 - int(0.3 * 128)]


def test_a_pruned_patch_is_smaller_and_answers_the_same_bound_or_built(mobilenet: Backbone) -> None:
    task = color_task(12, 32)
    whole, pruned = (
        fit(mobilenet, task, method, epochs=1, batch_size=6)
        for method in (Subset(blocks=(BLOCK,)), Pruned(blocks=(BLOCK,), ratio=0.75))
    )
    assert pruned.inspect().file_bytes < 0.5 * whole.inspect().file_bytes
    assert pruned.inspect().spans[0].segments == (mobilenet.chain.segment_of(f"{BLOCK}.conv_pw.weight").index,) * 1 + (
        mobilenet.chain.segment_of(f"{BLOCK}.conv_pw.weight").index + 1,
    )
    images = torch.randn(2, 3, 32, 32)
    assert close(BoundPatch(mobilenet, pruned)(images), mobilenet.patched(pruned)(images))


def test_vision_transformers_lose_hidden_channels_of_their_mlp() -> None:
    backbone = make_timm("vit_tiny_patch16_224", 32, img_size=32)
    block = variant(backbone, Pruned())
    assert block.mlp.fc1.weight.shape == (384, 192)
    assert block.mlp.fc2.weight.shape == (192, 384)
    assert block.attn.qkv.weight.shape == (576, 192)


def test_both_halves_of_a_gate_lose_the_same_channels() -> None:
    small = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    backbone = make_timm("vit_tiny_patch16_224", 32, mlp_layer=GluMlp, **small)
    whole = backbone.module.blocks[-1].mlp
    block = variant(backbone, Pruned(ratio=0.25))
    assert block.mlp.fc1.weight.shape == (0.75 * whole.fc1.out_features, 24)
    assert block.mlp.fc2.weight.shape == (24, 0.75 * whole.fc2.in_features)


def test_no_share_of_a_pruned_block_can_be_applied(mobilenet: Backbone) -> None:
    patch = draft_patch(mobilenet, Pruned(blocks=(BLOCK,)))
    with pytest.raises(PatchError, match="pruned blocks do not interpolate"):
        patch.at_strength(0.5)
    assert patch.at_strength(1).strength == 1


@pytest.mark.parametrize(
    "shapes",
    [
        {"conv_pw.weight": [10**6, 32, 1, 1]},
        {"conv_pw.weight": [0, 32, 1, 1]},
        {"conv_pw.weight": [16]},
        {"conv_pw.weight": "all"},
        {"nothing.weight": [16]},
    ],
)
def test_shapes_that_no_pruning_gives_are_refused(mobilenet: Backbone, shapes: dict[str, object]) -> None:
    patch = draft_patch(mobilenet, Pruned(blocks=(BLOCK,)))
    graft = Graft(kind="pruned", start=patch.grafts[0].start, end=patch.grafts[0].end, arguments={"shapes": shapes})
    with pytest.raises(ForeignTensorError):
        mobilenet.patched(replace(patch, grafts=(graft,)))


def test_a_block_without_inner_channels_is_named() -> None:
    with pytest.raises(MethodNotApplicableError, match=r"stage2\.1 has no inner channels"):
        Pruned().blueprint(make_tiny())


def test_a_block_that_the_library_cannot_follow_is_named(mobilenet: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", fail)
    with pytest.raises(MethodNotApplicableError, match=r"cannot follow the channels of .*unsupported operand"):
        Pruned(blocks=("blocks.3.1",), ratio=0.3).draft(mobilenet, 3)


def test_a_ratio_out_of_range_and_a_missing_library_are_named(
    mobilenet: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MethodError, match="ratio"):
        Pruned(ratio=1.0)
    with pytest.raises(MethodNotApplicableError, match=r"ratio=0.001 removes none .* largest layer has 192"):
        Pruned(blocks=(BLOCK,), ratio=0.001).blueprint(mobilenet)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[prune\]"):
        Pruned(ratio=0.123).blueprint(mobilenet)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: make_timm("test_coatnet", 32, img_size=32),  # relative places of tokens
        lambda: make_timm("focalnet_tiny_srf", 32),  # outputs split into unequal parts
        lambda: load_backbone(
            "torchvision:swin_v2_t", pretrained=False, preprocessing=Preprocessing(input_size=(3, 32, 32))
        ),
    ],
    ids=["coatnet", "focalnet", "swin v2"],
)
def test_channels_that_are_coupled_to_ever_more_indices_are_left(make: Callable[[], Backbone]) -> None:
    """Torch-Pruning would follow them until memory ends, or for hours."""
    backbone = make()
    assert any(graft.kind == "pruned" for graft in Pruned().blueprint(backbone).grafts)


def test_layers_that_cannot_be_made_smaller_are_named() -> None:
    with pytest.raises(MethodNotApplicableError, match=r"pruned: .* a GlobalResponseNorm cannot be pruned"):
        Pruned().draft(make_timm("convnextv2_atto", 32, depths=(1, 1, 1, 1)), 3)

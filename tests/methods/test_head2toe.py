"""Head2Toe: which features are read, chosen and stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from conftest import color_task, draft_patch, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.data.task import Task
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, InvalidPatchError, MethodError
from modelpatch.heads.base import HeadRecord
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.head2toe import ChoosingHead, Head2Toe
from modelpatch.methods.hooks import Batch
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.train import fit
from tolerance import close


def test_the_head_reads_every_block_at_unit_length(tiny: Backbone) -> None:
    model = Head2Toe().draft(tiny, 3)
    images = torch.randn(2, 3, 16, 16)
    features = model.run_prefix(images, model.end)
    expected, x = [], images
    for segment in tiny.chain:
        x = segment.module(x)
        if segment.is_block or segment.index == len(tiny.chain) - 1:
            pooled = x.mean((2, 3)) if x.ndim == 4 else x
            expected.append(pooled / pooled.norm(dim=1, keepdim=True))
    assert torch.allclose(features, torch.cat(expected, 1), atol=1e-6)
    assert close(model.run_from(features, model.end), model(images))
    assert model.first == len(tiny.chain)


def test_tokens_and_channels_last_are_pooled_over_their_positions() -> None:
    for name, width in (("vit_tiny_patch16_224", 192), ("swin_tiny_patch4_window7_224", 96)):
        backbone = make_timm(name, 64, img_size=64)
        model = Head2Toe().draft(backbone, 3)
        features = model.run_prefix(torch.randn(1, 3, 64, 64), model.end)
        assert features[:, :width].norm() == pytest.approx(1, abs=1e-4)
        assert features.shape[1] == model.head.weight.shape[1]


def test_a_share_of_the_features_is_chosen_and_stored(tmp_path: Path) -> None:
    backbone = make_tiny()
    patch = fit(backbone, color_task(48), Head2Toe(keep=0.2), epochs=10, batch_size=8)
    total = sum(block.output_shape[0] for block in backbone.chain.blocks) + backbone.chain.feature_dim
    assert patch.head.features == round(0.2 * total)
    assert patch.tensors["head.weight"].shape == (3, patch.head.features)
    assert patch.metrics["test_top1"] >= 0.9
    loaded = Patch.load(patch.save(tmp_path / "p.safetensors"))
    images = torch.randn(3, 3, 16, 16)
    assert close(backbone.patched(loaded)(images), BoundPatch(backbone, patch)(images))


def test_the_features_with_the_largest_norms_are_chosen() -> None:
    head = ChoosingHead(4, 2, (0,), keep=0.5)
    head.weight.data = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.5, 0.0, 1.0, 0.1]])
    head.choose()
    assert head.stored()["selected"].tolist() == [1, 2]
    x = torch.randn(5, 4)
    stored = torch.nn.functional.linear(x[:, [1, 2]], head.stored()["weight"], head.bias)
    assert torch.allclose(head(x), stored)


def test_the_lasso_counts_until_the_choice(tiny: Backbone) -> None:
    method = Head2Toe(lasso=0.5)
    model = method.draft(tiny, 3)
    (hook,) = method.hooks()
    batch = Batch(torch.zeros(0), 0, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with torch.no_grad():
        assert hook.added_loss(model, batch) == pytest.approx(0.5 * model.head.weight.norm(dim=0).sum().item())
    hook.step(model, 49, 100)
    assert hook.added_loss(model, batch) != 0
    hook.step(model, 50, 100)
    assert hook.added_loss(model, batch) == 0


def test_it_goes_with_other_methods_but_not_inside_a_stage_that_is_replaced_as_one(tiny: Backbone) -> None:
    both = fit(tiny, color_task(), Head2Toe() + ScaleBias(), epochs=2)
    assert both.head.kind == "selected"
    assert any(name.startswith("replace/") for name in both.tensors)
    with pytest.raises(ForeignTensorError, match="inside a run of segments"):
        (Head2Toe() + DeltaNetwork()).draft(tiny, 3)


def test_a_selection_the_backbone_does_not_have_is_refused(tiny: Backbone) -> None:
    patch = draft_patch(tiny, Head2Toe())
    for value in (-1, 10_000):
        selected = patch.tensors["head.selected"].clone()
        selected[0] = value
        BoundPatch(tiny, patch)  # the structure it would share
        for bind in (Backbone.patched, BoundPatch):
            with pytest.raises(ForeignTensorError, match="selects features"):
                bind(tiny, replace(patch, tensors={**patch.tensors, "head.selected": selected}))
    far = replace(patch, head=patch.head.model_copy(update={"taps": (1, 99)}))
    with pytest.raises(ForeignTensorError, match="reads segment 99"):
        tiny.patched(far)


@pytest.mark.parametrize(
    ("kind", "taps"), [("linear", (1,)), ("selected", ()), ("selected", (2, 1)), ("selected", (-1,))]
)
def test_records_whose_taps_make_no_sense_are_refused(kind: str, taps: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=r"has no taps|needs taps|in their order"):
        HeadRecord(kind=kind, features=3, outputs=2, taps=taps)  # type: ignore[arg-type]


def test_a_file_whose_head_has_other_tensors_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(tiny, Head2Toe())
    short = replace(patch, tensors={**patch.tensors, "head.selected": patch.tensors["head.selected"][:-1]})
    with pytest.raises(InvalidPatchError, match="selected head"):
        Patch.load(short.save(tmp_path / "p.safetensors"))


def test_an_early_exit_reads_the_first_blocks_alone(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, "head2toe(until=stage1,keep=1)", epochs=1)
    early = [block for block in tiny.chain.blocks if block.name.startswith("stage1")]
    assert patch.head.taps == tuple(block.index for block in early)
    assert patch.head.features == sum(block.output_shape[0] for block in early)
    engine = Engine(tiny, {"early": patch}, tuning=Tuning())
    macs = sum(segment.macs for segment in tiny.chain[: early[-1].index + 1])
    assert engine.plan_for(1, ["early"]).flops == 2 * macs
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(engine(images, only=["early"])["early"], tiny.patched(patch)(images))


def test_an_exit_before_the_first_block_is_refused(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match="until='stem' lies before the first block"):
        Head2Toe(until="stem").draft(tiny, 3)
    with pytest.raises(MethodError, match="'block9' names no block"):
        Head2Toe(until="block9").draft(tiny, 3)

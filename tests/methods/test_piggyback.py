"""Piggyback: thresholds, gradients, starts, files, and what the paper says of them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models import vgg as timm_vgg
from torch import Tensor, nn
from torchvision.models import vgg as torchvision_vgg

from conftest import color_task, draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import MethodError, MethodNotApplicableError, TrainingWarning
from modelpatch.methods.piggyback import Mask, Piggyback, weight_names
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.train import fit
from tolerance import close

VGG_WIDTH = 4096  # features before the logits
WEIGHT = torch.tensor([[0.5, -1.0, 0.0], [2.0, -0.25, 4.0]])


def mask_of(scores: list[list[float]], **options: object) -> Mask:
    """A mask over `WEIGHT` with these scores."""
    module = Mask(Piggyback(**options), WEIGHT)  # type: ignore[arg-type]
    module.scores.data = torch.tensor(scores)
    return module


SCORES = [[0.004, 0.005, 0.006], [-0.001, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0, 1, 1], [0, 0, 1]]),
        ({"at_threshold": "masked"}, [[0, 0, 1], [0, 0, 1]]),
        ({"ternary": True}, [[0, 1, 1], [-1, 0, 1]]),
        ({"threshold": 0.0055}, [[0, 0, 1], [0, 0, 1]]),
    ],
)
def test_scores_become_masks_at_the_threshold(options: dict[str, object], expected: list[list[int]]) -> None:
    module = mask_of(SCORES, **options)
    assert module.mask().int().tolist() == expected
    assert torch.equal(module(WEIGHT), WEIGHT * torch.tensor(expected))
    assert module.mask().dtype == (torch.int8 if options.get("ternary") else torch.bool)


@pytest.mark.parametrize("scaling", ["none", "mean", "weight"])
def test_gradients_pass_the_threshold_times_the_weight(scaling: str) -> None:
    module = mask_of(SCORES, scaling=scaling)
    outer = torch.randn(2, 3)
    (module(WEIGHT) * outer).sum().backward()
    expected = outer * WEIGHT
    if scaling == "mean":
        expected = expected / WEIGHT.abs().mean()
    if scaling == "weight":
        expected = torch.where(WEIGHT == 0, 0.0, outer * WEIGHT / WEIGHT.abs())
    assert module.scores.grad is not None
    assert torch.allclose(module.scores.grad, expected)


@pytest.mark.parametrize("start", ["constant", "magnitude"])
def test_the_first_forward_pass_is_the_bases(start: str, tiny: Backbone) -> None:
    model = Piggyback(start=start).draft(tiny, 3)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 16, 16)
    assert close(model.head(tiny.chain(images)), model(images))
    assert all(mask.all() for name, mask in model.tensors().items() if name.startswith("mask/"))


def test_uniform_scores_keep_the_share_above_the_threshold(tiny: Backbone) -> None:
    torch.manual_seed(0)
    patch = Piggyback(start="uniform").draft(tiny, 3).tensors()
    masks = torch.cat([mask.flatten() for name, mask in patch.items() if name.startswith("mask/")])
    assert masks.float().mean() == pytest.approx(0.25, abs=0.05)  # (start_at - threshold) / (2 start_at)


def test_magnitude_gives_every_layer_a_threshold_at_half_its_start() -> None:
    module = Mask(Piggyback(start="magnitude"), WEIGHT)
    assert torch.allclose(module.scores, WEIGHT.abs().mean().expand(2, 3))
    assert module.threshold == pytest.approx(float(WEIGHT.abs().mean()) / 2)


def test_every_weight_that_layers_multiply_with_is_masked_and_nothing_else(tiny: Backbone) -> None:
    expected = {n for n, p in tiny.module.named_parameters() if p.ndim > 1 and not n.startswith("fc")}
    assert set(weight_names(tiny)) == expected
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.attention, self.fc = nn.Conv2d(3, 8, 4, 4), attention, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            return self.fc((tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))

    backbone = load_backbone(Net(), preprocessing=small_preprocessing())
    assert "attention.in_proj_weight" in weight_names(backbone)
    patch = fit(backbone, color_task(), Piggyback(lr=1e-2), epochs=2)
    assert not patch.tensors["mask/attention.in_proj_weight"].all()


def test_a_vision_transformers_embeddings_and_tokens_are_left_alone() -> None:
    names = weight_names(make_timm("vit_tiny_patch16_224", 32, img_size=32))
    assert not any("pos_embed" in name or "token" in name for name in names)
    assert "blocks.0.attn.qkv.weight" in names


def test_training_flips_bits_learns_the_task_and_keeps_the_base(tmp_path: Path) -> None:
    backbone, data = make_tiny(), color_task(48)
    patch = fit(backbone, data, Piggyback(lr=3e-3), epochs=12, batch_size=8)
    assert patch.metrics["test_top1"] >= 0.9
    kept = torch.cat([mask.flatten() for name, mask in patch.tensors.items() if name.startswith("mask/")])
    assert 0.1 < kept.float().mean() < 1
    assert Fingerprint.of(backbone.chain) == backbone.fingerprints
    figures = patch.inspect()
    assert figures.masks is not None
    assert figures.masks.kept == pytest.approx(float(kept.float().mean()))
    assert figures.masks.bits_per_weight <= 8 * sum(-(-t.numel() // 8) for t in patch.tensors.values()) / kept.numel()
    parts = {part.name: part.kept for part in figures.parts if part.kind == "mask"}
    assert parts["stage1.0.conv1"] == pytest.approx(float(patch.tensors["mask/stage1.0.conv1.weight"].float().mean()))


def test_a_bound_patch_costs_its_bits(tiny: Backbone) -> None:
    patch = draft_patch(tiny, Piggyback())
    weights = [t for n, t in patch.tensors.items() if n.startswith("mask/")]
    rest = sum(-(-t.numel() // 16) * 64 for n, t in patch.tensors.items() if not n.startswith("mask/"))
    assert BoundPatch(tiny, patch).nbytes == rest + sum(-(-t.numel() // 8) for t in weights)


def test_trained_norms_are_in_the_patch_and_learn_at_their_own_rate(tiny: Backbone) -> None:
    method = Piggyback(norms="trained", lr=1e-4, norm_lr=1e-2, weight_decay=0.1)
    model = method.draft(tiny, 3)
    assert {name for name in model.tensors() if name.startswith("replace/")} == {
        name for name in ScaleBias().draft(tiny, 3).tensors() if name.startswith("replace/")
    }
    scores = {id(parameter) for name, parameter in model.trainable() if name.startswith("mask/")}
    for group in method.parameter_groups(model, tiny):
        for parameter in group["params"]:
            if id(parameter) in scores:
                assert (group["lr"], group["weight_decay"]) == (1e-4, 0)
    rates = {group["lr"] for group in method.parameter_groups(model, tiny)}
    assert rates == {1e-4, 1e-2}


def test_a_run_in_which_no_bit_can_flip_is_said_before_it_starts(tiny: Backbone, colors: object) -> None:
    with pytest.warns(TrainingWarning, match=r"no bit of a mask can flip.*0.005 above"):
        fit(tiny, colors, Piggyback(lr=1e-5), epochs=1)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        fit(tiny, colors, Piggyback(lr=1e-2), epochs=1)  # type: ignore[arg-type]


def test_the_warning_is_exact_for_adam() -> None:
    """(0.01 - 0.005) / 1e-4 = 50 steps at the full rate are the fewest that flip a bit."""
    assert Piggyback(lr=1e-4).warn(49.9) is not None
    assert Piggyback(lr=1e-4).warn(50.1) is None
    module = Mask(Piggyback(), torch.ones(4))
    optimizer = torch.optim.Adam([module.scores], lr=1e-4)
    flipped_at = None
    for step in range(60):
        module(torch.ones(4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if flipped_at is None and not module.mask().all():
            flipped_at = step + 1
    assert flipped_at in (50, 51, 52)


# warm start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ternary", [False, True])
def test_masks_start_from_another_tasks(ternary: bool, tiny: Backbone, tmp_path: Path) -> None:
    earlier = draft_patch(tiny, Piggyback(ternary=ternary, start="uniform"))
    path = earlier.save(tmp_path / "earlier.safetensors")
    model = Piggyback(ternary=ternary, warm_start=str(path)).draft(tiny, 3)
    for name, mask in model.tensors().items():
        if name.startswith("mask/"):
            assert torch.equal(mask, earlier.tensors[name])


def test_a_warm_start_needs_masks_of_the_same_base(tiny: Backbone, tmp_path: Path) -> None:
    path = draft_patch(tiny, ScaleBias()).save(tmp_path / "norms.safetensors")
    with pytest.raises(MethodError, match="scale-bias patch without masks"):
        Piggyback(warm_start=str(path)).draft(tiny, 3)


def test_a_warm_start_and_a_random_one_contradict_each_other() -> None:
    with pytest.raises(MethodError, match=r"earlier mask says, start='uniform' where chance says. Drop one"):
        Piggyback(warm_start="earlier.safetensors", start="uniform")
    assert Piggyback(start="uniform").warm_start is None


def test_magnitude_scales_a_warm_start_too() -> None:
    earlier = torch.tensor([[True, False, True], [False, True, True]])
    module = Mask(Piggyback(start="magnitude", warm_start="earlier.safetensors"), WEIGHT, earlier)
    assert module.scores[earlier].allclose(WEIGHT.abs().mean())
    assert torch.equal(module.mask(), earlier)


@pytest.mark.parametrize("start", ["constant", "magnitude"])
@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("start_at", [0.006, 0.02])
def test_every_warm_start_begins_with_the_earlier_mask(
    tiny: Backbone, tmp_path: Path, start: str, ternary: bool, start_at: float
) -> None:
    patch = draft_patch(tiny, Piggyback(ternary=ternary))
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.randint(-1 if ternary else 0, 2, tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in patch.tensors.items()
        if name.startswith("mask/")
    }
    path = replace(patch, tensors={**patch.tensors, **masks}).save(tmp_path / "earlier.safetensors")
    method = Piggyback(ternary=ternary, start=start, start_at=start_at, warm_start=str(path))  # type: ignore[arg-type]
    drafted = method.draft(tiny, 3).tensors()
    assert all(torch.equal(drafted[name], mask) for name, mask in masks.items())


# what does not fit ------------------------------------------------------------------------------------------


def test_a_start_below_the_threshold_is_refused(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match="every weight would start masked"):
        Piggyback(start_at=1e-3).draft(tiny, 3)
    with pytest.raises(MethodError, match="every weight would start masked"):
        Piggyback(start="uniform", start_at=1e-3).draft(tiny, 3)


def test_a_network_without_weights_is_refused() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(MethodNotApplicableError, match="no weights to mask"):
        Piggyback().draft(load_backbone(module, preprocessing=small_preprocessing()), 3)


def test_norms_are_trained_only_where_there_are_some() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    assert Piggyback().blueprint(backbone).owned == ("0.weight",)
    with pytest.raises(MethodNotApplicableError, match=r"no normalisation layer for piggyback's norms='trained'"):
        Piggyback(norms="trained").blueprint(backbone)


def test_the_order_in_which_tasks_are_learned_does_not_matter(tmp_path: Path) -> None:
    """Claim P6: masks of one task do not see those of another."""
    backbone, first, second = make_tiny(), color_task(24, seed=0), color_task(24, seed=1)
    ways = []
    for order in ((first, second), (second, first)):
        patches = {id(data): fit(backbone, data, Piggyback(lr=1e-2), epochs=2) for data in order}
        ways.append([patches[id(data)].content_hash for data in (first, second)])
    assert ways[0] == ways[1]


def test_the_straight_through_gradient_reaches_every_score(tiny: Backbone) -> None:
    model = Piggyback().draft(tiny, 3)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
    scores = [parameter for name, parameter in model.trainable() if name.startswith("mask/")]
    assert len(scores) == len(weight_names(tiny))
    assert all(score.grad is not None and score.grad.abs().sum() > 0 for score in scores)
    assert all(parameter.grad is None for parameter in tiny.module.parameters())


def test_a_saved_mask_gives_the_trained_models_logits(tmp_path: Path) -> None:
    backbone = make_tiny()
    patch = fit(backbone, color_task(), Piggyback(lr=1e-2, ternary=True), epochs=2)
    images = torch.randn(3, 3, 16, 16)
    loaded = Patch.load(patch.save(tmp_path / "p.safetensors"))
    assert close(backbone.patched(loaded)(images), BoundPatch(backbone, patch)(images))


# VGG --------------------------------------------------------------------------------------------------------

THIN = [width if width == "M" else width // 16 for width in timm_vgg.cfgs["vgg16"]]  # type: ignore[operator]
HIDDEN = 16


def vgg_of_timm(batch_norm: bool) -> nn.Module:
    """VGG-16 with a sixteenth of its channels; its two layers before the logits are convolutions, 7x7 and 1x1."""
    norm = nn.BatchNorm2d if batch_norm else None
    return timm_vgg.VGG(THIN, num_classes=7, norm_layer=norm, mlp_ratio=HIDDEN / VGG_WIDTH)


def vgg_of_torchvision(batch_norm: bool) -> nn.Module:
    """The same from torchvision, where those two layers are linear."""
    module = torchvision_vgg.VGG(torchvision_vgg.make_layers(THIN, batch_norm), num_classes=7)  # type: ignore[arg-type]
    first, act, drop, second, *_ = nn.Sequential(
        nn.Linear(32 * 49, HIDDEN), nn.ReLU(True), nn.Dropout(), nn.Linear(HIDDEN, VGG_WIDTH)
    )
    module.classifier = nn.Sequential(first, act, drop, second, nn.ReLU(True), nn.Dropout(), nn.Linear(VGG_WIDTH, 7))
    return module


def vgg_weights(widths: list[int | str], hidden: int) -> int:
    """Weights of VGG's 3x3 convolutions and of its two layers before the logits."""
    channels = [3, *(width for width in widths if isinstance(width, int))]
    return sum(9 * a * b for a, b in itertools.pairwise(channels)) + hidden * (49 * channels[-1] + VGG_WIDTH)


def test_a_mask_of_vgg_has_the_size_that_the_paper_prints() -> None:
    """537 MB for the network, 621 MB with the masks of five tasks."""
    bits = vgg_weights(timm_vgg.cfgs["vgg16"], VGG_WIDTH)
    assert bits / 8e6 == pytest.approx((621 - 537) / 5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True], ids=["vgg16", "vgg16_bn"])
@pytest.mark.parametrize("make", [vgg_of_timm, vgg_of_torchvision])
def test_vgg_is_masked_up_to_its_logits(make: Callable[[bool], nn.Module], batch_norm: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make(batch_norm)
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    *masked, logits = (f"{name}.weight" for name in layers)
    backbone = load_backbone(module, preprocessing=small_preprocessing(32))
    images = torch.randn(2, 3, 32, 32)
    before = backbone(images)
    method = Piggyback(lr=1e-2, norms="trained" if batch_norm else "frozen")
    assert list(weight_names(backbone)) == masked
    assert logits not in method.blueprint(backbone).owned
    assert len(masked) == 13 + 2
    affine = 2 * sum(width for width in THIN if isinstance(width, int)) if batch_norm else 0
    assert method.count_parameters(backbone) == vgg_weights(THIN, HIDDEN) + affine

    patch = fit(backbone, color_task(12, 32), method, epochs=2, batch_size=6)
    figures = patch.inspect().masks
    assert figures is not None
    assert figures.weights == vgg_weights(THIN, HIDDEN)
    assert figures.kept < 1
    assert not any(patch.tensors[f"mask/{name}"].all() for name in masked[-2:])
    assert Fingerprint.of(backbone.chain) == backbone.fingerprints
    assert torch.equal(backbone(images), before)
    loaded = Patch.load(patch.save(tmp_path / "vgg.safetensors"))
    assert close(backbone.patched(loaded)(images), backbone.patched(patch)(images))

"""Adapters of transformers, BitFit and SSF: counts, formulas, folding, and which networks they fit."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

from conftest import draft_patch, make_timm, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.convert.exporting import state_dict_of
from modelpatch.errors import ForeignTensorError, MethodError, MethodNotApplicableError, PatchError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.adaptformer import AdaptFormer
from modelpatch.methods.bitfit import BitFit
from modelpatch.methods.bottleneck import Bottleneck, Bottlenecked, add_bottlenecks
from modelpatch.methods.convpass import Convpass
from modelpatch.methods.houlsby import Houlsby
from modelpatch.methods.method import Method
from modelpatch.methods.mona import Mona
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.registry import make_method
from modelpatch.methods.repadapter import RepAdapted, RepAdapter, add_rep_adapters
from modelpatch.methods.scale_bias import ChannelAffine, add_channel_affines
from modelpatch.methods.ssf import SSF
from modelpatch.methods.transformer import find_parts
from modelpatch.methods.vpt import VPT
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.contents import decode_patch, encode_patch
from modelpatch.patch.folding import fold
from modelpatch.patch.model import PatchedModel
from tolerance import close

ROOT = Path(__file__).parents[2]
WIDTH = 768  # of ViT-B/16
BOTTLENECKS = (AdaptFormer(), Houlsby(), RepAdapter())


@cache
def vit(width: int = 48, depth: int = 2) -> Backbone:
    return make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=depth, embed_dim=width, num_heads=3)


@pytest.fixture(scope="module")
def vit_base() -> Backbone:
    """A ViT-B/16 of small images, on whose size no number of these patches depends."""
    return make_timm("vit_base_patch16_224", 32, img_size=32)


def wrapped_modules(backbone: Backbone, method: Method) -> list[str]:
    """Names, within their segments, of what a method's grafts wrap."""
    grafts = method.blueprint(backbone).grafts
    return [name for graft in grafts for name in graft.arguments.get("modules", graft.arguments.get("layers"))]


def ends_with(names: list[str], *ends: str) -> bool:
    """True if the names end so, each end in two blocks."""
    return len(names) == 2 * len(ends) and all(sum(name.endswith(end) for name in names) == 2 for end in ends)


# the papers' numbers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "expected", "published"),
    [
        (BitFit(), 12 * (2 + 3 + 1 + 4 + 1) * WIDTH + 2 * WIDTH, 0.10),
        (SSF(), 2 * (12 * (2 + 3 + 1 + 4 + 1) * WIDTH + 2 * WIDTH), 0.20),  # with heads of VTAB-1k 0.24
        (AdaptFormer(), 12 * (2 * WIDTH * 64 + 64 + WIDTH), 1.26 - 0.07),  # without the head of 100 classes
        (Houlsby(norms="frozen"), 12 * 2 * (2 * WIDTH * 64 + 64 + WIDTH), None),
        (Houlsby(width=8), 12 * 2 * (2 * WIDTH * 8 + 8 + WIDTH + 2 * WIDTH), None),
        (
            RepAdapter(),
            12 * 2 * (WIDTH * 8 + WIDTH * 8 // 2) + 12 * 2 * (8 + WIDTH),
            0.22 + 0.02,
        ),  # the paper's and biases
        (Convpass(), 12 * 2 * (WIDTH * 8 + 8 + 9 * 8 * 8 + 8 + 8 * WIDTH + WIDTH), 0.33),
        (
            Mona(),
            12 * 2 * (2 * WIDTH + 2 * WIDTH + 2 * WIDTH * 64 + 64 + WIDTH + 64 * (9 + 25 + 49 + 3) + 64 * 65),
            None,
        ),
        (VPT(length=10), 12 * 10 * WIDTH, None),
        (VPT(depth="shallow"), 50 * WIDTH, 0.04),
    ],
    ids=lambda value: repr(value) if isinstance(value, Method) else "",
)
def test_a_patch_of_vit_base_holds_what_the_paper_counts(
    vit_base: Backbone, method: Method, expected: int, published: float | None
) -> None:
    assert method.count_parameters(vit_base) == expected
    assert published is None or abs(expected / 1e6 - published) < 0.01


@pytest.mark.slow
def test_the_documented_numbers_of_vit_base_are_counted(vit_base: Backbone) -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| .* \| ([\d,]+) \|$", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    documented = {spec: int(count.replace(",", "")) for spec, count in rows}
    assert len(documented) == 8
    assert documented == {spec: make_method(spec).count_parameters(vit_base) for spec in documented}


# the formulas ---------------------------------------------------------------------------------------------------


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 8), (4, 5, 6)),
        (nn.Linear(6, 8, bias=False), (4, 6)),
        (nn.Conv2d(6, 8, 3, stride=2, bias=False), (4, 6, 9, 9)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (4, 6, 9, 9)),
    ],
)
def test_a_scale_and_shift_is_a_layer(layer: nn.Module, shape: tuple[int, ...], strength: float) -> None:
    wrapped = randomised(add_channel_affines(layer, [""]))
    wrapped.strength = strength  # type: ignore[assignment]
    x = torch.randn(shape)
    gamma, beta = 1 + strength * (wrapped.scale - 1), strength * wrapped.bias
    if isinstance(layer, nn.Conv2d):
        gamma, beta = gamma.view(-1, 1, 1), beta.view(-1, 1, 1)
    torch.testing.assert_close(wrapped(x), gamma * layer(x) + beta)
    folded = fold(nn.Sequential(wrapped))
    assert type(folded[0]) is type(layer)
    torch.testing.assert_close(folded(x), wrapped(x))


def test_a_layer_that_makes_its_weight_itself_keeps_its_affine() -> None:
    wrapped = add_channel_affines(ScaledStdConv2d(6, 8, 3), [""])
    assert isinstance(fold(nn.Sequential(wrapped))[0], ChannelAffine)


@pytest.mark.parametrize(("groups", "bias", "strength"), [(1, True, 1.0), (2, False, 1.0), (4, True, 0.5)])
def test_a_rep_adapter_is_part_of_the_layer_behind_it(groups: int, bias: bool, strength: float) -> None:
    layer = nn.Linear(12, 5, bias=bias)
    wrapped = randomised(add_rep_adapters(layer, 4, groups, 0.7, [""]))
    assert isinstance(wrapped, RepAdapted)
    wrapped.strength = strength
    x = torch.randn(3, 7, 12)
    halves = wrapped.down(x).chunk(groups, -1)
    up = torch.cat([half @ matrix.T for half, matrix in zip(halves, wrapped.up, strict=True)], -1)
    torch.testing.assert_close(wrapped(x), layer(x + 0.7 * strength * (up + wrapped.bias)))
    folded = fold(nn.Sequential(wrapped))
    assert type(folded[0]) is nn.Linear
    torch.testing.assert_close(folded(x), wrapped(x))


def test_bottlenecks_stand_beside_the_mlp_or_after_attention_and_mlp() -> None:
    backbone = vit()
    x = torch.randn(2, 5, 48)
    segment = next(segment for segment in backbone.chain if find_parts(backbone, segment).mlp)
    block = segment.module

    def added(adapter: Bottleneck, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return F.linear(act(F.linear(x, adapter.down.weight, adapter.down.bias)), adapter.up.weight, adapter.up.bias)

    with torch.no_grad():
        (beside, *_) = backbone.patched(draft_patch(backbone, AdaptFormer(width=4, scale=0.3))).variants
        y = x + block.attn(block.norm1(x))
        z = block.norm2(y)
        torch.testing.assert_close(beside(x), y + block.mlp(z) + 0.3 * added(beside.mlp.adapter, z, F.relu))
        (after, *_) = backbone.patched(draft_patch(backbone, Houlsby(width=4, norms="frozen"))).variants
        h = block.attn(block.norm1(x))
        y = x + h + added(after.attn.adapter, h, F.gelu)
        h = block.mlp(block.norm2(y))
        torch.testing.assert_close(after(x), y + h + added(after.mlp.adapter, h, F.gelu))


def strong(model: PatchedModel) -> PatchedModel:
    """The model with random numbers where a patch starts with zeros."""
    with torch.no_grad():
        for name, parameter in model.trainable():
            if name.startswith("graft/"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def as_image(x: Tensor) -> Tensor:
    return x[:, 1:].transpose(1, 2).unflatten(2, (2, 2))


@torch.no_grad()
def test_convolutions_stand_beside_attention_and_mlp() -> None:
    backbone = vit()
    segment = next(segment for segment in backbone.chain if find_parts(backbone, segment).mlp)
    block, x = segment.module, torch.randn(2, 5, 48)
    variant, *_ = strong(Convpass(width=4, scale=0.3).draft(backbone, 3)).variants

    def added(bypass: nn.Module, x: Tensor) -> Tensor:
        h = F.gelu(bypass.down(x))
        image = F.conv2d(as_image(h), bypass.convolution.weight, bypass.convolution.bias, padding=1)
        first = h[:, :1] @ bypass.convolution.weight[:, :, 1, 1].T + bypass.convolution.bias  # an image of one pixel
        return bypass.up(F.gelu(torch.cat([first, image.flatten(2).transpose(1, 2)], 1)))

    z = block.norm1(x)
    y = x + block.attn(z) + 0.3 * added(variant.attn.adapter, z)
    z = block.norm2(y)
    torch.testing.assert_close(variant(x), y + block.mlp(z) + 0.3 * added(variant.mlp.adapter, z))


@torch.no_grad()
def test_mona_stands_on_the_stream() -> None:
    backbone = vit()
    segment = next(segment for segment in backbone.chain if find_parts(backbone, segment).mlp)
    block, x = segment.module, torch.randn(2, 5, 48)
    variant, *_ = strong(Mona(width=4).draft(backbone, 3)).variants

    def mona(one: nn.Module, x: Tensor) -> Tensor:
        h = one.down(one.normed * F.layer_norm(x, (48,), one.norm.weight, one.norm.bias) + one.plain * x)

        def mixed(image: Tensor) -> Tensor:
            image = image + sum(convolution(image) for convolution in one.depthwise) / 3
            return image + one.pointwise(image)

        parts = mixed(h[:, 0, :, None, None]).flatten(2), mixed(as_image(h)).flatten(2)
        return x + one.up(F.gelu(torch.cat(parts, 2).transpose(1, 2)))

    y = mona(variant.block.norm2.adapter, x + block.attn(block.norm1(x)))
    torch.testing.assert_close(variant(x), mona(variant.adapter, y + block.mlp(block.norm2(y))))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@torch.no_grad()
def test_prompts_are_tokens_of_every_block_or_of_all_together(depth: Literal["deep", "shallow"]) -> None:
    backbone = vit()
    blocks = [segment.module for segment in backbone.chain if find_parts(backbone, segment).mlp]
    model, x = VPT(length=3, depth=depth).draft(backbone, 3), torch.randn(2, 5, 48)
    given = [one.prompts.expand(2, -1, -1) for one in model.variants]
    assert len(given) == (2 if depth == "deep" else 1)
    bound = math.sqrt(6 / (48 + 48))
    assert given[0].abs().max() <= bound < 1.3 * given[0].abs().max()
    expected = torch.cat([x[:, :1], given[0], x[:, 1:]], 1)  # behind the class token, as in the paper
    for number, block in enumerate(blocks):
        if number and depth == "deep":
            expected = torch.cat([expected[:, :1], given[number], expected[:, 4:]], 1)
        expected = block(expected)
    y = x
    for variant in model.variants:
        y = variant(y)
    torch.testing.assert_close(y, torch.cat([expected[:, :1], expected[:, 4:]], 1))


# patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SSF(), RepAdapter()], ids=lambda method: method.name)
def test_a_folded_model_and_its_state_dict_give_the_patchs_logits(method: Method) -> None:
    backbone = vit()
    patch = draft_patch(backbone, method)
    images = torch.randn(3, *backbone.input_size)
    for strength in (1.0, 0.5):
        turned = patch.at_strength(strength)
        logits = backbone.patched(turned)(images)
        folded = fold(backbone.patched(turned))
        assert (folded(images) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert not [one for one in folded.modules() if isinstance(one, ChannelAffine | RepAdapted)]
        module = copy.deepcopy(backbone.module)
        module.reset_classifier(3)  # type: ignore[operator]
        module.load_state_dict(state_dict_of(backbone, turned))
        assert (module(images) - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("method", [*BOTTLENECKS, SSF(), Convpass(), Mona(width=4)], ids=lambda method: method.name)
def test_adapters_go_with_masks(method: Method) -> None:
    backbone, images = vit(), torch.randn(2, 3, 32, 32)
    model = (Piggyback() + method).draft(backbone, 3)
    with torch.no_grad():
        for _, tensor in model.trainable():
            tensor.add_(0.02 * torch.randn_like(tensor))
        logits = model(images)
        assert close(backbone.patched(model.to_patch(("draft", ["a", "b", "c"])))(images), logits)
        assert close(fold(model)(images), logits)


def test_bottlenecks_do_not_fold_into_a_state_dict() -> None:
    with pytest.raises(PatchError, match=r"adds modules \(bottleneck\)"):
        state_dict_of(vit(), draft_patch(vit(), AdaptFormer(width=4)))


@pytest.mark.parametrize("method", [*BOTTLENECKS, SSF(), Convpass(), Mona(width=4)], ids=lambda method: method.name)
def test_without_strength_the_base_is_left(method: Method) -> None:
    backbone = vit()
    patch = draft_patch(backbone, method)
    images = torch.randn(2, *backbone.input_size)
    model = backbone.patched(patch.at_strength(0))
    with torch.no_grad():
        torch.testing.assert_close(model.head_input(images, 0), backbone.chain(images))
        assert not torch.allclose(backbone.patched(patch).head_input(images, 0), backbone.chain(images), atol=1e-3)


# which networks -------------------------------------------------------------------------------------------------


def torchvision_vit() -> Backbone:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=5)
    return load_backbone(module, preprocessing=small_preprocessing(32))


class Logits(nn.Module):
    """A network of transformers that answers with its logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        self.network = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=5, **sizes))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def transformers_vit() -> Backbone:
    return load_backbone(Logits(), preprocessing=small_preprocessing(32), classifier="network.classifier")


def swin() -> Backbone:
    sizes = {"window_size": 2, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)}
    return make_timm("swin_tiny_patch4_window7_224", 32, img_size=32, **sizes)


@pytest.mark.parametrize(
    ("make", "attention", "readers"),
    [
        (vit, "attn", ["attn.qkv", "mlp.fc1"]),
        (swin, "attn", ["attn.qkv", "mlp.fc1"]),
        (torchvision_vit, "self_attention", ["mlp.0"]),
        (transformers_vit, "attention", ["q_proj", "k_proj", "v_proj", "mlp.fc1"]),
    ],
)
def test_attention_and_mlp_are_found_by_what_they_compute(
    make: Callable[[], Backbone], attention: str, readers: list[str]
) -> None:
    backbone = make()
    assert ends_with(wrapped_modules(backbone, AdaptFormer()), "mlp")
    assert ends_with(wrapped_modules(backbone, Houlsby()), attention, "mlp")
    assert ends_with(wrapped_modules(backbone, RepAdapter()), *readers)
    assert ends_with(wrapped_modules(backbone, Convpass()), attention, "mlp")
    images = torch.randn(2, *backbone.input_size)
    prompts = () if make is swin else (VPT(length=3), VPT(length=3, depth="shallow"))
    for method in (*BOTTLENECKS, Convpass(), Mona(width=4), *prompts):
        model = backbone.patched(draft_patch(backbone, method))
        logits = model(images)
        assert (fold(model)(images) - logits).abs().max() <= 1e-5 * logits.abs().max()


class PreNorm(nn.Module):
    """Tokens plus what a module makes of them normalised."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = nn.LayerNorm(8), module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(self.norm(x))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class TokenNet(nn.Module):
    """Blocks over the tokens of patches of `size` pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, size, size)
        mlp = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.blocks = nn.Sequential(*(nn.Sequential(PreNorm(SelfAttention()), PreNorm(one)) for one in mlp))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def swin_v2() -> Backbone:
    """A Swin V2 of transformers: its tables of places have as many columns in as out, and a shifted window holds one token."""
    from transformers import Swinv2Config, Swinv2ForImageClassification

    sizes = {
        "image_size": 32,
        "patch_size": 4,
        "window_size": 2,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 2),
    }
    return load_backbone(Swinv2ForImageClassification(Swinv2Config(**sizes)), preprocessing=small_preprocessing(32))


def test_parts_read_what_the_image_makes_and_hold_no_others() -> None:
    backbone = swin_v2()
    found = [find_parts(backbone, segment) for segment in backbone.chain.blocks]
    names = [[part.name for part in (*parts.attention, *parts.mlp)] for parts in found]
    assert all(len(own) == 1 and own[0].endswith(".attention") for own in names), names
    patch, images = draft_patch(backbone, Houlsby()), torch.randn(2, 3, 32, 32)
    read = decode_patch(encode_patch(patch), "patch")
    assert close(backbone.patched(read)(images), backbone.patched(patch)(images))


def test_prompts_of_blocks_of_several_widths_have_these() -> None:
    backbone = make_timm("pit_ti_224", 32, img_size=32, depth=(1, 1, 1), base_dims=(8, 8, 8), heads=(2, 4, 8))
    model = VPT(length=3).draft(backbone, 3)
    assert {tuple(one.shape) for name, one in model.trainable() if name.endswith("prompts")} == {
        (3, 16),
        (3, 32),
        (3, 64),
    }
    with pytest.raises(MethodNotApplicableError, match=r"have 16 to 64 channels\. Set depth='deep'"):
        VPT(depth="shallow").draft(backbone, 3)


def test_a_block_that_cannot_run_with_what_is_added_is_named() -> None:
    backbone = make_timm("hiera_tiny_224", 32, img_size=32)
    with pytest.raises(MethodNotApplicableError, match=r"vpt: .* has blocks that it cannot change: .* do not fit"):
        VPT().draft(backbone, 3)


def test_windows_take_no_prompts() -> None:
    with pytest.raises(MethodNotApplicableError, match=r"vpt: layers\.0\.blocks\.0 .*its own number of tokens"):
        VPT().blueprint(swin())


def test_prompts_of_all_blocks_need_blocks_in_a_row() -> None:
    backbone = vit(depth=3)
    first, _, last = (segment.name for segment in backbone.chain if find_parts(backbone, segment).mlp)
    assert len(VPT((first, last)).blueprint(backbone).grafts) == 2
    with pytest.raises(MethodNotApplicableError, match=r"vpt: blocks\.1 stands between"):
        VPT((first, last), depth="shallow").blueprint(backbone)


@pytest.mark.parametrize(
    "graft",
    [
        ("convpass", {"modules": {"mlp": 48}, "prefix": 2, "width": 4, "scale": 1.0}),
        ("convpass", {"modules": {"mlp": 48}, "prefix": 1, "width": 10**9, "scale": 1.0}),
        ("mona", {"reader": "norm2", "channels": 10**9, "width": 4, "prefix": 1}),
        ("mona", {"reader": "norm9", "channels": 48, "width": 4, "prefix": 1}),
        ("prompts", {"length": 10**9, "channels": 48}),
        ("prompts", {"length": 3, "channels": 47}),
        ("prompts", {"length": 3, "channels": 48, "more": 1}),
    ],
    ids=str,
)
def test_added_modules_that_do_not_fit_are_refused(graft: tuple[str, dict[str, object]]) -> None:
    kind, arguments = graft
    one = draft_patch(vit(), AdaptFormer(width=4)).grafts[0]
    changed = one.model_copy(update={"kind": kind, "arguments": arguments})
    with pytest.raises(ForeignTensorError):
        PatchedModel.draft(vit(), Blueprint(grafts=(changed,)), LinearHead(48, 3)).try_grafts()


def test_normalisation_inside_a_part_hides_nothing() -> None:
    backbone = load_backbone(TokenNet(4), preprocessing=small_preprocessing())
    whole = AdaptFormer(tuple(segment.name for segment in backbone.chain if segment.parameters))
    assert len(wrapped_modules(backbone, whole)) == 2
    model = Houlsby(whole.blocks).draft(backbone, 3)
    adapters = [module for module in model.modules() if isinstance(module, Bottlenecked)]
    inner = [one.module.module if isinstance(one.module, PreNorm) else one.module for one in adapters]
    assert [type(one) for one in inner] == [SelfAttention, nn.Sequential] * 2


def test_a_single_token_is_refused() -> None:
    backbone = load_backbone(TokenNet(16), preprocessing=small_preprocessing())
    with pytest.raises(MethodNotApplicableError, match="no transformer block"):
        AdaptFormer().blueprint(backbone)


def test_open_clips_blocks_have_parts(clip: Backbone) -> None:
    assert set(wrapped_modules(clip, AdaptFormer())) == {"mlp"}
    assert set(wrapped_modules(clip, Houlsby())) == {"attn", "mlp"}
    assert set(wrapped_modules(clip, RepAdapter())) == {"mlp.c_fc"}
    model = Houlsby(width=4).draft(clip, 3)
    images = torch.randn(2, *clip.input_size)
    with torch.no_grad():
        assert close(model(images), model.head(clip.chain(images)))


@pytest.mark.parametrize("method", [*BOTTLENECKS, Convpass(), Mona(), VPT()], ids=lambda method: method.name)
def test_networks_without_transformer_blocks_are_refused_by_name(method: Method, tiny: Backbone) -> None:
    with pytest.raises(
        MethodNotApplicableError, match=rf"{method.name}: .*TinyNet has no transformer block .*`scale-bias`"
    ):
        method.blueprint(tiny)


def test_networks_without_biases_or_layers_are_refused() -> None:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    bare = load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())
    with pytest.raises(MethodNotApplicableError, match=r"bitfit: .* has no biases\. Try `scale-bias"):
        BitFit().blueprint(bare)
    odd = load_backbone(
        nn.Sequential(nn.ZeroPad2d(1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
        preprocessing=small_preprocessing(),
    )
    with pytest.raises(MethodNotApplicableError, match=r"ssf: .* no linear layer or convolution"):
        SSF().blueprint(odd)


def test_attentions_own_biases_are_biases_and_tables_are_not() -> None:
    owned = BitFit().blueprint(torchvision_vit()).owned
    assert any(name.endswith("in_proj_bias") for name in owned)
    assert not any("relative_position_bias_table" in name for name in BitFit().blueprint(swin()).owned)


# files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"width": 10**9},
        {"modules": {"mlp": 10**9}},
        {"modules": {}},
        {"modules": {"elsewhere": 48}},
        {"activation": "exec"},
        {"scale": float("inf")},
        {"depth": 3},
        {"place": "before"},
    ],
    ids=str,
)
def test_bottlenecks_that_ask_for_too_much_or_for_what_is_unknown_are_refused(changed: dict[str, object]) -> None:
    given = {"place": "beside", "modules": {"mlp": 48}, "width": 4, "activation": "relu", "scale": 1.0}
    with pytest.raises((ValueError, AttributeError)):
        add_bottlenecks(nn.ModuleDict({"mlp": nn.Linear(48, 48)}), **{**given, **changed})


@pytest.mark.parametrize(
    "changed",
    [{"width": 0}, {"width": 10**9}, {"groups": 5}, {"scale": -1.0}, {"layers": ["norm"]}, {"more": 1}],
    ids=str,
)
def test_rep_adapters_that_do_not_fit_are_refused(changed: dict[str, object]) -> None:
    given = {"width": 4, "groups": 2, "scale": 1.0, "layers": ["fc"]}
    block = nn.ModuleDict({"fc": nn.Linear(12, 5), "norm": nn.LayerNorm(12)})
    with pytest.raises((ValueError, TypeError)):
        add_rep_adapters(block, **{**given, **changed})


def test_a_file_whose_numbers_do_not_fit_its_network_is_refused() -> None:
    backbone = vit()
    patch = draft_patch(backbone, AdaptFormer(width=4))
    graft = patch.grafts[0]
    for changed in ({"modules": {"mlp": 47}}, {"modules": {"norm3": 48}}, {"width": 5}):
        hostile = graft.model_copy(update={"arguments": {**graft.arguments, **changed}})
        with pytest.raises(ForeignTensorError):
            backbone.patched(replace(patch, grafts=(hostile, *patch.grafts[1:])))


@pytest.mark.parametrize("method", [AdaptFormer, RepAdapter])
def test_a_scale_that_no_file_may_hold_is_no_hyperparameter(method: type[AdaptFormer | RepAdapter]) -> None:
    with pytest.raises(MethodError, match=r"scale = 100000\.0 is not valid"):
        method(scale=1e5)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(MethodError, match="width=8 cannot be divided into groups=3"):
        RepAdapter(groups=3).blueprint(vit())
    with pytest.raises(MethodNotApplicableError, match="groups=5 divides"):
        RepAdapter(width=5, groups=5).blueprint(vit())

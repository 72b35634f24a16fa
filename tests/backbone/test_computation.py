"""The same tensors in another computation are refused by name; the same computation binds however it is run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models as zoo
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.convnext import CNBlockConfig

from conftest import draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain
from modelpatch.backbone.computation import SIDES, Computation, Computing, compare
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.probe import WIDTH, Probe, Reference, picture
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.errors import BackboneChangedError, BackboneError, UncheckedComputationWarning, WrongBackboneError
from modelpatch.patch.contents import Patch, decode_patch, encode_patch

Change = Callable[[nn.Module], bool]  # changes a network in place, if it has what can be changed


# changes of a computation that leave every tensor as it is -----------------------------------------------------


def of_kind(module: nn.Module, *kinds: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """The submodules of some types, each with its owner and its name there."""
    return [
        (owner, n, child)
        for owner in module.modules()
        for n, child in owner.named_children()
        if isinstance(child, kinds)
    ]


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, timm.layers.GELU)
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def change_activation(module: nn.Module) -> bool:
    """The first activation is another one."""
    for owner, name, child in of_kind(module, *ACTIVATIONS):
        setattr(owner, name, like(child, nn.Hardswish if isinstance(child, nn.SiLU) else nn.SiLU))
        return True
    return False


def like(child: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """An activation of another kind, in place where the one it stands for is."""
    return kind(inplace=bool(getattr(child, "inplace", False)))


def approximate(module: nn.Module) -> bool:
    """The activations are the approximations of those that were there."""
    pairs = {nn.SiLU: nn.Hardswish, nn.ReLU: nn.CELU, nn.Hardswish: nn.SiLU, nn.ReLU6: nn.ReLU}
    found = of_kind(module, nn.GELU, timm.layers.GELU, *pairs)
    for owner, name, child in found:
        setattr(
            owner,
            name,
            nn.GELU("tanh") if isinstance(child, nn.GELU | timm.layers.GELU) else like(child, pairs[type(child)]),
        )
    return bool(found)


def change_eps(module: nn.Module) -> bool:
    """The epsilon of the norms is ten times as large."""
    for _, _, child in (norms := of_kind(module, *NORMS)):
        child.eps *= 10
    return bool(norms)


def change_padding(module: nn.Module) -> bool:
    """A strided convolution pads as TensorFlow does: more at the end than at the beginning."""
    for _, _, child in of_kind(module, nn.Conv2d):
        if child.padding == (1, 1) and child.stride == (2, 2) and child.kernel_size == (3, 3):
            child.padding = (0, 0)
            child.register_forward_pre_hook(lambda _, inputs: (nn.functional.pad(inputs[0], (0, 1, 0, 1)),))
            return True
    return False


def change_stride(module: nn.Module) -> bool:
    """The last strided convolution keeps the resolution."""
    strided = [child for _, _, child in of_kind(module, nn.Conv2d) if 1 < child.stride[0] < child.kernel_size[0]]
    for child in strided[-1:]:
        child.stride = (1, 1)
    return bool(strided)


def change_dilation(module: nn.Module) -> bool:
    """The last convolution with a kernel reaches further."""
    found = [c for _, _, c in of_kind(module, nn.Conv2d) if c.kernel_size == (3, 3) and c.padding == (1, 1)]
    for child in found[-1:]:
        child.dilation = child.padding = (2, 2)
    return bool(found)


def change_pooling(module: nn.Module) -> bool:
    """The features are the largest values of maps instead of their means, or the mean of tokens instead of the first."""
    if isinstance(getattr(module, "global_pool", None), timm.layers.SelectAdaptivePool2d):
        module.global_pool.pool = nn.AdaptiveMaxPool2d(1)  # type: ignore[assignment,union-attr]
        return True
    if isinstance(getattr(module, "avgpool", None), nn.AdaptiveAvgPool2d):
        module.avgpool = nn.AdaptiveMaxPool2d(1)
        return True
    if getattr(module, "global_pool", None) == "token":
        module.global_pool = "avg"  # type: ignore[assignment]
        return True
    return False


def change_heads(module: nn.Module) -> bool:
    """Attention has twice the heads of half the width."""
    found = [child for child in module.modules() if hasattr(child, "num_heads") and hasattr(child, "head_dim")]
    for child in found:
        child.num_heads, child.head_dim = 2 * child.num_heads, child.head_dim // 2  # type: ignore[operator,assignment]
    return bool(found)


def change_scale(module: nn.Module) -> bool:
    """Attention divides its products by half as much."""
    found = [child for child in module.modules() if hasattr(child, "fused_attn") and hasattr(child, "scale")]
    for child in found:
        child.fused_attn, child.scale = False, 2 * child.scale  # type: ignore[operator,assignment]
    return bool(found)


CHANGES: tuple[Change, ...] = (
    change_activation,
    approximate,
    change_eps,
    change_padding,
    change_stride,
    change_dilation,
    change_pooling,
    change_heads,
    change_scale,
)

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
TIMM: dict[str, dict[str, Any]] = {
    "test_efficientnet": {},
    "test_efficientnet_gn": {},
    "test_byobnet": {},
    "test_resnet": {},
    "test_mambaout": {},
    "convnext_atto": SMALL,
    "convnextv2_atto": SMALL,
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_patch16_224": VIT,
    "vit_relpos_small_patch16_224": {**VIT, "num_heads": 1},
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "cait_xxs24_224": {**VIT, "embed_dim": 16, "depth": 1, "depth_token_only": 1},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "fasternet_t0": {"depths": (1, 1, 1, 1), "embed_dim": 8},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "heads": (2, 2, 2, 2)},
}
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": lambda: zoo.MobileNetV2(3, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 1, 2]]),
    "shufflenet": lambda: zoo.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=3),
    "densenet": lambda: zoo.DenseNet(8, (1, 1, 1, 1), 16, num_classes=3),
    "squeezenet": lambda: zoo.squeezenet1_1(num_classes=3),
    "vit": lambda: zoo.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=3),
    "swin": lambda: zoo.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [4, 4], num_classes=3),
    "convnext": lambda: zoo.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3),
}


def build(name: str) -> nn.Module:
    """A network with seeded random weights, its norms away from the identity."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        module = TORCHVISION[name]()
    else:
        module = timm.create_model(name, pretrained=False, num_classes=3, **TIMM.get(name, {}))
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            child.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module.eval()


def load(module: nn.Module) -> Backbone:
    return load_backbone(module, preprocessing=small_preprocessing(32))


NAMES = [*TIMM, *TORCHVISION]


@pytest.mark.parametrize("name", [*NAMES[:4], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[4:])])
def test_every_change_of_a_computation_is_refused_by_name(name: str) -> None:
    patch = draft_patch(load(build(name)))
    applied = 0
    for change in CHANGES:
        module = build(name)
        if change(module):
            try:
                other = load(module)
            except BackboneError:  # it does not run
                continue
            applied += 1
            with pytest.raises(
                WrongBackboneError, match=r" against |left out|added|segments; |features of 32 px differ"
            ):
                patch.check_backbone(other)
    assert applied >= 2
    patch.check_backbone(load(build(name).to(memory_format=torch.channels_last)))  # type: ignore[call-overload]


PAIRS: list[tuple[str, dict[str, Any], str]] = [
    ("mobilenetv2_035", {"pad_type": "same"}, "padding of conv_stem: 1 against same"),
    ("mobilenetv2_035", {"bn_eps": 0.1}, "eps of bn1: 1e-05 against 0.1"),
    ("mobilenetv2_035", {"global_pool": "max"}, "mean dim=2,3 against adaptive_max_pool2d"),
    ("mobilenetv2_035", {"output_stride": 8}, "stride of blocks.3.0.conv_dw: 2 against 1"),
    ("mobilenetv2_035", {"act_layer": "silu"}, "hardtanh min_val=0.0 max_val=6.0 against silu after bn1"),
    (
        "vit_tiny_patch16_224",
        {"act_layer": "gelu_tanh"},
        "approximate of gelu after blocks.0.mlp.fc1: none against tanh",
    ),
]


def given(name: str) -> dict[str, Any]:
    return {"preprocessing": small_preprocessing(32), "pretrained": False, **TIMM.get(name, {})}


@cache
def original(name: str) -> tuple[Backbone, Patch]:
    """A network by its name, and the file of a patch of it."""
    backbone = load_backbone(f"timm:{name}", **given(name))
    return backbone, decode_patch(encode_patch(draft_patch(backbone)))


@pytest.mark.parametrize(("name", "arguments", "said"), PAIRS, ids=[next(iter(pair[1])) for pair in PAIRS])
def test_arguments_that_change_no_tensor_are_told_from_each_other(
    name: str, arguments: dict[str, Any], said: str
) -> None:
    backbone, patch = original(name)
    other = load_backbone(f"timm:{name}", **given(name), **arguments)
    assert other.fingerprints == backbone.fingerprints
    with pytest.raises(WrongBackboneError, match="has the same tensors but computes something else") as refused:
        other.patched(patch)
    assert said in str(refused.value)
    assert str(arguments).strip("{}") in str(refused.value)
    with pytest.raises(WrongBackboneError):
        Engine(other, tuning=Tuning()).add("task", patch)
    backbone.patched(patch)


@pytest.mark.slow
def test_efficientnet_and_its_translation_from_tensorflow_are_two_networks() -> None:
    """The same weights: the one pads evenly with an epsilon of 1e-5, the other as TensorFlow does, with 1e-3."""
    _, patch = original("efficientnet_b0")
    other = load_backbone("timm:tf_efficientnet_b0", **given("efficientnet_b0"))
    assert other.fingerprints == original("efficientnet_b0")[0].fingerprints
    with pytest.raises(
        WrongBackboneError, match=r"padding of conv_stem: 1 against same; eps of bn1: 1e-05 against 0.001"
    ):
        patch.check_backbone(other)


def test_attention_in_one_kernel_or_in_several_operations_is_one_computation() -> None:
    recorded = load(build("vit_tiny_patch16_224")).computing.record
    module = build("vit_tiny_patch16_224")
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False  # type: ignore[assignment]
    other = load(module)
    assert other.computing.describe() != recorded.description
    assert other.computing.difference(recorded) == ""
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            assert load(build("vit_tiny_patch16_224")).computing.difference(recorded) == ""


def test_a_bound_that_no_quiet_picture_reaches_is_seen() -> None:
    """ReLU6 and ReLU are one function below 6: features of the picture as it is, and of lifted networks, are equal."""
    module = build("mobilenet")
    assert approximate(module)
    recorded, other = load(build("mobilenet")).computing.record, load(module).computing
    found = {record.look: compare(record.probe, other.probe(*record.look)) for record in recorded.probes}  # type: ignore[arg-type]
    assert [look for look, difference in found.items() if difference] == [(32, False, True)]
    assert "hardtanh" in other.difference(recorded)


def test_a_patch_brings_its_preprocessing_along(tiny: Backbone) -> None:
    """How images are normalised is no part of the network: another backbone's own choice changes no answer."""
    patch = draft_patch(tiny)
    other = Preprocessing(input_size=(3, 16, 16), mean=(0.1,) * 3, std=(0.9,) * 3, crop_pct=0.5)
    backbone = load_backbone(make_tiny().module, preprocessing=other)
    picture_of = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    image = Image.fromarray(picture_of)
    answers = [Engine(one, {"task": patch}, tuning=Tuning())([image])["task"] for one in (tiny, backbone)]
    assert torch.allclose(torch.as_tensor(answers[0]), torch.as_tensor(answers[1]), rtol=1e-5)


# old files, and files that lie -----------------------------------------------------------------------------------


def test_a_patch_without_a_record_binds_with_one_warning(tiny: Backbone) -> None:
    patch = draft_patch(tiny)
    old = replace(patch, backbone=patch.backbone.model_copy(update={"computation": None}))
    data = encode_patch(old)
    assert b"computation" not in data  # versions before this one read it
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny.patched(decode_patch(data))
        Engine(tiny, tuning=Tuning()).add("task", decode_patch(data))
    assert [one.category for one in told] == [UncheckedComputationWarning]
    assert "could not be checked" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = decode_patch(data).on(tiny)
        make_tiny().patched(recorded)
    assert recorded.backbone == patch.backbone


def test_probes_of_pictures_too_large_for_the_network_do_not_run(tiny: Backbone) -> None:
    recorded = tiny.computing.record
    probe = recorded.probes[0].model_copy(update={"pixels": SIDES * tiny.input_size[1] + 1})
    assert "times its own" in tiny.computing.difference(Computation(probes=(probe,), description=recorded.description))


def test_values_that_are_no_probe_are_refused(tiny: Backbone) -> None:
    dumped = tiny.computing.record.model_dump()
    for values in ("", "AAAA", "====", "AADAfw==", "A" * 1000, "\u00e9"):
        with pytest.raises(ValueError, match="values"):
            Computation.model_validate({**dumped, "probes": [{**dumped["probes"][0], "values": values}]})
    with pytest.raises(ValueError, match="does not have"):
        Computation.model_validate({**dumped, "description": {"lines": (), "kinds": ((3,),), "segments": (0,)}})


def test_verify_names_a_module_that_was_exchanged(tiny: Backbone) -> None:
    tiny.computing.record  # noqa: B018
    tiny.verify()
    tiny.module.stage1[0].act = nn.SiLU(inplace=True)
    with pytest.raises(BackboneChangedError, match=r"relu against silu after stage1\.0"):
        tiny.verify()


# probes -------------------------------------------------------------------------------------------------------------


def test_the_picture_is_made_of_integers_and_differs_everywhere() -> None:
    image = picture(3, 32)
    assert torch.equal(image * 128, (image * 128).round())
    assert image.min() >= -2
    assert image.max() < 2
    assert len({tuple(row.tolist()) for row in image[0].flatten(0, 1)}) == 3 * 32
    assert image[0, 0, 0, :3].mul(128).int().tolist() == [int(v) for v in by_hand(range(3))]


def by_hand(columns: range) -> list[int]:
    """The first row of the picture, with Python's integers."""

    def scatter(c: int, y: int, x: int) -> int:
        mixed = (c * 73856093 % 2**32) ^ (y * 19349663 % 2**32) ^ (x * 83492791 % 2**32)
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        return (mixed ^ mixed >> 16) >> 24

    return [scatter(0, 0, 0) + scatter(3, 0, column) - 256 for column in columns]


def test_a_reference_computes_in_one_type_whatever_the_modules_say() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.full((4,), 0.1)  # of torch's default type
            return self.linear(x.to(self.linear.weight.dtype).float().half() * scale)

    module = Casting()
    with torch.no_grad(), Reference(torch.float64):
        found = module(torch.ones(1, 4, dtype=torch.float64) / 3)
        expected = module.linear.weight.double().sum(1) / 3 * torch.tensor(0.1).double() + module.linear.bias.double()
    assert found.dtype == torch.float64
    assert torch.allclose(found[0], expected, rtol=1e-12)


def test_a_probe_has_few_values_and_the_error_of_single_precision(tiny: Backbone) -> None:
    wide = load_backbone(
        nn.Sequential(nn.Flatten(), nn.Linear(768, 200), nn.Linear(200, 2)), preprocessing=small_preprocessing()
    )
    probe = Probe.take(wide.chain, 3, 16)
    assert len(probe.values) <= WIDTH
    assert 0 < probe.error < 1e-5 * probe.largest
    assert probe.tolerance < 1e-5 * probe.largest
    features = tiny.chain(picture(3, 16))[0].double().numpy()
    np.testing.assert_allclose(Probe.take(tiny.chain, 3, 16).values, features, rtol=1e-4, atol=1e-5)


def test_a_branch_that_is_multiplied_by_zero_is_seen() -> None:
    def make(kernel_padding: str) -> Backbone:
        torch.manual_seed(0)

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.conv = (
                    nn.Conv2d(3, 4, 3, padding=1),
                    nn.Conv2d(4, 4, 3, padding=1, padding_mode=kernel_padding),
                )
                self.gain, self.fc = nn.Parameter(torch.zeros(4, 1, 1)), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                return self.fc((x + self.gain * self.conv(x)).mean((2, 3)))

        return load_backbone(Gated(), preprocessing=small_preprocessing())

    first, second = make("zeros"), make("reflect")
    assert first.fingerprints == second.fingerprints
    assert "reflection_pad2d" in second.computing.difference(first.computing.record)


def test_probes_are_taken_once(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = draft_patch(tiny)
    calls: list[int] = []
    take = Probe.take
    monkeypatch.setattr(Probe, "take", lambda *given, **named: calls.append(1) or take(*given, **named))
    other = make_tiny()
    other.computing = Computing(other.chain, other.input_size)
    for _ in range(5):
        patch.check_backbone(other)
    assert len(calls) == len(patch.backbone.computation.probes)  # type: ignore[union-attr]
    assert Computing(other.chain, other.input_size).recorded is False


def test_threads_that_bind_at_once_take_a_probe_once(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, second, take = list[int](), threading.Event(), Probe.take

    def slow(chain: Chain, channels: int, pixels: int, lifted: bool = False, loud: bool = False) -> Probe:
        taken.append(pixels)
        if len(taken) > 1:
            second.set()
        second.wait(0.3)  # for a thread that would take it again
        return take(chain, channels, pixels, lifted, loud)

    monkeypatch.setattr(Probe, "take", slow)
    computing = Computing(tiny.chain, tiny.input_size)
    with ThreadPoolExecutor(2) as threads:
        first, other = threads.map(computing.probe, [16, 16])
    assert first is other
    assert taken == [16]


def test_a_size_at_which_the_network_is_cut_differently_has_no_probe() -> None:
    backbone = load(Padded())
    assert "cut differently" in str(backbone.computing.probe(64))
    looks = [probe.look for probe in backbone.computing.record.probes]
    assert looks == [(32, False, False), (16, False, False), (16, True, False), (32, False, True)]


class Padded(nn.Module):
    """A network with one more call for images of more than 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 1, 1)) if x.shape[-1] > 32 else x
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_whole_numbers_that_a_network_casts_are_of_the_probes_precision() -> None:
    """Gemma's vision tower multiplies its frequencies with places that are whole numbers."""
    for dtype in (torch.float32, torch.float64):
        with Reference(dtype):
            assert torch.arange(3).float().dtype == torch.ones(3).half().dtype == dtype
    backbone = make_timm("gemma4_vit_167m", 32, depth=1, embed_dim=192)
    assert backbone.computing.record.probes

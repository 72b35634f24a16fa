"""Widened blocks: the formula, where filters are added, what a patch holds, strength, and what no mask can learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import color_task, draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, MethodError, MethodNotApplicableError
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.registry import make_method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.methods.widened import ExtraFilters, Widened, add_filters
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.model import PatchedModel
from modelpatch.train import fit
from tolerance import close

pytestmark = pytest.mark.slow

NETWORKS: dict[str, tuple[str, Callable[[], Backbone]]] = {
    "tiny": ("conv", make_tiny),
    "resnet18": ("conv", lambda: make_timm("resnet18", 32)),
    "mobilenetv2": ("conv", lambda: make_timm("mobilenetv2_100", 32)),
    "inception": ("conv", lambda: make_timm("inception_v3", 80)),  # some of its blocks have no padding
    "vgg": ("conv", lambda: make_timm("vgg11", 32, mlp_ratio=1 / 64)),
    "vit": ("linear", lambda: make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=2)),
    "swin": ("linear", lambda: make_timm("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=2)),
}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[str, Backbone]:
    kind, make = NETWORKS[request.param]
    return kind, make()


def widened_blocks(backbone: Backbone, method: Method) -> list[str]:
    return [backbone.chain[graft.start].name for graft in method.blueprint(backbone).grafts]


# the formula ------------------------------------------------------------------------------------------------


def test_a_draft_computes_what_the_base_computes(network: tuple[str, Backbone]) -> None:
    _, backbone = network
    images = torch.randn(2, *backbone.input_size)
    model = Widened().draft(backbone, 3)
    with torch.no_grad():
        assert close(model(images), model.head(backbone.chain(images)))


@pytest.mark.parametrize(("filters", "kernel"), [(1, 1), (4, 3), (3, 2)])
def test_numbers_are_counted_as_the_formula_says(network: tuple[str, Backbone], filters: int, kernel: int) -> None:
    kind, backbone = network
    method = Widened(filters=filters, kernel=kernel)
    axis, area = (0, kernel**2) if kind == "conv" else (-1, 1)
    blocks = [backbone.chain[graft.start] for graft in method.blueprint(backbone).grafts]
    sides = [(block.input_shape[axis], block.output_shape[axis]) for block in blocks]
    assert method.count_parameters(backbone) == sum(filters * (c * area + 1 + d) for c, d in sides)


def test_filters_make_the_hidden_layer_of_a_bottleneck_wider() -> None:
    """U ReLU(V x + b) beside W2 ReLU(W1 x) is one layer of 6 + 4 hidden channels."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 6), nn.Linear(6, 5)
    block = add_filters(nn.Sequential(first, nn.ReLU(), last), inputs=5, outputs=5, filters=4)
    nn.init.normal_(block.extra.last.weight)
    wide = [nn.Linear(5, 10), nn.Linear(10, 5)]
    with torch.no_grad():
        wide[0].weight.copy_(torch.cat([first.weight, block.extra.first.weight]))
        wide[0].bias.copy_(torch.cat([first.bias, block.extra.first.bias]))
        wide[1].weight.copy_(torch.cat([last.weight, block.extra.last.weight], 1))
        wide[1].bias.copy_(last.bias)
        x = torch.randn(7, 5)
        torch.testing.assert_close(block(x), wide[1](F.relu(wide[0](x))))


def test_filters_are_added_before_what_follows_a_blocks_sum(tiny: Backbone) -> None:
    block = tiny.chain.blocks[-1]
    model = draft_patch(tiny, Widened(blocks=(block.name,)))
    part = tiny.patched(model).variants[0]
    x = torch.randn(2, *block.input_shape)
    inner = tiny.module.get_submodule(block.name)
    with torch.no_grad():
        branch = inner.bn2(inner.conv2(inner.act(inner.bn1(inner.conv1(x)))))
        torch.testing.assert_close(part(x), F.relu(branch + x + part.extra(x)))


def test_a_share_of_the_strength_is_a_share_of_what_the_filters_add(tiny: Backbone) -> None:
    patch = draft_patch(tiny, Widened(blocks=("last",)))
    (whole,), (half,), (none,) = (tiny.patched(patch.at_strength(s)).variants for s in (1, 0.5, 0))
    x = torch.randn(2, *tiny.chain.blocks[-1].input_shape)
    with torch.no_grad():
        assert close(none(x), tiny.chain.blocks[-1].module(x))
        branch, shortcut = whole.block.before(x)
        torch.testing.assert_close(half(x), F.relu(branch + shortcut + whole.extra(x) / 2))


# where ------------------------------------------------------------------------------------------------------


def test_all_blocks_are_widened_or_those_that_are_named(tiny: Backbone) -> None:
    assert widened_blocks(tiny, Widened()) == [block.name for block in tiny.chain.blocks]
    assert widened_blocks(tiny, Widened("stage2.1, stage1")) == ["stage1.0", "stage1.1", "stage2.1"]  # type: ignore[arg-type]
    assert make_method("widened(filters=4,blocks=[stage2])") == Widened("stage2", filters=4)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="'stage' names no block"):
        Widened(("stage",)).blueprint(tiny)


class Tokens(nn.Module):
    """Features (B, 8, H, W) to tokens (B, H W, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_what_lays_its_output_out_anew_cannot_be_widened() -> None:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), Tokens(), nn.Linear(8, 8), Mean(), nn.Linear(8, 3)]
    backbone = load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())
    names = [segment.name for segment in backbone.chain if segment.parameters]
    assert widened_blocks(backbone, Widened(tuple(names))) == [name for name in names if name != "1"]
    with pytest.raises(MethodNotApplicableError, match="beside 1, whose inputs and outputs are laid out differently"):
        Widened("1").blueprint(backbone)  # type: ignore[arg-type]


# the patch --------------------------------------------------------------------------------------------------


def test_training_moves_the_filters_and_nothing_else(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, Widened(filters=2), epochs=1)
    assert all(name.startswith(("graft/", "head.")) for name in patch.tensors)
    starts_at_zero = [tensor for name, tensor in patch.tensors.items() if name.endswith("extra.last.weight")]
    assert len(starts_at_zero) == len(tiny.chain.blocks)
    assert all(tensor.any() for tensor in starts_at_zero)


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (Piggyback(lr=1e-2) + Widened(), {"graft", "mask"}),
        (Widened() + ScaleBias(), {"graft", "replace"}),
        (Subset() + Widened(), {"graft", "replace"}),
        (LoRA(blocks=("stage1",)) + Widened(blocks=("stage2",)), {"graft"}),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_filters_go_with_other_methods(method: Method, kinds: set[str], tiny: Backbone) -> None:
    patch = fit(tiny, color_task(), method, epochs=1, batch_size=6)
    assert {name.partition("/")[0] for name in patch.tensors if not name.startswith("head.")} == kinds
    again = decode_patch(encode_patch(patch))
    images = torch.randn(2, 3, 16, 16)
    assert close(tiny.patched(again)(images), tiny.patched(patch)(images))


def test_two_methods_that_add_modules_to_a_block_are_refused(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match=r"lora and widened both add modules to segment .* Name other blocks"):
        (LoRA() + Widened()).blueprint(tiny)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("filters", 10**9), ("inputs", 10**9), ("outputs", 0), ("kernel", 99), ("stride", 10**9), ("depth", 3)],
)
def test_a_file_that_asks_for_too_much_or_for_what_is_unknown_is_refused(argument: str, value: int) -> None:
    fitting = {"inputs": 8, "outputs": 8, "filters": 2, "kernel": 3}
    with pytest.raises(ValueError, match=argument):
        add_filters(nn.Conv2d(8, 8, 1), **{**fitting, argument: value})


def test_arguments_that_do_not_fit_the_file_are_refused(tiny: Backbone) -> None:
    patch = draft_patch(tiny, Widened(filters=2, blocks=("last",)))
    (graft,) = patch.grafts
    for arguments in ({**graft.arguments, "filters": 3}, {**graft.arguments, "filters": 0}):
        with pytest.raises(ForeignTensorError):
            tiny.patched(replace(patch, grafts=(graft.model_copy(update={"arguments": arguments}),)))


@pytest.mark.parametrize("changed", [{"inputs": 5}, {"outputs": 7}, {"stride": 2}])
def test_filters_that_fit_their_file_but_not_the_network_are_refused(changed: dict[str, int], tiny: Backbone) -> None:
    patch = draft_patch(tiny, Widened(filters=2, blocks=("last",)))
    (graft,) = patch.grafts
    arguments = {**graft.arguments, **changed}
    made = ExtraFilters(**arguments).state_dict()
    prefix = f"graft/{graft.start}-{graft.end}/extra."
    tensors = {name: tensor for name, tensor in patch.tensors.items() if not name.startswith(prefix)}
    tensors |= {prefix + name: tensor for name, tensor in made.items()}
    hostile = replace(patch, grafts=(graft.model_copy(update={"arguments": arguments}),), tensors=tensors)
    for bind in (PatchedModel, BoundPatch):
        with pytest.raises(ForeignTensorError, match=r"the patch adds to segments \[5, 6\) do not fit"):
            bind(tiny, decode_patch(encode_patch(hostile)))


# what it is for ---------------------------------------------------------------------------------------------


def blind_net() -> Backbone:
    """A network whose second layer reads the red channel only."""
    torch.manual_seed(0)
    eye, red = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 8, 3, padding=1)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        red.weight[:, 1:] = 0
    layers = [eye, red, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())


def mirrored_task() -> Task:
    """Squares of three colours, where every blue one is a green one with these channels swapped."""
    data = color_task(48)
    for split in (data.train, data.test):
        images = np.stack(split.images)
        images[split.labels == 2] = images[split.labels == 1][..., [0, 2, 1]]
        split.images[:] = list(images)
    return data


def accuracy(patch: Patch) -> float:
    return float(patch.metrics["test_top1"])


def test_filters_learn_what_no_mask_of_the_frozen_ones_can() -> None:
    """Green and blue differ in nothing that the frozen filters read: a mask is right on one of two at most."""
    backbone, data = blind_net(), mirrored_task()
    options: dict[str, Any] = {"epochs": 8, "batch_size": 8, "augment": "none", "seed": 0}
    masked = fit(backbone, data, Piggyback(lr=1e-2), **options)
    assert accuracy(masked) <= 2 / 3 + 1e-6
    for method in (Widened(("1",), lr=1e-2), Piggyback(lr=1e-2) + Widened(("1",), lr=1e-2)):
        assert accuracy(fit(backbone, data, method, **options)) >= 5 / 6

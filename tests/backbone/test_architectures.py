"""A sample of `benchmarks/architectures.py`: blocks that take more than their input, classifiers that are no linear layer."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from conftest import TinyNet, make_timm, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import NoHead
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.engine import Engine
from modelpatch.methods.scale_bias import ScaleBias
from tolerance import close

# architecture -> arguments, pixels, the least number of blocks
SAMPLE: dict[str, tuple[dict[str, object], int, int]] = {
    "coat_tiny": ({"img_size": 32, "embed_dims": (16,) * 4, "serial_depths": (1, 1, 1, 1), "parallel_depth": 2}, 32, 5),
    "crossvit_tiny_240": ({"img_scale": (1.0, 224 / 240), "embed_dim": (16, 32), "num_heads": (2, 2)}, 240, 3),
    "gcvit_xxtiny": ({"embed_dim": 16}, 224, 10),
    "hrnet_w18_small": ({}, 32, 3),
    "levit_128s": ({}, 224, 9),
    "pit_ti_224": ({"img_size": 64}, 64, 12),
    "pvt_v2_b0": ({}, 32, 8),
    "resnetv2_18": ({}, 32, 8),
    "test_vit": ({}, 160, 6),
    "tnt_s_legacy_patch16_224": ({"img_size": 32, "embed_dim": 48, "num_heads_outer": 2, "depth": 4}, 32, 4),
    "vit_tiny_patch16_dinov3_qkvb": ({"depth": 4, "embed_dim": 96, "num_heads": 2}, 48, 4),
    "xcit_nano_12_p8_224": ({"img_size": 32, "depth": 4}, 32, 6),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 2}, 32, 3),
}


SLOW = {"crossvit_tiny_240", "gcvit_xxtiny", "hrnet_w18_small"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAMPLE]
)
def network(request: pytest.FixtureRequest) -> Backbone:
    arguments, pixels, _ = SAMPLE[request.param]
    return make_timm(request.param, pixels, **arguments)


@torch.no_grad()
def test_features_are_those_of_num_classes_0_at_other_batches_too(network: Backbone) -> None:
    without: nn.Module = network.module
    for rows in (1, 3):
        x = torch.randn(rows, *network.input_size, generator=torch.Generator().manual_seed(rows))
        expected: Tensor = without.forward_head(without.forward_features(x), pre_logits=True)  # type: ignore[operator]
        assert close(network.chain(x), expected.flatten(1))
        if not isinstance(network.chain.head, NoHead):
            assert close(network.chain.head(network.chain(x)), network(x))


def test_every_repeated_block_is_a_segment(network: Backbone) -> None:
    least = next(
        count for name, (_, _, count) in SAMPLE.items() if name == network.module.pretrained_cfg["architecture"]
    )  # type: ignore[index]
    assert len(network.chain.blocks) >= least


@torch.no_grad()
def test_the_chain_follows_images_of_other_sizes() -> None:
    for name, pixels, other in (
        ("pvt_v2_b0", 32, 64),
        ("vit_tiny_patch16_dinov3_qkvb", 32, 48),
        ("test_vit", 160, 192),
    ):
        given = {"dynamic_img_size": True} if name == "test_vit" else {}
        network = make_timm(name, pixels, **given)
        x = torch.randn(2, 3, other, other)
        assert close(network.chain.head(network.chain(x)), network(x))


@torch.no_grad()
def test_a_base_of_two_classifiers_answers_in_an_engine() -> None:
    network = make_timm("deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2, embed_dim=48, num_heads=2)
    assert network.chain.feature_dim == 48
    x = torch.randn(2, 3, 32, 32)
    assert close(Engine(network)(x)["base"], network(x))
    assert ScaleBias().draft(network, 3)(x).shape == (2, 3)


@pytest.mark.slow
def test_the_network_inside_a_wrapper_is_taken() -> None:
    for wrap in (torch.compile, nn.DataParallel, AveragedModel, lambda module: AveragedModel(torch.compile(module))):
        torch.manual_seed(0)
        backbone = load_backbone(wrap(TinyNet()), preprocessing=small_preprocessing())
        assert isinstance(backbone.module, TinyNet)
        assert backbone.spec == "module:TinyNet"
    module = TinyNet()
    module.compile()
    assert len(load_backbone(module, preprocessing=small_preprocessing()).chain.blocks) == 4


def test_a_classifier_is_outside_of_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(self.fc1(x).relu())

    features = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(Block(), Block()))
    backbone = load_backbone(features, preprocessing=small_preprocessing())
    assert backbone.classifier is None
    assert backbone.chain.feature_dim == 8
    assert [block.name for block in backbone.chain.blocks] == ["3.0", "3.1"]


def test_a_convolution_as_classifier_is_left_out_of_the_features() -> None:
    network = timm.create_model("resnetv2_18", num_classes=7)
    backbone = load_backbone(network, preprocessing=small_preprocessing(32))
    assert backbone.classifier == "head.fc"
    assert backbone.chain.feature_dim == 512

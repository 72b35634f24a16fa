"""The chain computes what the network computes, whatever the network and wherever it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from conftest import TinyBlock, TinyNet, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import UntraceableBackboneError
from tolerance import close

pytestmark = pytest.mark.slow

# architecture -> the classes of its blocks; the layers with weights where it has no blocks
BLOCKS = {
    "timm:resnet18": {"BasicBlock"},
    "timm:resnet50": {"Bottleneck"},
    "timm:resnext50_32x4d": {"Bottleneck"},
    "timm:wide_resnet50_2": {"Bottleneck"},
    "timm:mobilenetv2_100": {"InvertedResidual", "DepthwiseSeparableConv"},
    "timm:mobilenetv3_large_100": {"InvertedResidual", "DepthwiseSeparableConv"},
    "timm:efficientnet_b0": {"InvertedResidual", "DepthwiseSeparableConv"},
    "timm:regnety_002": {"Bottleneck"},
    "timm:convnext_tiny": {"ConvNeXtBlock"},
    "timm:densenet121": {"DenseBlock"},
    "timm:inception_v3": {"InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"},
    "timm:vgg16_bn": {"Conv2d", "ConvMlp"},
    "timm:vit_tiny_patch16_224": {"Block"},
    "timm:deit3_small_patch16_224": {"Block"},
    "timm:swin_tiny_patch4_window7_224": {"SwinTransformerBlock"},
    "torchvision:resnet18": {"BasicBlock"},
    "torchvision:mobilenet_v2": {"InvertedResidual"},
}
ARGUMENTS: dict[str, dict[str, object]] = {
    "timm:vgg16_bn": {"mlp_ratio": 1 / 32},  # the same layers without most of their 500 MB of weights
    "timm:deit3_small_patch16_224": {"img_size": 64, "embed_dim": 96, "num_heads": 2},
    "timm:vit_tiny_patch16_224": {"img_size": 64},
    "timm:swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24},
}
STAGES = {"vit": 1, "deit3": 1, "inception": 3}  # resolutions at which blocks run; most networks have 4 or 5


@pytest.fixture(scope="module", params=BLOCKS)
def network(request: pytest.FixtureRequest) -> Backbone:
    pixels = 96 if "inception" in request.param else 64  # as few as the network takes
    arguments = ARGUMENTS.get(request.param, {})
    return load_backbone(request.param, pretrained=False, preprocessing=small_preprocessing(pixels), **arguments)


def images(backbone: Backbone) -> Tensor:
    return torch.randn(2, *backbone.input_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_chain_and_its_head_give_the_network_s_answer(network: Backbone) -> None:
    x = images(network)
    features = network.chain(x)
    if network.spec.startswith("timm:"):
        module = network.module
        assert close(features, module.forward_head(module.forward_features(x), pre_logits=True))
    assert features.shape == (len(x), network.chain.feature_dim)
    assert close(network.chain.head(features), network(x))


@torch.no_grad()
def test_prefix_and_suffix_equal_the_whole_at_every_cut_and_leave_the_cut_tensor_alone(network: Backbone) -> None:
    chain, x = network.chain, images(network)
    whole, prefix = chain(x), x
    for cut, segment in enumerate(chain):
        kept, version = prefix.clone(), prefix._version
        assert close(chain.run(prefix, cut, len(chain)), whole), f"cut before {segment.name}"
        assert prefix._version == version, f"{segment.name} or a later segment writes its input"
        assert torch.equal(prefix, kept)
        prefix = chain.run(prefix, cut, cut + 1)
    assert close(prefix, whole)


def test_the_blocks_are_the_networks_own_blocks_in_its_own_order(network: Backbone) -> None:
    expected = list(outermost(network.module, BLOCKS[network.spec]))
    assert [block.name for block in network.chain.blocks] == expected
    kinds = {type(network.module.get_submodule(name)).__name__ for name in expected}
    assert kinds == BLOCKS[network.spec]


def outermost(module: nn.Module, kinds: set[str], prefix: str = "") -> Iterator[str]:
    """Names of the modules of these classes that no other module of these classes holds."""
    for name, child in module.named_children():
        if type(child).__name__ in kinds:
            yield prefix + name
        else:
            yield from outermost(child, kinds, f"{prefix}{name}.")


def test_every_tensor_is_in_exactly_one_segment_or_the_head_under_its_own_name(network: Backbone) -> None:
    module, chain = network.module, network.chain
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = [(name, tensor) for segment in chain for name, tensor in segment.named_tensors()]
    for name, tensor in held:
        assert tensor is tensors[name]
        assert any(tensor is other for _, other in chain.segment_of(name).named_tensors())
    in_head = {id(tensor) for tensor in (*chain.head.parameters(), *chain.head.buffers())}
    assert len(held) == len({name for name, _ in held})
    assert {id(tensor) for _, tensor in held} | in_head == {id(tensor) for tensor in tensors.values()}
    assert sum(s.parameters for s in chain) + sum(p.numel() for p in chain.head.parameters()) == sum(
        p.numel() for p in module.parameters()
    )


def test_stages_are_runs_of_blocks_at_one_resolution(network: Backbone) -> None:
    stages = network.chain.stages
    assert [block for stage in stages for block in stage] == list(network.chain.blocks)
    expected = next((count for name, count in STAGES.items() if name in network.spec), None)
    assert len(stages) == expected if expected else len(stages) >= 4
    sizes = [{positions(block.output_shape) for block in stage} for stage in stages]
    assert all(len(size) == 1 for size in sizes)
    assert all(before != after for before, after in itertools.pairwise(sizes))


def positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The square map's sides of (C, H, W) or (H, W, C); the number of tokens of (tokens, C)."""
    if len(shape) == 2:
        return shape[:1]
    return shape[1:] if shape[1] == shape[2] else shape[:2]


def test_shapes_link_one_segment_to_the_next(network: Backbone) -> None:
    chain = network.chain
    assert chain[0].input_shape == network.input_size
    for before, after in itertools.pairwise(chain):
        assert before.output_shape == after.input_shape
    assert chain[-1].output_shape == (chain.feature_dim,)


# small networks ---------------------------------------------------------------------------------------------


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def small(module: nn.Module, **arguments: object) -> Backbone:
    torch.manual_seed(0)
    return load_backbone(module, preprocessing=small_preprocessing(), **arguments)


def test_a_residual_block_inside_a_sequential_is_one_segment() -> None:
    backbone = small(nn.Sequential(nn.Sequential(TinyBlock(3, 8, 2), TinyBlock(8, 8, 1)), Pool(), nn.Linear(8, 2)))
    assert backbone.chain.names == ("0.0", "0.1", "1")
    assert [block.name for block in backbone.chain.blocks] == ["0.0", "0.1"]


def test_a_block_that_wraps_its_branch_in_a_sequential_is_not_cut_in_half() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(TinyBlock(4, 4, 1), TinyBlock(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    backbone = small(nn.Sequential(nn.Conv2d(3, 4, 1), Wrapped(), Wrapped(), Pool(), nn.Linear(4, 2)))
    assert backbone.chain.names == ("0", "1", "2", "3")


@torch.no_grad()
def test_in_place_activations_are_merged_with_what_they_overwrite() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), Pool(), nn.Linear(4, 2))
    chain = small(module).chain
    assert chain.names == ("0", "2", "3")
    cached = chain.run(torch.randn(1, 3, 16, 16), 0, 1)
    kept = cached.clone()
    chain.run(cached, 1, len(chain))
    assert torch.equal(cached, kept)


@torch.no_grad()
def test_an_in_place_write_through_a_view_is_merged_all_the_way_back() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(1024, 2))
    chain = small(module).chain
    assert chain.names == ("0",)
    assert close(chain(torch.ones(1, 3, 16, 16)), module[:4](torch.ones(1, 3, 16, 16)))


class Branching(nn.Module):
    """Its path depends on the numbers, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.pool = Pool()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 1e9:
            x = x * 0
        return self.fc(self.pool(x))


def test_a_network_that_cannot_be_traced_is_refused_with_the_way_out() -> None:
    with pytest.raises(UntraceableBackboneError, match=r"Branching.*segments="):
        small(Branching())


@torch.no_grad()
def test_named_segments_make_a_chain_of_a_network_that_cannot_be_traced() -> None:
    backbone = small(Branching(), segments=["stem", "pool"], classifier="fc")
    assert backbone.chain.names == ("stem", "pool")
    x = torch.randn(2, 3, 16, 16)
    assert close(backbone.chain.head(backbone.chain(x)), backbone(x))


@pytest.mark.parametrize("segments", [["stem", "stem2", "pool"], ["stem"], ["pool", "stem"], ["pool"]])
def test_named_segments_that_do_not_exist_or_do_not_fit_together_are_refused(segments: list[str]) -> None:
    with pytest.raises(UntraceableBackboneError, match="segments"):
        small(Branching(), segments=segments, classifier="fc")


def test_segments_that_skip_a_layer_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Pool(), nn.Linear(4, 2))
    with pytest.raises(UntraceableBackboneError, match="do not reproduce"):
        small(module, segments=["0", "2"], classifier="3")


def test_named_segments_that_write_their_input_in_place_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.ReLU(inplace=True), Pool(), nn.Linear(4, 2))
    with pytest.raises(UntraceableBackboneError, match=r"segment '2' writes its input in place"):
        small(module, segments=["0", "1", "2", "3"], classifier="4")


def test_a_tensor_that_several_segments_share_belongs_to_none_of_them() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Pool(), nn.Linear(3, 2))
    module[1].weight = module[0].weight
    chain = small(module).chain
    assert chain.segment_of("1.bias").name == "1"
    with pytest.raises(KeyError):
        chain.segment_of("0.weight")


def test_a_network_with_timms_interface_that_cannot_be_traced_is_one_segment() -> None:
    class Coarse(Branching):
        def forward_features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x * 0 if x.sum() > 1e9 else x

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return self.pool(x) if pre_logits else self.fc(self.pool(x))

    assert small(Coarse()).chain.names == ("network",)


def test_a_network_without_a_classifier_ends_in_its_features() -> None:
    chain = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Pool())).chain
    assert chain.feature_dim == 4
    assert isinstance(chain.head, nn.Identity)


def test_the_multiply_adds_of_a_convolution_follow_the_formula() -> None:
    inputs, outputs, kernel, groups, stride = 3, 6, 3, 3, 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, groups=groups)
    segment = small(nn.Sequential(conv, Pool(), nn.Linear(outputs, 2))).chain[0]
    side = 16 // stride
    assert segment.macs == side * side * outputs * (inputs // groups) * kernel * kernel
    assert segment.parameters == outputs * (inputs // groups) * kernel * kernel + outputs


def test_the_stages_of_a_small_network_halve_the_resolution(tiny: Backbone) -> None:
    assert [[block.name for block in stage] for stage in tiny.chain.stages] == [
        ["stage1.0", "stage1.1"],
        ["stage2.0", "stage2.1"],
    ]
    assert [stage[-1].output_shape for stage in tiny.chain.stages] == [(8, 8, 8), (16, 4, 4)]
    assert [segment.stage for segment in tiny.chain if not segment.is_block] == [None] * (len(tiny.chain) - 4)


def test_names_of_no_segment_raise_a_key_error(tiny: Backbone) -> None:
    assert tiny.chain.segment_of("stage2.0.conv1.weight").name == "stage2.0"
    with pytest.raises(KeyError):
        tiny.chain.segment_of("fc.weight")


def test_a_chain_reads_like_a_sequence(tiny: Backbone) -> None:
    assert isinstance(tiny.chain, Chain)
    assert [segment.index for segment in tiny.chain] == list(range(len(tiny.chain)))
    assert tiny.chain[0:2] == tiny.chain.segments[:2]
    assert "4 blocks in 2 stages" in repr(tiny.chain)
    shown = "name='stage1.0', is_block=True, stage=0, input_shape=(8, 8, 8), output_shape=(8, 8, 8))"
    assert repr(tiny.chain.blocks[0]).endswith(shown)  # neither the module nor names of tensors


def test_the_same_network_is_cut_the_same_way_twice() -> None:
    assert make_tiny(0).chain.names == make_tiny(1).chain.names == small(TinyNet()).chain.names

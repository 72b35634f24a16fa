"""Δ-Networks: parameters and edges as in the paper, base mode, every option, what λ reads and what it does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache, lru_cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conftest import draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, MethodError, MethodNotApplicableError
from modelpatch.methods.delta import (
    DeltaModule,
    DeltaNetwork,
    DeltaStage,
    DenseStage,
    Norm,
    ResidualStage,
    delta_costs,
    delta_stages,
    skip_variances,
    skip_weights,
)
from modelpatch.methods.registry import make_method
from modelpatch.methods.residual import Layout, stages_of
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from tolerance import close

pytestmark = pytest.mark.slow

TRANSFORMERS = {"vit_tiny_patch16_224", "torchvision swin_t"}
ARCHITECTURES = (
    "tiny",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnetv2_50",
    "regnety_002",
    "convnext_atto",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "densenet121",
    "vit_tiny_patch16_224",
    "torchvision resnet18",
    "torchvision convnext_tiny",
    "torchvision mobilenet_v2",
    "torchvision densenet121",
    "torchvision swin_t",
)


SHORT = {"layers": (2, 2, 2, 2)}
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "resnext50_32x4d": SHORT,
    "wide_resnet50_2": SHORT,
    "resnetv2_50": SHORT,
}


@cache
def network(name: str) -> Backbone:
    if name == "tiny":
        return make_tiny()
    if name.startswith("torchvision "):
        torch.manual_seed(0)
        module = getattr(torchvision.models, name.removeprefix("torchvision "))(num_classes=7)
        if name == "torchvision swin_t":
            sizes = {"embed_dim": 24, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8], "window_size": [7, 7]}
            module = torchvision.models.SwinTransformer(patch_size=[4, 4], num_classes=7, **sizes)
        return load_backbone(module, preprocessing=small_preprocessing(64))
    return make_timm(name, 32, **SMALL.get(name, {}))


@lru_cache(1)  # the largest holds 0.8 GB
def hollow(name: str, pixels: int = 32) -> Backbone:
    """A timm architecture whose numbers are all zero: built without the time that random numbers take."""
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=1)
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().zero_()
    return load_backbone(module, preprocessing=small_preprocessing(pixels))


def images(backbone: Backbone, count: int = 3) -> Tensor:
    return torch.randn(count, *backbone.input_size, generator=torch.Generator().manual_seed(0))


def draft(backbone: Backbone, seed: int = 0, **options: Any) -> PatchedModel:
    torch.manual_seed(seed)
    return DeltaNetwork(**options).draft(backbone, 3)


def features(model: PatchedModel, x: Tensor) -> Tensor:
    for part in model.parts:
        x = part(x)
    return x


# size -------------------------------------------------------------------------------------------------------

PRINTED = [  # the paper's tables: architecture, Δ-modules, millions of parameters as printed
    ("resnet18", 1, 0.4),
    ("resnet18", 2, 0.6),
    ("resnet18", 4, 0.6),
    ("resnet34", 1, 0.4),
    ("resnet34", 2, 0.6),
    ("resnet34", 4, 0.6),
    ("resnet50", 1, 7.1),
    ("resnet50", 2, 8.9),
    ("resnet50", 4, 9.3),
    ("resnet101", 1, 7.1),
    ("convnext_tiny", 1, 4.0),
    ("convnext_tiny", 2, 5.0),
    ("convnext_tiny", 4, 5.3),
    ("convnext_small", 1, 4.0),
    ("convnext_base", 1, 7.1),
    ("convnext_large", 1, 15.9),
]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in PRINTED))
def test_the_built_modules_have_as_many_parameters_as_the_paper_prints(name: str) -> None:
    backbone = hollow(name)
    costs = delta_costs(backbone)
    for modules, millions in [row for architecture, *row in PRINTED if architecture == name]:
        counted = DeltaNetwork(modules=modules).count_parameters(backbone)
        assert counted == costs[modules - 1].parameters
        assert round(counted / 1e6, 1) == millions
        formula = 0.0
        for stage in backbone.chain.stages[-modules:]:
            c, k = stage[0].input_shape[0], len(stage)
            formula += 6.75 * c**2 + 2 * c + (c / 2 + 1) * k * (k + 1) / 2
        assert counted == formula


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "vit_tiny_patch16_224"])
def test_costs_are_those_of_the_built_modules_for_every_number_of_them(name: str) -> None:
    backbone = network(name)
    costs = delta_costs(backbone)
    assert [cost.modules for cost in costs] == list(range(1, len(stages_of(backbone)) + 1))
    for cost in costs:
        assert cost.parameters == DeltaNetwork(modules=cost.modules).count_parameters(backbone)
    last = costs[0]
    stage = backbone.chain[stages_of(backbone)[-1].start]
    layout = Layout.of(stage.input_shape, backbone.input_size)
    channels, *sides = layout.grid(torch.zeros(1, *stage.input_shape)).shape[1:]
    half, edges = channels // 2, len(stages_of(backbone)[-1].edges)
    assert last.macs == 9 * (channels + half) * half * math.prod(sides) + half * edges
    assert all(before.macs < after.macs for before, after in itertools.pairwise(costs))


# edges ------------------------------------------------------------------------------------------------------


def triangle(k: int) -> int:
    return k * (k + 1) // 2


def expected_edges(name: str, module: Any) -> list[int]:
    """How many skips each stage has, counted in the network itself."""
    if name in ("resnet18", "resnet50", "torchvision resnet18"):
        return [triangle(len(layer)) for layer in (module.layer1, module.layer2, module.layer3, module.layer4)]
    if name == "convnext_atto":
        return [triangle(len(stage.blocks)) for stage in module.stages]
    if name == "torchvision convnext_tiny":
        return [triangle(len(module.features[i])) for i in (1, 3, 5, 7)]
    if name == "mobilenetv2_100":  # no node n_0, so k(k-1)/2; a group of one block has none
        return [triangle(len(group) - 1) for group in module.blocks if len(group) > 1]
    if name == "torchvision mobilenet_v2":
        return [triangle(k - 1) for k in (2, 3, 4, 3, 3)]
    if name == "densenet121":
        return [triangle(len(block)) for block in module.features if type(block).__name__ == "DenseBlock"]
    return [triangle(len(module.blocks) // 4)] * 4


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "torchvision resnet18",
        "convnext_atto",
        "torchvision convnext_tiny",
        "mobilenetv2_100",
        "torchvision mobilenet_v2",
        "densenet121",
        "vit_tiny_patch16_224",
    ],
)
def test_every_pair_of_nodes_has_an_edge(name: str) -> None:
    backbone = network(name)
    stages = stages_of(backbone)
    assert [len(stage.edges) for stage in stages] == expected_edges(name, backbone.module)
    for stage in stages:
        nodes = range(stage.first, stage.depth + 1)
        assert set(stage.edges) == {(i, j) for i in nodes for j in nodes if i < j}
        assert len(set(stage.edges)) == len(stage.edges)


def test_a_span_of_convnext_begins_after_the_downsampling_and_one_of_resnet_before_it() -> None:
    convnext, resnet = network("convnext_atto"), network("resnet18")
    start = stages_of(convnext)[-1].start
    assert convnext.chain[start].name == "stages.3.blocks.0"
    assert convnext.chain[start].input_shape == convnext.chain[start].output_shape
    start = stages_of(resnet)[-1].start
    assert resnet.chain[start].name == "layer4.0"
    assert resnet.chain[start].output_shape[0] == 2 * resnet.chain[start].input_shape[0]


def test_groups_of_mobilenet_have_equal_width_and_begin_without_a_shortcut() -> None:
    backbone = network("mobilenetv2_100")
    for stage in stages_of(backbone):
        blocks = backbone.chain[stage.start : stage.end]
        assert len({block.output_shape for block in blocks}) == 1
        assert stage.first == 1
        assert blocks[0].input_shape != blocks[0].output_shape
    widths = [backbone.chain[stage.start].output_shape[0] for stage in stages_of(backbone)]
    assert len(set(widths)) == len(widths)


# base mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_strength_of_zero_and_weights_of_one_and_zero_give_the_frozen_network(name: str) -> None:
    backbone = network(name)
    x = images(backbone)
    model = draft(backbone, modules=len(stages_of(backbone)))
    with torch.no_grad():
        frozen = backbone.chain(x)
        assert not torch.equal(features(model, x), frozen)  # norms undo most of it where branches start near 0
        for stage in delta_stages(model):
            stage.strength = 0.0
        assert close(features(model, x), frozen)
        for stage in delta_stages(model):
            stage.strength = 1.0
            stage.delta.forward = lambda x, stage=stage: torch.tensor(stage.existing).float().expand(len(x), -1)
        weighed = features(model, x)
    if name in TRANSFORMERS:
        torch.testing.assert_close(weighed, frozen, rtol=1e-4, atol=1e-5)
    else:
        assert close(weighed, frozen)


def test_a_draft_leaves_the_base_as_it_is() -> None:
    backbone = network("tiny")
    x = images(backbone)
    before = backbone(x)
    model = draft(backbone, batch_norm=True, modules=2)
    model.train()
    model(x)
    backbone.verify()
    assert torch.equal(backbone(x), before)


# forward ----------------------------------------------------------------------------------------------------


def test_a_stage_computes_equations_3_and_4() -> None:
    backbone = network("resnet18")
    model = draft(backbone)
    stage = delta_stages(model)[0]
    assert isinstance(stage, ResidualStage)
    x = torch.randn(2, 256, 4, 4)
    weights = torch.rand(2, len(stage.edges))
    of = {edge: weights[:, number].view(-1, 1, 1, 1) for number, edge in enumerate(stage.edges)}

    def branch(block: Any, x: Tensor) -> Tensor:
        y = block.act1(block.bn1(block.conv1(x)))
        return block.bn2(block.conv2(y))

    first, second = backbone.module.layer4
    n0 = first.downsample(x)
    n1 = F.relu(branch(first, x) + of[0, 1] * n0)
    n2 = F.relu(branch(second, n1) + of[0, 2] * n0 + of[1, 2] * n1)
    torch.testing.assert_close(stage.mix(x, weights), n2)


def test_a_dense_stage_weighs_every_concatenated_feature() -> None:
    backbone = network("densenet121")
    stage = delta_stages(draft(backbone, stages=("features.denseblock1",)))[0]
    assert isinstance(stage, DenseStage)
    assert all(stage.existing)
    layers = list(backbone.module.features.denseblock1.values())[:]
    x = torch.randn(2, 64, 4, 4)
    weights = torch.rand(2, len(stage.edges))
    of = {edge: weights[:, number].view(-1, 1, 1, 1) for number, edge in enumerate(stage.edges)}
    nodes = [x]
    for j, layer in enumerate(layers, 1):
        nodes.append(layer(torch.cat([of[i, j] * node for i, node in enumerate(nodes)], 1)))
    with torch.no_grad():
        torch.testing.assert_close(stage.mix(x, weights), torch.cat(nodes, 1))


def test_a_group_without_a_first_shortcut_starts_at_its_first_output() -> None:
    backbone = network("mobilenetv2_100")
    stage = delta_stages(draft(backbone, stages=("blocks.2",)))[0]
    assert stage.edges == ((1, 2), (1, 3), (2, 3))
    first, second, third = (backbone.chain[index].module for index in range(5, 8))
    x = torch.randn(2, 24, 4, 4)
    weights = torch.rand(2, 3)
    of = {edge: weights[:, number].view(-1, 1, 1, 1) for number, edge in enumerate(stage.edges)}
    with torch.no_grad():
        n1 = first(x)
        n2 = second(n1) - n1 + of[1, 2] * n1
        n3 = third(n2) - n2 + of[1, 3] * n1 + of[2, 3] * n2
        torch.testing.assert_close(stage.mix(x, weights), n3)


def test_a_transformer_block_is_one_branch() -> None:
    backbone = network("vit_tiny_patch16_224")
    stage = delta_stages(draft(backbone))[0]
    blocks = [segment.module for segment in backbone.chain.blocks[-3:]]
    x = torch.randn(2, 5, 192)
    weights = torch.rand(2, 6)
    of = {edge: weights[:, number].view(-1, 1, 1) for number, edge in enumerate(stage.edges)}
    nodes = [x]
    with torch.no_grad():
        for j, block in enumerate(blocks, 1):
            z = block(nodes[-1]) - nodes[-1]
            nodes.append(z + sum(of[i, j] * node for i, node in enumerate(nodes)))
        torch.testing.assert_close(stage.mix(x, weights), nodes[-1])


@pytest.mark.parametrize(
    "name", ["tiny", "resnet18", "convnext_atto", "mobilenetv2_100", "densenet121", *sorted(TRANSFORMERS)]
)
def test_every_sample_has_its_own_weights_and_does_not_see_the_others(name: str) -> None:
    backbone = network(name)
    x = images(backbone, 4)
    model = draft(backbone, modules=len(stages_of(backbone)), batch_norm=True)
    records = skip_weights(model, x)
    for record in records:
        assert record.weights.shape == (4, len(record.edges))
        assert ((record.weights > 0) & (record.weights < 1)).all()
    assert len(records[0].weights.unique(dim=0)) == 4
    with torch.no_grad():
        alone = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "mobilenetv2_100", "densenet121", "vit_tiny_patch16_224"])
def test_gradients_reach_every_number_of_the_patch_and_no_other(name: str) -> None:
    backbone = network(name)
    options = {"batch_norm": True, "modules": 2}
    model = draft(backbone, **options)
    model.train()  # type: ignore[arg-type]
    F.cross_entropy(model(images(backbone, 6)), torch.arange(6) % 3).backward()
    own = {local for local in model.names.values() if "running" not in local}
    for name, parameter in model.named_parameters():
        if name in own:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_the_gradient_through_the_weights_is_the_slope_of_the_loss() -> None:
    backbone = network("tiny")
    model = draft(backbone, modules=2).double()
    x, labels = images(backbone).double(), torch.arange(3)
    bias = delta_stages(model)[0].delta.linear.bias  # type: ignore[union-attr]
    F.cross_entropy(model(x), labels).backward()
    for edge in range(len(bias)):
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                bias[edge] += step
                losses.append(F.cross_entropy(model(x), labels))
                bias[edge] -= step
        slope = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close(bias.grad[edge], slope, rtol=1e-4, atol=1e-9)


# options ----------------------------------------------------------------------------------------------------


def test_learned_weights_start_at_one_and_are_equal_for_all_images() -> None:
    backbone = network("resnet18")
    model = draft(backbone, skips="learned", modules=4)
    assert DeltaNetwork(skips="learned", modules=4).count_parameters(backbone) == sum(
        len(stage.edges) for stage in stages_of(backbone)
    )
    for record in skip_weights(model, images(backbone)):
        assert torch.equal(record.weights, torch.ones(3, len(record.edges)))


def test_existing_skips_alone_start_as_the_frozen_network() -> None:
    backbone = network("resnet18")
    x = images(backbone)
    model = draft(backbone, skips="existing", modules=4)
    assert [stage.edges for stage in delta_stages(model)] == [((0, 1), (1, 2))] * 4
    assert DeltaNetwork(skips="existing", modules=4).count_parameters(backbone) == len(backbone.chain.blocks)
    assert close(features(model, x), backbone.chain(x))


def test_unchanged_skips_are_the_frozen_network_and_only_norms_are_learned() -> None:
    backbone = network("resnet18")
    x = images(backbone)
    without, normed = (draft(backbone, skips="unchanged", modules=4, batch_norm=flag) for flag in (False, True))
    assert close(features(without, x), backbone.chain(x))
    assert DeltaNetwork(skips="unchanged", modules=4).count_parameters(backbone) == 0
    assert not close(features(normed, x), backbone.chain(x))
    learned = [name for name in normed.names if not name.startswith("head.")]
    assert learned
    assert all("/norms." in name for name in learned)


def test_all_skips_are_one_and_nothing_is_learned_but_the_head() -> None:
    backbone = network("resnet18")
    method = DeltaNetwork(skips="all")
    model = draft(backbone, skips="all")
    assert method.count_parameters(backbone) == 0
    assert all(name.startswith("head.") for name in model.names)
    assert torch.equal(skip_weights(model, images(backbone))[0].weights, torch.ones(3, 3))
    dead = dataclasses.replace(method, head="random")
    idle = dead.draft(backbone, 3)
    with pytest.raises(MethodError, match="trains nothing"):
        dead.make_optimizer(idle, backbone)


def test_random_weights_differ_by_sample_and_by_pass_and_are_never_learned() -> None:
    backbone = network("resnet18")
    model = draft(backbone, skips="random")
    first, second = (skip_weights(model, images(backbone))[0].weights for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert ((first >= 0) & (first < 1)).all()
    assert DeltaNetwork(skips="random").count_parameters(backbone) == 0


def test_dense_networks_have_all_skips() -> None:
    backbone = network("densenet121")
    x = images(backbone)
    for skips in ("existing", "all", "learned"):
        model = draft(backbone, skips=skips)
        assert all(delta_stages(model)[0].existing)
        assert close(features(model, x), backbone.chain(x))


def test_the_identity_start_is_near_the_frozen_network_and_the_random_one_near_one_half() -> None:
    backbone = network("resnet18")
    near, half = (draft(backbone, modules=4, start=start) for start in ("identity", "random"))
    expected = torch.sigmoid(torch.tensor([4.0, -4.0, 4.0])).expand(3, -1)
    for record in skip_weights(near, images(backbone)):
        assert record.existing == (True, False, True)
        torch.testing.assert_close(record.weights, expected)
    for record in skip_weights(half, images(backbone)):
        assert ((record.weights - 0.5).abs() < 0.25).all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "vit_tiny_patch16_224"])
def test_the_norm_option_adds_one_norm_for_every_node(name: str) -> None:
    backbone = network(name)
    without, added = (DeltaNetwork(batch_norm=flag).count_parameters(backbone) for flag in (False, True))
    stage = stages_of(backbone)[-1]
    layout = Layout.of(backbone.chain[stage.start].input_shape, backbone.input_size)
    shapes = [backbone.chain[i].output_shape for i in range(stage.start, stage.end)]
    axis = 0 if layout.kind == "channels-first" else -1
    given = backbone.chain[stage.start].input_shape[axis] if stage.dense else 0
    assert added - without == 2 * (sum(shape[axis] for shape in shapes) - given)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def test_only_added_norms_use_batch_statistics_while_training() -> None:
    backbone = make_timm("resnet18", 32, drop_path_rate=0.5, drop_rate=0.5)
    method = DeltaNetwork(batch_norm=True)
    model = method.draft(backbone, 3)
    model.train()
    stage = delta_stages(model)[0]
    layers = [module for module in stage.frozen.modules() if not list(module.children())]
    assert not any(layer.training for layer in layers)
    assert all(norm.training == isinstance(norm, Norm) for norm in batch_norms(model))
    before = {name: tensor.clone() for name, tensor in model.tensors().items() if "running" in name}
    x = images(backbone)
    a, b = model(x), model(x)
    assert torch.equal(a, b)  # neither dropout nor drop path of frozen blocks
    assert all(not torch.equal(model.tensors()[name], tensor) for name, tensor in before.items())
    frozen = [norm for norm in batch_norms(model) if not isinstance(norm, Norm)]
    assert {norm.num_batches_tracked.item() for norm in frozen} == {0}  # type: ignore[union-attr]


@pytest.mark.parametrize(("options", "rate"), [({}, 10 * 0.02), ({"norm_lr": 0.05}, 0.05)])
def test_added_norms_learn_at_their_own_rate_and_everything_is_in_one_group(
    options: dict[str, float], rate: float
) -> None:
    method = DeltaNetwork(batch_norm=True, lr=0.02, head_lr=0.3, weight_decay=0.1, **options)  # type: ignore[arg-type]
    backbone = network("resnet18")
    model = method.draft(backbone, 3)
    norms = {id(parameter) for parameter in delta_stages(model)[0].norms.parameters()}
    head = {id(parameter) for parameter in model.head.parameters()}
    seen: list[int] = []
    for group in method.parameter_groups(model, backbone):
        for parameter in group["params"]:
            seen.append(id(parameter))
            expected = rate if id(parameter) in norms else 0.3 if id(parameter) in head else 0.02
            assert group["lr"] == pytest.approx(expected)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_a_norm_is_that_of_torch_on_every_axis_and_counts_no_batches() -> None:
    x = torch.randn(4, 6, 3, 3)
    norm, reference = Norm(6), nn.BatchNorm2d(6)
    torch.testing.assert_close(norm(x), reference(x))
    torch.testing.assert_close(norm.running_var, reference.running_var)
    last = Norm(6, axis=-1)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), norm(x))
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    norm.reset_running_stats()
    assert not norm.running_mean.any()


def test_a_batch_with_one_value_a_channel_is_normalised_by_the_running_statistics() -> None:
    norm = Norm(6)
    x = torch.randn(1, 6, 1, 1)
    torch.testing.assert_close(norm(x), x / math.sqrt(1 + norm.eps))
    assert not norm.running_mean.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": 2, "stages": ("layer4",)}, "modules=2 and stages=layer4 contradict"),
        ({"modules": 5}, r"modules=5, but module:.* has 4 stages with skips: stage0 \(layer1.0 to layer1.1\)"),
        ({"stages": ("layer5",)}, r"'layer5' names no stage .*stage3 \(layer4.0 to layer4.1\)"),
        ({"stages": ("layer4.0",)}, "'layer4.0' names no stage"),
        ({"stages": ("layer",)}, "'layer' names no stage"),
        ({"stages": ("stage4",)}, "'stage4' names no stage"),
        ({"stages": ("stage-5",)}, "'stage-5' names no stage"),
        ({"start": "identity", "skips": "learned"}, "start='identity'"),
        ({"norm_lr": 0.1}, "norm_lr=0.1 is for batch_norm=True"),
    ],
)
def test_settings_that_contradict_or_name_nothing_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        DeltaNetwork(**options).blueprint(network("resnet18"))


@pytest.mark.parametrize(
    ("name", "stages", "starts"),
    [
        ("resnet18", ("layer4",), ["layer4.0"]),
        ("resnet18", ("stage-1", "layer2"), ["layer2.0", "layer4.0"]),
        ("resnet18", ("stage0",), ["layer1.0"]),
        ("mobilenetv2_100", ("blocks.3", "stage0"), ["blocks.1.0", "blocks.3.0"]),
        ("mobilenetv2_100", ("blocks",), ["blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.4.0", "blocks.5.0"]),
        ("densenet121", ("features.denseblock2",), ["features.denseblock2"]),
        ("vit_tiny_patch16_224", ("stage1",), ["blocks.3"]),
        ("vit_tiny_patch16_224", ("blocks",), ["blocks.0", "blocks.3", "blocks.6", "blocks.9"]),
    ],
)
def test_stages_are_named_by_their_blocks_or_counted(name: str, stages: tuple[str, ...], starts: list[str]) -> None:
    backbone = network(name)
    grafts = DeltaNetwork(stages=stages).blueprint(backbone).grafts
    assert [backbone.chain[graft.start].name for graft in grafts] == starts


def test_a_command_line_names_stages_with_commas() -> None:
    assert make_method("delta", stages="layer3, layer4").stages == ("layer3", "layer4")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["vgg11", "inception_v3"])
def test_networks_without_skips_are_refused_with_what_could_be_used(name: str) -> None:
    backbone = hollow(name, 96)
    with pytest.raises(MethodNotApplicableError, match=r"no skips to weigh.*scale-bias"):
        DeltaNetwork().blueprint(backbone)
    with pytest.raises(MethodNotApplicableError, match="no skips to weigh"):
        delta_costs(backbone)


# what Δ reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "image", "layout"),
    [
        ((64, 7, 7), (3, 224, 224), Layout()),
        ((64, 7, 14), (3, 224, 448), Layout()),
        ((7, 7, 64), (3, 224, 224), Layout(kind="channels-last")),
        ((197, 192), (3, 224, 224), Layout(kind="tokens", prefix=1, height=14, width=14)),
        ((201, 192), (3, 224, 224), Layout(kind="tokens", prefix=5, height=14, width=14)),
        ((196, 192), (3, 224, 224), Layout(kind="tokens", prefix=0, height=14, width=14)),
        ((1374, 384), (3, 518, 518), Layout(kind="tokens", prefix=5, height=37, width=37)),
        ((99, 192), (3, 224, 112), Layout(kind="tokens", prefix=1, height=14, width=7)),
    ],
)
def test_the_layout_of_an_activation_is_found(shape: tuple[int, ...], image: tuple[int, ...], layout: Layout) -> None:
    assert Layout.of(shape, image) == layout


def test_tokens_that_cover_no_image_are_refused() -> None:
    with pytest.raises(MethodNotApplicableError, match="do not cover an image of 7 x 5"):
        Layout.of((3, 8), (3, 7, 5))


def test_a_grid_is_the_image_of_the_tokens_without_those_that_have_no_position() -> None:
    layout = Layout(kind="tokens", prefix=2, height=2, width=3)
    tokens = torch.arange(8.0).view(1, 8, 1)
    assert layout.grid(tokens).tolist() == [[[[2, 3, 4], [5, 6, 7]]]]
    larger = torch.arange(26.0).view(1, 26, 1)
    assert layout.grid(larger).shape == (1, 1, 4, 6)
    with pytest.raises(MethodError, match="5 tokens do not fill a grid of proportions 2 to 3"):
        layout.grid(torch.zeros(1, 7, 1))
    last = torch.randn(1, 4, 5, 6)
    assert torch.equal(Layout(kind="channels-last").grid(last), last.permute(0, 3, 1, 2))


def test_the_class_token_of_a_transformer_does_not_move_the_weights() -> None:
    stage = delta_stages(draft(network("vit_tiny_patch16_224")))[0]
    x = torch.randn(2, 5, 192)
    moved, patches = x.clone(), x.clone()
    moved[:, 0] += 1
    patches[:, 1] += 1
    assert torch.equal(stage.weights(moved), stage.weights(x))
    assert not torch.equal(stage.weights(patches), stage.weights(x))


# strength ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "mobilenetv2_100", "densenet121", "vit_tiny_patch16_224"])
def test_strength_goes_from_the_frozen_network_to_the_patch(name: str) -> None:
    backbone = network(name)
    x = images(backbone)
    model = draft(backbone, modules=2, batch_norm=True)
    with torch.no_grad():
        for norm in batch_norms(model):
            if isinstance(norm, Norm):
                norm.bias.add_(0.5)  # type: ignore[union-attr]
        untouched, patched = backbone.chain(x), features(model, x)
        distances = []
        for strength in (0.0, 1e-6, 0.5, 1.0):
            for stage in delta_stages(model):
                stage.strength = strength
            distances.append(((features(model, x) - untouched).norm() / untouched.norm()).item())
        assert close(features(model, x), patched)
    assert distances[0] == 0
    assert 0 < distances[1] < 1e-3
    assert distances[1] < distances[2]
    assert distances[1] < distances[3]


def test_strength_mixes_the_weights_linearly() -> None:
    backbone = network("resnet18")
    stage = delta_stages(draft(backbone))[0]
    x = torch.randn(2, 256, 4, 4)
    full = stage.weights(x)
    base = torch.tensor(stage.existing).float()
    stage.strength = 0.25
    torch.testing.assert_close(stage.weights(x), 0.75 * base + 0.25 * full)


# files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", ["conditioned", "existing", "all", "learned"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_patch_read_back_answers_as_before(tmp_path: Any, skips: Any, batch_norm: bool) -> None:
    backbone = network("tiny")
    patch = draft_patch(backbone, DeltaNetwork(modules=2, skips=skips, batch_norm=batch_norm))
    read = Patch.load(patch.save(tmp_path / "a.safetensors"))
    x = images(backbone)
    logits = backbone.patched(patch)(x)
    assert close(backbone.patched(read)(x), logits)
    assert close(BoundPatch(backbone, read)(x), logits)
    assert all(name.startswith(("graft/", "head.")) for name in read.tensors)


def test_how_a_patch_was_started_is_not_part_of_what_it_is() -> None:
    backbone = network("tiny")
    assert DeltaNetwork(start="identity").blueprint(backbone) == DeltaNetwork().blueprint(backbone)


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": 10**9},
        {"channels": "many"},
        {"skips": "none"},
        {"layout": {"kind": "tokens", "prefix": -1}},
        {"unknown": 1},
    ],
)
def test_a_file_that_describes_no_stage_is_refused(arguments: dict[str, Any]) -> None:
    backbone = network("tiny")
    graft = DeltaNetwork().blueprint(backbone).grafts[0]
    hostile = Graft(kind="delta", start=graft.start, end=graft.end, arguments=graft.arguments | arguments)
    with pytest.raises(ForeignTensorError, match="modules of kind 'delta' do not fit"):
        PatchedModel.draft(backbone, Blueprint(grafts=(hostile,)), nn.Identity())


def test_a_stage_that_fits_its_file_but_not_the_network_is_refused() -> None:
    backbone = network("tiny")
    patch = draft_patch(backbone, DeltaNetwork())
    (graft,) = patch.grafts
    channels = graft.arguments["channels"] + 2
    edges = len(patch.tensors[f"graft/{graft.start}-{graft.end}/delta.linear.bias"])
    made = DeltaModule(channels, edges).state_dict()
    named = {f"graft/{graft.start}-{graft.end}/delta.{name}": tensor for name, tensor in made.items()}
    assert named.keys() <= patch.tensors.keys()
    wider = graft.model_copy(update={"arguments": graft.arguments | {"channels": channels}})
    hostile = dataclasses.replace(patch, grafts=(wider,), tensors={**patch.tensors, **named})
    for bind in (PatchedModel, BoundPatch):
        with pytest.raises(ForeignTensorError, match=rf"to segments \[{graft.start}, {graft.end}\) do not fit"):
            bind(backbone, hostile)


def test_a_file_that_weighs_skips_where_there_are_none_is_refused() -> None:
    backbone = network("tiny")
    graft = DeltaNetwork().blueprint(backbone).grafts[0]
    with pytest.raises(ForeignTensorError, match="no skip between them"):
        PatchedModel.draft(
            backbone, Blueprint(grafts=(graft.model_copy(update={"start": 0, "end": 1}),)), nn.Identity()
        )


# reading it -------------------------------------------------------------------------------------------------


def test_read_weights_are_those_that_the_pass_uses() -> None:
    backbone = network("mobilenetv2_100")
    model = draft(backbone, stages=("blocks.2", "blocks.4"))
    used: list[Tensor] = []
    for stage in delta_stages(model):
        stage.delta.register_forward_hook(lambda *arguments: used.append(arguments[-1]))
    model(images(backbone))
    expected = used[:]
    records = skip_weights(model, images(backbone))
    assert [record.span for record in records] == list(model.spans)
    for record, weights in zip(records, expected, strict=True):
        assert torch.equal(record.weights, weights)
    assert not any(stage._forward_pre_hooks for stage in delta_stages(model))


def test_a_record_has_mean_and_deviation_of_every_edge() -> None:
    record = skip_weights(draft(network("resnet18")), images(network("resnet18")))[0]
    edges = record.as_dict()["edges"]
    assert [(edge["from"], edge["to"]) for edge in edges] == list(record.edges)
    assert [edge["existing"] for edge in edges] == [True, False, True]
    for number, edge in enumerate(edges):
        assert edge["mean"] == pytest.approx(record.weights[:, number].mean().item())
        assert edge["deviation"] == pytest.approx(record.weights[:, number].std(correction=0).item())


@pytest.mark.parametrize("read", [skip_weights, skip_variances])
def test_a_model_that_weighs_no_skips_is_refused(read: Any) -> None:
    backbone = network("tiny")
    with pytest.raises(MethodError, match="weighs no skips"):
        read(make_method("linear-probe").draft(backbone, 3), images(backbone))


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "vit_tiny_patch16_224"])
def test_variance_grows_along_unnormalised_skips_and_is_one_behind_norms(name: str) -> None:
    backbone = network(name)
    x = images(backbone, 8)
    loose = skip_variances(draft(backbone, skips="all", modules=4), x)
    assert [len(stage) for stage in loose] == [stage.depth for stage in stages_of(backbone)]
    assert all(after > before for stage in loose for before, after in itertools.pairwise(stage))
    method = DeltaNetwork(skips="all", modules=4, batch_norm=True)
    model = method.draft(backbone, 3)
    model.train()
    for variances in skip_variances(model, x):
        assert variances == pytest.approx([1] * len(variances), abs=0.15)


def test_variance_doubles_where_the_skip_is_as_large_as_the_branch_and_independent_of_it() -> None:
    class Independent(nn.Module):
        """x + a permutation of x: a branch as large as the skip and not correlated with it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(64, 64, 1, bias=False), nn.Conv2d(64, 64, 1, bias=False)
            with torch.no_grad():
                for conv in (self.conv1, self.conv2):
                    conv.weight.copy_(torch.linalg.qr(torch.randn(64, 64)).Q[:, :, None, None])

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x)) + x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 1)
            self.stage = nn.Sequential(Independent(), Independent(), Independent())
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.flatten = nn.Flatten()
            self.fc = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(self.pool(self.stage(self.stem(x)))))

    torch.manual_seed(0)
    backbone = load_backbone(Net(), preprocessing=small_preprocessing())
    variances = skip_variances(draft(backbone, skips="existing"), images(backbone, 16))[0]
    for before, after in itertools.pairwise(variances):
        assert after / before == pytest.approx(2, rel=0.2)


def test_all_stages_of_a_model_are_found() -> None:
    model = draft(network("resnet18"), modules=3)
    assert [type(stage) for stage in delta_stages(model)] == [ResidualStage] * 3
    assert all(isinstance(stage, DeltaStage) for stage in model.variants)


def test_all_stages_with_skips_can_be_asked_for(tiny: Backbone) -> None:
    every = DeltaNetwork(modules="all").blueprint(tiny)
    assert every == DeltaNetwork(modules=len(stages_of(tiny))).blueprint(tiny)
    assert make_method("delta(modules=all)") == DeltaNetwork(modules="all")

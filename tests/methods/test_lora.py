"""LoRA: the formula, which layers get an update, what stays frozen, strength, and life without peft."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

from conftest import draft_patch, make_timm, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task
from modelpatch.engine.engine import Engine
from modelpatch.errors import ForeignTensorError, MethodError, MethodNotApplicableError, MissingExtraError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.lora import MAX_RANK, LoRA, LowRank, Strength, add_updates
from modelpatch.methods.registry import make_method
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.changes import set_strength
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.train import fit
from tolerance import close


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=4)


def small_net(*layers: nn.Module) -> Backbone:
    """Layers over features (B, 8, 8, 8), between a strided convolution and a linear classifier."""
    torch.manual_seed(0)
    stem, end = nn.Conv2d(3, 8, 3, 2, 1), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return load_backbone(nn.Sequential(stem, *layers, *end), preprocessing=small_preprocessing())


def adapted(backbone: Backbone, method: LoRA) -> list[str]:
    """The backbone's names of the layers that have an update."""
    return [
        backbone.chain[graft.start].tensor_names[f"{name}.weight".lstrip(".")].removesuffix(".weight")
        for graft in method.blueprint(backbone).grafts
        for name in graft.arguments["layers"]
    ]


class Tokens(nn.Module):
    """Features (B, 8, H, W) through a module over tokens (B, N, 8)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """PyTorch's own attention, which reads its projections' weights, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


class ReadsWeight(nn.Module):
    """Uses a linear layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight))


class Shared(nn.Module):
    """One convolution under two names, two with one weight, and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Conv2d(8, 8, 1)
        self.one = self.same = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(self.same(self.one(self.alone(x)))))


# the update -----------------------------------------------------------------------------------------------------


def test_a_draft_computes_what_the_base_computes(tiny: Backbone, vit: Backbone) -> None:
    for backbone in (tiny, vit):
        images = torch.randn(3, *backbone.input_size)
        model = LoRA().draft(backbone, 3)
        with torch.no_grad():
            assert close(model(images), model.head(backbone.chain(images)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 10), (4, 6)),
        (nn.Linear(6, 10, bias=False), (4, 7, 6)),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), (4, 6, 9, 9)),
        (nn.Conv2d(6, 10, (1, 3), padding="same", bias=False), (4, 6, 9, 9)),
        (Conv2dSame(6, 10, 3, stride=2), (4, 6, 9, 9)),
    ],
)
def test_the_update_adds_to_the_weight_as_the_paper_says(layer: nn.Module, shape: tuple[int, ...]) -> None:
    updated = add_updates(layer, rank=3, scale=6.0, layers=[""])
    tensors = {name: tensor for name, tensor in updated.named_parameters() if "lora" in name}
    for tensor in tensors.values():
        nn.init.normal_(tensor)
    a, b = (tensors[f"lora_{side}.default.weight"] for side in "AB")
    x = torch.randn(shape)
    actual = updated(x)
    with torch.no_grad():
        layer.weight += 6.0 / 3 * (b.flatten(1) @ a.flatten(1)).view_as(layer.weight)  # W + (scale / rank) B A
        assert torch.allclose(layer(x), actual, atol=1e-4)


def test_numbers_are_counted_as_rank_times_both_sides(tiny: Backbone, vit: Backbone) -> None:
    for backbone in (tiny, vit):
        layers = [backbone.module.get_submodule(name) for name in adapted(backbone, LoRA(rank=3))]
        sides = [layer.weight[0].numel() + len(layer.weight) for layer in layers]
        assert LoRA(rank=3).count_parameters(backbone) == 3 * sum(sides)


def test_training_moves_every_update_and_nothing_else(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, LoRA(rank=2), epochs=1)
    assert all(name.startswith(("graft/", "head.")) for name in patch.tensors)
    starts_at_zero = [tensor for name, tensor in patch.tensors.items() if "lora_B" in name]
    assert len(starts_at_zero) == len(adapted(tiny, LoRA()))
    assert all(tensor.any() for tensor in starts_at_zero)


LAYERS_OF_ALL_KINDS = [
    (nn.Linear(6, 10), (4, 7, 6)),
    (nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), (4, 6, 9, 9)),
    (Conv2dSame(6, 10, 3, stride=2), (4, 6, 9, 9)),
]


@pytest.mark.parametrize("strength", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("layer", "shape"), LAYERS_OF_ALL_KINDS)
def test_dora_gives_every_output_a_length_of_its_own(
    layer: nn.Module, shape: tuple[int, ...], rslora: bool, strength: float
) -> None:
    layer = copy.deepcopy(layer)
    updated = add_updates(layer, rank=4, scale=6.0, layers=[""], rslora=rslora, dora=True)
    tensors = {name: tensor for name, tensor in updated.named_parameters() if "lora" in name}
    x = torch.randn(shape)
    with torch.no_grad():
        assert close(updated(x), layer(x))
        for tensor in tensors.values():
            nn.init.normal_(tensor)
        set_strength(updated, strength)
        actual = updated(x)
        a, b = (tensors[f"lora_{side}.default.weight"].flatten(1) for side in "AB")
        changed = layer.weight.flatten(1) + 6.0 / (2 if rslora else 4) * b @ a  # the root of 4, or 4
        length = tensors["lora_magnitude_vector.default.weight"].flatten()
        whole = length[:, None] * changed / changed.norm(dim=1, keepdim=True)
        layer.weight.lerp_(whole.view_as(layer.weight), strength)
        torch.testing.assert_close(layer(x), actual, rtol=1e-4, atol=1e-4)


def test_the_scale_of_rslora_falls_with_the_root_of_the_rank() -> None:
    layer = nn.Linear(6, 10)
    updated = add_updates(copy.deepcopy(layer), rank=4, scale=6.0, layers=[""], rslora=True)
    a, b = (updated.get_parameter(f"lora_{side}.default.weight") for side in "AB")
    x = torch.randn(3, 6)
    with torch.no_grad():
        nn.init.normal_(b)
        torch.testing.assert_close(updated(x), layer(x) + 6.0 / 2 * x @ (b @ a).T)


def test_dora_holds_a_number_more_for_every_output(vit: Backbone) -> None:
    plain, lengths = (LoRA(rank=3, dora=dora).count_parameters(vit) for dora in (False, True))
    outputs = sum(len(vit.module.get_submodule(name).weight) for name in adapted(vit, LoRA()))
    assert lengths - plain == outputs


def test_dora_leaves_out_layers_whose_weights_have_no_length() -> None:
    backbone = small_net(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        backbone.module[1].weight[3] = 0  # type: ignore[index, union-attr]
    assert adapted(backbone, LoRA()) == ["0", "1", "2"]
    assert adapted(backbone, LoRA(dora=True)) == ["0", "2"]


@pytest.mark.parametrize("changed", [{"dora": 1}, {"rslora": "yes"}, {"rank": 0}], ids=str)
def test_a_file_that_asks_for_an_unknown_variant_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(changed))):
        add_updates(nn.Linear(6, 10), **{"rank": 2, "scale": 1.0, "layers": [""], **changed})  # type: ignore[arg-type]


# which layers ---------------------------------------------------------------------------------------------------


def test_all_blocks_are_adapted_but_their_depthwise_convolutions(tiny: Backbone) -> None:
    assert adapted(tiny, LoRA()) == [
        "stage1.0.conv2",
        "stage1.1.conv2",
        "stage2.0.conv2",
        "stage2.0.shortcut",
        "stage2.1.conv2",
    ]


def test_blocks_are_named_as_in_subset_and_may_be_any_segment(tiny: Backbone) -> None:
    assert adapted(tiny, LoRA(blocks=("stage2.1",))) == ["stage2.1.conv2"]
    assert adapted(tiny, LoRA(blocks=("stem.0", "last"))) == ["stem.0", "stage2.1.conv2"]
    assert make_method("lora", blocks="stem.0,last", rank="4") == LoRA(blocks=("stem.0", "last"), rank=4)
    with pytest.raises(MethodError, match="'stage' names no block"):
        LoRA(blocks=("stage",)).blueprint(tiny)


def test_linear_layers_and_convolutions_can_be_picked(vit: Backbone) -> None:
    backbone = small_net(nn.Conv2d(8, 8, 3), Tokens(nn.Linear(8, 8)))
    assert adapted(backbone, LoRA(layers="linear")) == ["2.module"]
    assert adapted(backbone, LoRA(layers="convolution")) == ["0", "1"]
    assert adapted(backbone, LoRA()) == ["0", "1", "2.module"]
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted(vit, LoRA()) == [f"blocks.{block}.{name}" for block in range(4) for name in inner]


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), []),
        (nn.Conv2d(8, 8, 3, groups=2), []),
        (nn.Conv2d(8, 8, 3, dilation=2), []),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), []),
        (ScaledStdConv2d(8, 8, 3), []),
        (Conv2dSame(8, 8, 3, stride=2), ["1"]),
        (Tokens(Attention()), ["1.module.linear"]),
        (Tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), []),
        (Tokens(ReadsWeight()), ["1.module.called"]),
        (Shared(), ["1.alone"]),
    ],
    ids=lambda value: str(value).replace("\n", "")[:60],
)
def test_layers_that_can_have_no_update_are_left_out(layer: nn.Module, kept: list[str]) -> None:
    backbone = small_net(layer)
    assert adapted(backbone, LoRA(blocks=("0", "1"))) == ["0", *kept]
    images = torch.randn(2, *backbone.input_size)
    model = LoRA(blocks=("0", "1")).draft(backbone, 3)
    with torch.no_grad():
        for tensor in model.tensors().values():
            tensor.copy_(torch.randn_like(tensor))
        assert model(images).isfinite().all()


def test_a_layer_that_several_segments_run_is_left_out() -> None:
    same = nn.Conv2d(8, 8, 1)
    assert adapted(small_net(same, nn.ReLU(), same), LoRA()) == ["0"]


def test_a_network_with_nothing_to_adapt_says_what_could_be_used(tiny: Backbone) -> None:
    with pytest.raises(MethodNotApplicableError, match=r"no linear layer in its blocks.*layers='all'.*`scale-bias`"):
        LoRA(layers="linear").blueprint(tiny)
    with pytest.raises(MethodNotApplicableError, match=r"no layer in 1 that.*Try other blocks.*`subset`"):
        LoRA(blocks=("1",)).blueprint(small_net(nn.Conv2d(8, 8, 3, groups=8)))


# attention that reads its weights itself -------------------------------------------------------------------------


def test_attention_has_updates_of_the_weights_it_reads() -> None:
    backbone = small_net(Tokens(Attention()))
    blocks = ("0", "1")
    method = LoRA(rank=2, scale=6.0, blocks=blocks, layers="linear")
    assert method.count_parameters(backbone) == 2 * (8 + 24) + 2 * (8 + 8) + 2 * (8 + 8)
    assert LoRA(rank=2, blocks=blocks, layers="linear", dora=True).count_parameters(backbone) == 2 * (8 + 8) + 8
    model = method.draft(backbone, 3)
    images = torch.randn(2, *backbone.input_size)
    with torch.no_grad():
        assert close(model(images), model.head(backbone.chain(images)))
    model.train()
    model(images).square().sum().backward()
    with torch.no_grad():
        for name, parameter in model.trainable():
            assert (parameter.grad is not None) or "graft" not in name
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.eval()
    patch = model.to_patch(("draft", ["a", "b", "c"]), method=method)
    module = copy.deepcopy(backbone.module)
    attention, linear = module[1].module.attention, module[1].module.linear
    with torch.no_grad():
        for weight, name in (
            (attention.in_proj_weight, "in_proj_weight"),
            (attention.out_proj.weight, "out_proj.weight"),
        ):
            left, right = (patch.tensors[f"{side}/1.module.attention.{name}"] for side in ("left", "right"))
            (made,) = [
                one for place, one in model.named_modules() if isinstance(one, LowRank) and name.split(".")[0] in place
            ]
            assert torch.equal(left, 6.0 / 2 * made.lora_B)  # W + (scale / rank) B A
            weight += left @ right
        a, b = (
            next(t for n, t in patch.tensors.items() if n.endswith(f"linear.lora_{side}.default.weight"))
            for side in "AB"
        )
        linear.weight += 3 * b @ a
        module[-1] = model.head
        expected = module[:-1](images)
        assert close(model(images), model.head(expected))
        assert close(backbone.patched(patch)(images), model(images))
        assert close(Engine(backbone, {"patch": patch})(images)["patch"], model(images))


def test_open_clips_attention_has_updates(clip: Backbone) -> None:
    owned = LoRA().blueprint(clip).owned
    assert len(owned) == 2 * sum(isinstance(module, nn.MultiheadAttention) for module in clip.module.modules()) > 0
    assert all(name.endswith(("attn.in_proj_weight", "attn.out_proj.weight")) for name in owned)


def test_layers_have_a_rank_and_a_scale_of_their_own(vit: Backbone) -> None:
    method = make_method("lora(rank=2,rank_pattern=[fc1|qkv=3,1.mlp.fc2=5],alpha_pattern=[fc2=4],layers=linear)")
    sizes = {
        (graft.arguments["rank"], graft.arguments["scale"], name.rpartition(".")[2], graft.start == 2)
        for graft in method.blueprint(vit).grafts
        for name in graft.arguments["layers"]
    }
    ranks = {(name, rank) for rank, _, name, _ in sizes}
    assert ranks == {("qkv", 3), ("proj", 2), ("fc1", 3), ("fc2", 2), ("fc2", 5)}
    assert {scale for _, scale, name, _ in sizes if name == "fc2"} == {4.0}
    assert {scale for _, scale, name, _ in sizes if name != "fc2"} == {16.0}


def test_targets_biases_and_modules_to_save_are_chosen_by_name(vit: Backbone) -> None:
    method = LoRA(targets=r"blocks\.[01]\.attn\.qkv", bias="lora_only", modules_to_save=("norm1",))
    assert adapted(vit, method) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    norms = {f"blocks.{block}.norm1.{leaf}" for block in range(4) for leaf in ("weight", "bias")}
    assert set(method.blueprint(vit).owned) == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias", *norms}
    assert set(LoRA(bias="all").blueprint(vit).owned) == {
        name for name, _ in vit.module.named_parameters() if name.endswith(".bias") and not name.startswith("head.")
    }
    for changed, error, problem in (
        ({"targets": "mlp"}, MethodNotApplicableError, "whose name is 'mlp'"),
        ({"modules_to_save": ("norm9",)}, MethodError, "ends with 'norm9'"),
        ({"modules_to_save": ("mlp",)}, MethodError, r"modules_to_save='mlp' holds blocks\.0\.mlp\.fc1"),
    ):
        with pytest.raises(error, match=problem):
            LoRA(**changed).blueprint(vit)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"rank_pattern = .*no regular expression"):
        LoRA(rank_pattern={"(": 2})  # type: ignore[arg-type]


# what stays as it was -------------------------------------------------------------------------------------------


def test_frozen_parameters_lie_in_the_backbones_bytes(tiny: Backbone, vit: Backbone) -> None:
    for backbone in (tiny, vit):
        before = {name: (id(p), p.dtype, p.device) for name, p in backbone.module.named_parameters()}
        own = {parameter.data_ptr() for parameter in backbone.module.parameters()}
        for model in (LoRA().draft(backbone, 3), backbone.patched(draft_patch(backbone, LoRA()))):
            patched = set(model.names.values())
            shared = {name: p for name, p in model.named_parameters() if name not in patched}
            assert {parameter.data_ptr() for parameter in shared.values()} <= own
            assert not any(parameter.requires_grad for parameter in shared.values())
        assert {name: (id(p), p.dtype, p.device) for name, p in backbone.module.named_parameters()} == before
        assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
        assert not any("lora" in name for name, _ in backbone.module.named_modules())


def test_what_the_patch_trains_besides_updates_stays_trained(tiny: Backbone) -> None:
    block = tiny.chain.blocks[-1]
    name = f"{block.name}.conv1.weight"
    blueprint = Blueprint(owned=(name,), grafts=LoRA().blueprint(tiny).grafts)
    model = PatchedModel.draft(tiny, blueprint, LinearHead(tiny.chain.feature_dim, 3))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(model.names.values())
    assert f"replace/{name}" in model.names


def test_one_block_may_have_updates_of_two_ranks() -> None:
    backbone = small_net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Tokens(nn.Linear(8, 8))))
    methods = LoRA(rank=2, layers="convolution"), LoRA(rank=4, layers="linear")
    grafts = tuple(graft for method in methods for graft in method.blueprint(backbone).grafts)
    model = PatchedModel.draft(backbone, Blueprint(grafts=grafts), LinearHead(backbone.chain.feature_dim, 3))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(model.names.values())
    assert sorted({tensor.shape[0] for name, tensor in model.portable_state().items() if "lora_A" in name}) == [2, 4]


def test_two_updates_of_one_layer_are_refused(tiny: Backbone) -> None:
    grafts = LoRA().blueprint(tiny).grafts
    with pytest.raises(ForeignTensorError, match="not a linear layer"):
        PatchedModel.draft(tiny, Blueprint(grafts=grafts + grafts), LinearHead(tiny.chain.feature_dim, 3))


def test_frozen_parts_run_as_at_inference_while_training() -> None:
    backbone = small_net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 8, 1)))
    method = LoRA()
    model = method.draft(backbone, 3)
    model.train()
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout | nn.BatchNorm2d))
    images = torch.randn(2, *backbone.input_size)
    assert torch.equal(model(images), model(images))


# strength -------------------------------------------------------------------------------------------------------


def test_strength_turns_the_update_from_the_base_to_the_whole_patch(tiny: Backbone, vit: Backbone) -> None:
    for backbone in (tiny, vit):
        images = torch.randn(3, *backbone.input_size)
        model = backbone.patched(draft_patch(backbone, LoRA()))
        knobs = [module for module in model.modules() if hasattr(module, "strength")]
        assert len(knobs) == len(adapted(backbone, LoRA()))
        whole = model(images)
        results = {}
        for strength in (0.0, 0.5, 1.0):
            for knob in knobs:
                knob.strength = strength  # type: ignore[assignment]
            results[strength] = model(images)
        assert close(results[1.0], whole)
        assert close(results[0.0], model.head(backbone.chain(images)))
        assert not torch.allclose(results[0.5], whole)


def test_half_the_strength_is_half_the_update() -> None:
    updated = add_updates(nn.Conv2d(4, 6, 3), rank=2, scale=2.0, layers=[""])
    nn.init.normal_(dict(updated.named_parameters())["lora_B.default.weight"])
    (knob,) = [module for module in updated.modules() if isinstance(module, Strength)]
    x = torch.randn(2, 4, 7, 7)
    results = []
    for knob.strength in (0.0, 0.5, 1.0):
        results.append(updated(x))
    assert torch.allclose(results[1], (results[0] + results[2]) / 2, atol=1e-5)


# files, and life without peft -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": MAX_RANK + 1}, f"rank {MAX_RANK + 1} is not between 1 and {MAX_RANK}"),
        ({"rank": "many"}, "not supported"),
        ({"layers": ["conv9"]}, "conv9"),
        ({"layers": ["bn1"]}, "bn1 is a BatchNorm2d"),
        ({"alpha": 3}, "alpha"),
    ],
)
def test_a_patch_whose_updates_cannot_be_built_is_refused(
    tiny: Backbone, arguments: dict[str, object], problem: str
) -> None:
    graft = LoRA().blueprint(tiny).grafts[0]
    other = graft.model_copy(update={"arguments": {**graft.arguments, **arguments}})
    with pytest.raises(ForeignTensorError, match=problem):
        PatchedModel.draft(tiny, Blueprint(grafts=(other,)), LinearHead(tiny.chain.feature_dim, 3))


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("rank", MAX_RANK + 1), ("scale", -1), ("layers", "norm")])
def test_an_option_that_makes_no_sense_is_refused(name: str, value: object) -> None:
    with pytest.raises(MethodError, match=f"lora: {name} = {value!r} is not valid"):
        make_method("lora", **{name: value})


def test_without_peft_the_error_names_the_extra(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    patch: Patch = draft_patch(tiny, LoRA())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"method lora needs `peft`.*modelpatch\[lora\]"):
        LoRA().blueprint(tiny)
    with pytest.raises(MissingExtraError, match=r"patch with low-rank updates needs `peft`"):
        tiny.patched(patch)


def test_the_package_is_imported_without_peft() -> None:
    code = "import sys, modelpatch; print(sorted({'peft', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_network_may_read_the_settings_of_its_convolutions() -> None:
    """MobileNetV2 of transformers pads by the stride of a layer, as TensorFlow does."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    module = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.25)).eval()
    backbone = load_backbone(module, preprocessing=small_preprocessing(32))
    model = LoRA(layers="convolution").draft(backbone, 3)
    x = torch.randn(2, 3, 32, 32)
    assert close(model.run_prefix(x, len(backbone.chain)), backbone.chain(x))

"""Scale-and-bias patches: the paper's counts, folding, statistics and networks of every normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import color_task, make_timm, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.steps import Steps
from modelpatch.data.task import Task
from modelpatch.errors import MethodNotApplicableError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.scale_bias import ChannelAffine, RecomputeStatistics, ScaleBias, add_channel_affines, is_norm
from modelpatch.train import fit
from tolerance import close

MOBILENET_V2_PARAMETERS = 3_504_872  # with its head of 1,000 classes


class ScaleOnlyNorm(nn.Module):
    """A normalisation of its own: root mean square over channels with a scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).add(1e-6).sqrt() * self.weight.view(1, -1, 1, 1)


def conv_net(norm: nn.Module) -> Backbone:
    """Two convolutions with `norm`, of 8 channels, between them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), norm, nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return load_backbone(nn.Sequential(*layers, nn.Linear(12, 5)), preprocessing=small_preprocessing())


def mlp(*, norm: bool) -> Backbone:
    """A network without any convolution."""
    middle = [nn.LayerNorm(10)] if norm else []
    layers = [nn.Flatten(), nn.Linear(3 * 16 * 16, 10), *middle, nn.GELU(), nn.Linear(10, 5)]
    return load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())


def owned_numbers(backbone: Backbone, method: ScaleBias) -> int:
    tensors = method.draft(backbone, 1).tensors()
    return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("replace/"))


# the paper's counts -----------------------------------------------------------------------------------------


def test_mobilenet_v2_has_the_papers_34_thousand_and_as_many_statistics() -> None:
    backbone = make_timm("mobilenetv2_100", 32)
    count = ScaleBias().count_parameters(backbone)
    assert count == owned_numbers(backbone, ScaleBias()) == 34_112
    assert count < 0.01 * MOBILENET_V2_PARAMETERS
    assert owned_numbers(backbone, ScaleBias(statistics="learned")) == 2 * count
    assert owned_numbers(backbone, ScaleBias(affine=False, statistics="recomputed")) == count
    assert ScaleBias(affine=False, statistics="recomputed").count_parameters(backbone) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pixels", "arguments", "count"),
    [
        ("convnext_tiny", 32, {}, 16_320),
        ("vit_base_patch16_224", 32, {"img_size": 32}, 2 * 768 * (2 * 12 + 1)),
        ("vit_tiny_patch16_224", 32, {"img_size": 32}, 2 * 192 * (2 * 12 + 1)),
        ("inception_v3", 80, {}, 34_432),
    ],
)
def test_other_architectures_have_the_published_counts(
    name: str, pixels: int, arguments: dict[str, int], count: int
) -> None:
    assert ScaleBias().count_parameters(make_timm(name, pixels, **arguments)) == count


# which layers -----------------------------------------------------------------------------------------------


def test_every_norm_layer_is_owned_those_in_traced_segments_too(tiny: Backbone) -> None:
    norms = {name for name, module in tiny.module.named_modules() if isinstance(module, nn.BatchNorm2d)}
    owned = ScaleBias().blueprint(tiny).owned
    assert set(owned) == {f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias")}
    assert isinstance(tiny.chain.segment_of("stem.1.weight").module, Steps)
    assert "stem.1.weight" in owned


@pytest.mark.parametrize(
    ("norm", "numbers"),
    [
        (nn.BatchNorm2d(8), 16),
        (nn.GroupNorm(2, 8), 16),
        (nn.LayerNorm([8, 7, 7]), 2 * 8 * 7 * 7),
        (nn.RMSNorm([8, 7, 7]), 8 * 7 * 7),
        (nn.InstanceNorm2d(8, affine=True), 16),
        (ScaleOnlyNorm(8), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norm_layers_of_every_kind_are_trained(norm: nn.Module, numbers: int) -> None:
    backbone = conv_net(norm)
    assert ScaleBias().count_parameters(backbone) == numbers
    patch = fit(backbone, color_task(12), ScaleBias(), epochs=1)
    weight = next(tensor for name, tensor in patch.tensors.items() if name.startswith("replace/"))
    assert not torch.equal(weight, torch.ones_like(weight))


def test_layers_without_numbers_of_their_own_are_no_norm_layers() -> None:
    assert not is_norm(nn.Conv2d(3, 3, 1))
    assert not is_norm(nn.Linear(3, 3))
    assert not is_norm(nn.LocalResponseNorm(2))


def test_auto_adds_affines_where_there_is_no_norm_layer() -> None:
    backbone = conv_net(nn.Identity())
    assert ScaleBias().blueprint(backbone) == ScaleBias(layers="channel").blueprint(backbone)
    assert ScaleBias().count_parameters(backbone) == 2 * (8 + 12)


def test_a_method_that_finds_nothing_to_train_says_so() -> None:
    with pytest.raises(MethodNotApplicableError, match="no normalisation layer"):
        ScaleBias(layers="norm").blueprint(conv_net(nn.Identity()))
    with pytest.raises(MethodNotApplicableError, match="no convolution"):
        ScaleBias(layers="channel").blueprint(mlp(norm=True))
    with pytest.raises(MethodNotApplicableError, match="no convolution"):
        ScaleBias().blueprint(mlp(norm=False))
    with pytest.raises(MethodNotApplicableError, match="running statistics"):
        ScaleBias(affine=False, statistics="recomputed").blueprint(conv_net(nn.GroupNorm(2, 8)))


# affines after convolutions ---------------------------------------------------------------------------------


def test_added_affines_start_as_the_identity(tiny: Backbone) -> None:
    images = torch.randn(4, *tiny.input_size)
    model = ScaleBias(layers="channel").draft(tiny, 3)
    with torch.no_grad():
        assert close(model(images), model.head(tiny.chain(images)))


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, bias=False)]
)
def test_an_added_affine_folds_into_its_convolution(convolution: nn.Conv2d) -> None:
    affine = ChannelAffine(convolution)
    nn.init.normal_(affine.scale)
    nn.init.normal_(affine.bias)
    before = torch.zeros(convolution.out_channels) if convolution.bias is None else convolution.bias
    weight = affine.scale.view(-1, 1, 1, 1) * convolution.weight  # W' = gamma W
    bias = affine.scale * before + affine.bias  # b' = gamma b + beta
    images = torch.randn(2, 6, 9, 9)
    folded = torch.conv2d(images, weight, bias, groups=convolution.groups)
    assert torch.allclose(affine(images), folded, atol=1e-5)


def test_an_affine_wraps_a_convolution_that_is_a_segment_itself() -> None:
    convolution = nn.Conv2d(3, 4, 1)
    wrapped = add_channel_affines(convolution, [""])
    assert isinstance(wrapped, ChannelAffine)
    assert wrapped.layer is convolution


def test_one_affine_follows_every_convolution(tiny: Backbone) -> None:
    model = ScaleBias(layers="channel").draft(tiny, 3)
    convolutions = [module for module in tiny.module.modules() if isinstance(module, nn.Conv2d)]
    affines = [module for module in model.modules() if isinstance(module, ChannelAffine)]
    assert len(affines) == len(convolutions)
    assert ScaleBias(layers="channel").count_parameters(tiny) == sum(2 * c.out_channels for c in convolutions)


# statistics -------------------------------------------------------------------------------------------------


def test_recomputed_statistics_are_the_average_over_the_batches(tiny: Backbone) -> None:
    batches = [torch.randn(6, *tiny.input_size), 2 + torch.randn(6, *tiny.input_size)]
    model = ScaleBias(statistics="recomputed").draft(tiny, 3)
    RecomputeStatistics().begin(model, lambda: batches)
    stem = tiny.module.get_submodule("stem.0")
    with torch.no_grad():
        outputs = [stem(batch).transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([output.mean(1) for output in outputs]).mean(0)
    variance = torch.stack([output.var(1) for output in outputs]).mean(0)
    tensors = model.tensors()
    assert torch.allclose(tensors["replace/stem.1.running_mean"], mean, atol=1e-5)
    assert torch.allclose(tensors["replace/stem.1.running_var"], variance, atol=1e-5)


def test_recomputed_statistics_stay_as_measured_while_training(tiny: Backbone, colors: Task) -> None:
    short, long = (fit(tiny, colors, ScaleBias(statistics="recomputed"), epochs=n) for n in (1, 4))
    running = [name for name in short.tensors if "running" in name]
    assert running
    assert all(torch.equal(short.tensors[name], long.tensors[name]) for name in running)
    assert not torch.equal(short.tensors["replace/stem.1.weight"], long.tensors["replace/stem.1.weight"])


def test_learned_statistics_move_and_frozen_ones_are_not_in_the_patch(tiny: Backbone, colors: Task) -> None:
    learned = fit(tiny, colors, ScaleBias(statistics="learned"), epochs=2)
    base = dict(tiny.module.named_buffers())["stem.1.running_mean"]
    assert not torch.allclose(learned.tensors["replace/stem.1.running_mean"], base, atol=1e-3)
    frozen = fit(tiny, colors, ScaleBias(), epochs=1)
    assert not any("running" in name for name in frozen.tensors)


# the head ---------------------------------------------------------------------------------------------------


def test_a_random_head_stays_as_drawn_while_scale_and_bias_train(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, ScaleBias(head="random"), epochs=2, seed=7)
    torch.manual_seed(7)
    drawn = LinearHead(tiny.chain.feature_dim, 3)
    assert torch.equal(patch.tensors["head.weight"], drawn.weight)
    assert torch.equal(patch.tensors["head.bias"], drawn.bias)
    base = dict(tiny.module.named_parameters())
    trained = [name for name in patch.tensors if name.startswith("replace/")]
    assert all(not torch.equal(patch.tensors[name], base[name.removeprefix("replace/")]) for name in trained)


def test_a_patch_of_one_bias_decides_how_often_a_network_folds_the_line() -> None:
    """Section 4: q(q(x)) with q(x) = 2 ReLU(x + b) - 4 ReLU(x - 1/2) has 4 components over [0.2, 0.4], fewer with each b."""
    fold = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, eps=0), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        fold[0].weight.fill_(1)
        fold[0].bias.zero_()
        fold[1].bias.copy_(torch.tensor([0, -0.5]))
        fold[3].weight.copy_(torch.tensor([[2, -4]]))
        fold[3].bias.zero_()
    module = nn.Sequential(copy.deepcopy(fold), copy.deepcopy(fold)).eval()
    x = torch.linspace(0, 1, 40_001, dtype=torch.float64)[:, None]

    def components(bias: float) -> int:
        patched = clone_module(module, {"0.1.bias"})
        with torch.no_grad():
            patched[0][1].bias[0] = bias  # type: ignore[index]
            inside = ((patched(x) > 0.2) & (patched(x) < 0.4)).squeeze(1).int()
        return int((inside.diff(prepend=torch.zeros(1, dtype=torch.int32)) == 1).sum())

    assert [components(bias) for bias in (0, -0.075, -0.125, -0.425, -0.5)] == [4, 3, 2, 1, 0]


def test_only_depthwise_kernels_are_owned(tiny: Backbone) -> None:
    assert set(Depthwise().blueprint(tiny).owned) == {
        f"stage{stage}.{block}.conv1.weight" for stage in (1, 2) for block in (0, 1)
    }


def test_the_counts_of_mobilenetv2_are_the_papers() -> None:
    """K for the Price of 1: scale and bias 34K, depthwise less than 3 % of 3.5 million."""
    backbone = make_timm("mobilenetv2_100", 32)
    convolutions = [m for m in backbone.module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    kernels = sum(m.weight.numel() for m in convolutions)
    scales = sum(2 * m.num_features for m in backbone.module.modules() if isinstance(m, nn.BatchNorm2d))
    assert Depthwise().count_parameters(backbone) == kernels == 64_224
    assert ScaleBias().count_parameters(backbone) == scales == 34_112
    assert (ScaleBias() + Depthwise()).count_parameters(backbone) == kernels + scales
    statistics = ScaleBias(affine=False, statistics="recomputed").draft(backbone, 1).tensors()
    assert sum(t.numel() for n, t in statistics.items() if n.startswith("replace/")) == 34_112

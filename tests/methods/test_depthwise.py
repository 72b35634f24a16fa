"""Depthwise patches: the paper's count, alone and with scale and bias."""

from __future__ import annotations

from torch import nn

from conftest import make_timm
from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.scale_bias import ScaleBias


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

"""Folded segments compute what the frozen ones do, to rounding, and leave those alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from conftest import make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.train.inputs import fold_segment
from tolerance import close


def norms(module: torch.nn.Module) -> int:
    return sum(isinstance(child, _BatchNorm) for child in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "convnext_atto"])
def test_every_segment_computes_the_same(name: str) -> None:
    backbone = make_timm(name, 32)
    for segment in backbone.chain:
        x = torch.randn(2, *segment.input_shape)
        assert torch.allclose(fold_segment(segment)(x.clone()), segment.module(x.clone()), rtol=1e-3, atol=1e-3)
    backbone.verify()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("resnet18", 0), ("mobilenetv2_100", 0), ("res2net50_26w_4s", 0)])
def test_the_blocks_of_common_networks_have_no_norms_left(name: str, left: int) -> None:
    for block in make_timm(name, 32).chain.blocks:
        assert norms(block.module) > 0
        assert norms(fold_segment(block)) == left


def test_a_segment_without_norms_is_left_as_it_is(tiny: Backbone) -> None:
    segment = tiny.chain[-1]
    x = torch.randn(2, *segment.input_shape)
    assert close(fold_segment(segment)(x), segment.module(x))


def test_a_folded_segment_passes_gradients_and_takes_none() -> None:
    block = make_tiny().chain.blocks[0]
    x = torch.randn(2, *block.input_shape, requires_grad=True)
    fold_segment(block)(x).sum().backward()
    expected = torch.autograd.grad(block.module(x).sum(), x)[0]
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, atol=1e-4)


class BesideItsNorm(torch.nn.Module):
    """A convolution, and a norm that is defined after it but reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.norm(x)


class ReadTwice(BesideItsNorm):
    """A convolution that more than its norm reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x + self.norm(x)


@pytest.mark.parametrize("kind", [BesideItsNorm, ReadTwice])
def test_a_norm_that_does_not_alone_read_the_convolution_before_it_is_not_folded(kind: type[torch.nn.Module]) -> None:
    block = replace(make_tiny().chain.blocks[0], module=kind().eval(), input_shape=(4, 8, 8))
    assert norms(fold_segment(block)) == 1  # though a fresh norm changes nothing, so that outputs would not tell

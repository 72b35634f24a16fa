"""Modules around others, which networks use as if they were these."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.methods.scale_bias import ChannelAffine
from modelpatch.methods.ssf import SSF
from modelpatch.patch.folding import fold
from tolerance import close


class Padded(nn.Module):
    """A block that pads by its convolution's kernel size, as DaViT's embedding does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv.kernel_size[0] // 2
        return x + self.norm(self.conv(nn.functional.pad(x, (side, side, side, side))))


def test_a_wrapped_layer_has_the_attributes_of_the_layer_and_nothing_to_compute_with() -> None:
    wrapped = ChannelAffine(nn.Conv2d(2, 3, 3, stride=2))
    for one in (wrapped, copy.deepcopy(wrapped)):
        assert one.kernel_size == (3, 3)
        assert one.stride == (2, 2)
        assert one.weight.shape == (3, 2, 3, 3)
        assert one.weight.isnan().all()
        with pytest.raises(AttributeError, match="color"):
            _ = one.color


def test_a_network_that_reads_attributes_of_its_layers_is_patched_and_folds() -> None:
    parts = nn.Conv2d(3, 4, 4, 4), Padded(), Padded(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    backbone = load_backbone(nn.Sequential(*parts), preprocessing=Preprocessing(input_size=(3, 16, 16)))
    model = SSF().draft(backbone, 2)
    with torch.no_grad():
        for name, tensor in model.trainable():
            tensor.add_(0.1 * len(name))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.eval()(x)
        assert close(fold(model)(x), before)

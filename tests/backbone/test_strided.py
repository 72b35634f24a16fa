"""Strided 1x1 convolutions of few channels get their input channel by channel while they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import small_preprocessing
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.strided import is_fragile, lay_strided
from modelpatch.methods.full_finetune import FullFinetune
from tolerance import close


@pytest.mark.parametrize(
    ("layer", "fragile"),
    [
        (nn.Conv2d(3, 8, 1, 2), True),
        (nn.Conv2d(32, 8, 1, 2, groups=4), True),
        (nn.Conv2d(3, 8, 1), False),
        (nn.Conv2d(3, 8, 3, 2, 1), False),
        (nn.Conv2d(16, 8, 1, 2), False),
    ],
    ids=str,
)
def test_layers_that_crash_are_known(layer: nn.Conv2d, fragile: bool) -> None:
    assert is_fragile(layer) is fragile


def test_gradients_of_a_channels_last_batch_are_right() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 48, 1, 2, bias=False)
    lay_strided(layer)
    x = torch.randn(8, 8, 112, 112).contiguous(memory_format=torch.channels_last)  # ends the process without the hook
    layer(x).sum().backward()
    expected = x[..., ::2, ::2].sum((0, 2, 3)).expand(48, 8)
    assert layer.weight.grad is not None
    assert close(layer.weight.grad[..., 0, 0], expected)


def test_models_that_train_such_layers_lay_their_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = FullFinetune().draft(load_backbone(net, preprocessing=small_preprocessing()), 3)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [len(layer._forward_pre_hooks) for layer in convolutions] == [1]
    assert not any(layer._forward_pre_hooks for layer in net.modules())

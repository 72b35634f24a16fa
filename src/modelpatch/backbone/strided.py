"""A way round a crash of PyTorch's convolutions on some processors.

The weight gradient of a strided 1x1 convolution of fewer than 16 channels ends the process where its input lies pixel by
pixel (`channels_last`), as training lays it: in the stems of RepVGG, MobileOne and FastViT, for example. Its input is laid
channel by channel while gradients are computed, and stays as it is at inference.
"""

from typing import Any

import torch
from torch import Tensor, nn

FEW = 16  # channels from which the kernels are sound


def lay_strided(module: nn.Module) -> None:
    """Register a hook on every convolution below `module` that would crash."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and is_fragile(layer):
            layer.register_forward_pre_hook(_lay)


def is_fragile(layer: nn.Conv2d) -> bool:
    """True for a strided 1x1 convolution of few channels."""
    return set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels // layer.groups < FEW


def _lay(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = inputs[0]
    if not torch.is_grad_enabled() or not isinstance(x, Tensor) or x.device.type != "cpu":
        return None
    return (x.contiguous(), *inputs[1:])

"""Layers that several decoders have. They are normalised in groups, which needs no batch statistics."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def conv_layer(inputs: int, outputs: int, size: int = 1) -> nn.Sequential:
    """A convolution of odd `size` that keeps the map's side, a group norm and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, group_norm(outputs), nn.ReLU(inplace=True))


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation in up to 16 groups of channels."""
    return nn.GroupNorm(math.gcd(channels, 16), channels)


def to_pixels(scores: Tensor, stride: int) -> Tensor:
    """Scores enlarged to pixels: bilinear and fixed, like the last layer of an FCN."""
    if stride == 1:
        return scores
    return F.interpolate(scores, scale_factor=float(stride), mode="bilinear", align_corners=False)

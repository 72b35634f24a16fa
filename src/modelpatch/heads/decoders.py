"""Decoders for segmentation: maps of the chain's inner segments to logits for every pixel.

    FCN         score the coarsest map with a 1x1 convolution; double it by a learned deconvolution and add the next finer
                map's scores, as long as there are any; enlarge to pixels (one map is FCN-32s, two are FCN-16s)
    DeepLab     [1x1, three dilated 3x3, image mean] of all maps but the finest -> 1x1; beside it the finest map, reduced;
                3x3 -> 1x1; enlarge to pixels

Long, Shelhamer and Darrell: *Fully Convolutional Networks for Semantic Segmentation* (CVPR 2015), section 4, as Piggyback uses
it (section 4.4). Chen et al.: *Encoder-Decoder with Atrous Separable Convolution* (ECCV 2018), sections 3.1 and 3.2. The
frozen backbone keeps its strides: where the paper dilates it to stride 16, maps of strides 16 and 32 are read side by side.
Layers are normalised in groups, which needs no batch statistics.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.heads.base import Decoder, HeadRecord, register_decoder

RATES = (3, 6, 9)  # of the dilated convolutions: the paper's 6, 12, 18 are for maps twice as large
REDUCED = 48  # channels of the finest map, section 4.1


@register_decoder("fcn")
class FCNHead(Decoder):
    """Logits (B, K, H, W) from one or several maps."""

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        self.scores = nn.ModuleList(nn.Conv2d(width, record.outputs, 1) for width in record.widths)
        self.enlarge = nn.ModuleList(_bilinear(record.outputs) for _ in record.taps[1:])

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        *finer, scores = [score(x) for score, x in zip(self.scores, maps, strict=True)]
        for enlarge, other in zip(self.enlarge, reversed(finer), strict=True):
            scores = enlarge(scores)
            if scores.shape[2:] != other.shape[2:]:  # maps that are not half as large
                scores = F.interpolate(scores, other.shape[2:], mode="bilinear", align_corners=False)
            scores = scores + other
        return _to_pixels(scores, self.record.strides[0])


@register_decoder("deeplab")
class DeepLabHead(Decoder):
    """Logits (B, K, H, W) from one map, or from a fine one and one or several coarse ones."""

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        hidden = record.hidden
        coarse = sum(record.widths[1:] or record.widths)
        self.branches = nn.ModuleList([_layer(coarse, hidden), *(_dilated(coarse, hidden, rate) for rate in RATES)])
        self.mean = _layer(coarse, hidden)
        self.project = _layer(hidden * (len(RATES) + 2), hidden)
        self.reduce = _layer(record.widths[0], REDUCED) if len(record.widths) > 1 else None
        self.refine = _dilated(hidden + (REDUCED if self.reduce is not None else 0), hidden, 1)
        self.score = nn.Conv2d(hidden, record.outputs, 1)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        coarse = maps[1:] or maps
        size = coarse[0].shape[2:]
        x = torch.cat([coarse[0], *(_resize(other, size) for other in coarse[1:])], 1)
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *size)
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))
        if self.reduce is not None:
            x = torch.cat([_resize(x, maps[0].shape[2:]), self.reduce(maps[0])], 1)
        return _to_pixels(self.score(self.refine(x)), self.record.strides[0])


def _layer(inputs: int, outputs: int, size: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, group_norm(outputs), nn.ReLU(inplace=True))


def _dilated(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    """A depthwise 3x3 convolution with gaps of `rate`, then a 1x1 convolution."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False)
    return nn.Sequential(depthwise, *_layer(inputs, outputs))


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalises in up to 16 groups of channels, without batch statistics."""
    return nn.GroupNorm(math.gcd(channels, 16), channels)


def _bilinear(channels: int) -> nn.ConvTranspose2d:
    """A deconvolution that doubles a map, started as bilinear interpolation (FCN, section 3.3)."""
    layer = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None] * torch.outer(line, line))
    return layer


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _to_pixels(scores: Tensor, stride: int) -> Tensor:
    """Bilinear, fixed, as the last layer of an FCN is."""
    return (
        F.interpolate(scores, scale_factor=float(stride), mode="bilinear", align_corners=False)
        if stride > 1
        else scores
    )

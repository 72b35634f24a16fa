"""DeepLab v3+: dilated convolutions over the coarse maps beside the finest one.

    [1x1, three dilated 3x3, image mean] of all maps but the finest -> 1x1; beside it the finest map, reduced; 3x3 -> 1x1

Chen et al.: *Encoder-Decoder with Atrous Separable Convolution* (ECCV 2018), sections 3.1 and 3.2. The frozen backbone keeps
its strides: where the paper dilates it to stride 16, maps of strides 16 and 32 are read side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.heads.base import MAPS, Decoder, HeadRecord, register_head
from modelpatch.heads.layers import conv_layer, to_pixels

RATES = (3, 6, 9)  # of the dilated convolutions: the paper's 6, 12, 18 are for maps twice as large
REDUCED = 48  # channels of the finest map, section 4.1


@register_head("deeplab")
class DeepLabHead(Decoder):
    """Logits (B, K, H, W) from one map, or from a fine one and one or several coarse ones."""

    takes = MAPS | {"hidden"}

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        hidden = record.hidden
        coarse = sum(record.widths[1:] or record.widths)
        self.branches = nn.ModuleList([conv_layer(coarse, hidden), *(_dilated(coarse, hidden, rate) for rate in RATES)])
        self.mean = conv_layer(coarse, hidden)
        self.project = conv_layer(hidden * (len(RATES) + 2), hidden)
        self.reduce = conv_layer(record.widths[0], REDUCED) if len(record.widths) > 1 else None
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
        return to_pixels(self.score(self.refine(x)), self.record.strides[0])


def _dilated(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    """A depthwise 3x3 convolution with gaps of `rate`, then a 1x1 convolution."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False)
    return nn.Sequential(depthwise, *conv_layer(inputs, outputs))


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)

"""Decoders that answer a class for every pixel. The frozen backbone keeps its strides.

    fcn        score the coarsest map, double the scores by a learned deconvolution and add the next finer map's
    deeplab    [1x1, three dilated 3x3, image mean] of all maps but the finest -> 1x1; the finest beside it; 3x3 -> 1x1

Long, Shelhamer and Darrell: *Fully Convolutional Networks for Semantic Segmentation* (CVPR 2015), section 4, as Piggyback uses
it (section 4.4): one map is FCN-32s, two are FCN-16s. Chen et al.: *Encoder-Decoder with Atrous Separable Convolution* (ECCV
2018), sections 3.1 and 3.2: where it dilates the backbone to stride 16, maps of strides 16 and 32 are read side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.heads.base import MAPS, Decoder, HeadRecord, group_norm, register_head

RATES = (3, 6, 9)  # of the dilated convolutions: the paper's 6, 12, 18 are for maps twice as large
REDUCED = 48  # channels of the finest map, section 4.1


@register_head("fcn")
class FCNHead(Decoder):
    """Logits (B, K, H, W) from one or several maps."""

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        self.scores = nn.ModuleList(nn.Conv2d(width, record.outputs, 1) for width in record.widths)
        self.enlarge = nn.ModuleList(_bilinear(record.outputs) for _ in record.taps[1:])

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        *finer, scores = [score(x) for score, x in zip(self.scores, maps, strict=True)]
        for enlarge, other in zip(self.enlarge, reversed(finer), strict=True):
            scores = resize(enlarge(scores), other.shape[2:]) + other  # maps that are not half as large
        return to_pixels(scores, self.record.strides[0])


def _bilinear(channels: int) -> nn.ConvTranspose2d:
    """A deconvolution that doubles a map, started as bilinear interpolation (FCN, section 3.3)."""
    layer = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None] * torch.outer(line, line))
    return layer


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
        x = torch.cat([coarse[0], *(resize(other, size) for other in coarse[1:])], 1)
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *size)
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))
        if self.reduce is not None:
            x = torch.cat([resize(x, maps[0].shape[2:]), self.reduce(maps[0])], 1)
        return to_pixels(self.score(self.refine(x)), self.record.strides[0])


def conv_layer(inputs: int, outputs: int) -> nn.Sequential:
    """A 1x1 convolution, a group norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), group_norm(outputs), nn.ReLU(inplace=True))


def _dilated(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    """A depthwise 3x3 convolution with gaps of `rate`, then a 1x1 convolution."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False)
    return nn.Sequential(depthwise, *conv_layer(inputs, outputs))


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """A map of another height and width, by bilinear interpolation."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def to_pixels(scores: Tensor, stride: int) -> Tensor:
    """Scores enlarged to pixels: bilinear and fixed, like the last layer of an FCN."""
    if stride == 1:
        return scores
    return F.interpolate(scores, scale_factor=float(stride), mode="bilinear", align_corners=False)

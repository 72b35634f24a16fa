"""FCN: score the coarsest map, double the scores by a learned deconvolution and add the next finer map's.

One map is FCN-32s, two are FCN-16s. Long, Shelhamer and Darrell: *Fully Convolutional Networks for Semantic Segmentation*
(CVPR 2015), section 4, as Piggyback uses it (section 4.4). The frozen backbone keeps its strides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.heads.base import Decoder, HeadRecord, register_head
from modelpatch.heads.layers import to_pixels


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
            scores = enlarge(scores)
            if scores.shape[2:] != other.shape[2:]:  # maps that are not half as large
                scores = F.interpolate(scores, other.shape[2:], mode="bilinear", align_corners=False)
            scores = scores + other
        return to_pixels(scores, self.record.strides[0])


def _bilinear(channels: int) -> nn.ConvTranspose2d:
    """A deconvolution that doubles a map, started as bilinear interpolation (FCN, section 3.3)."""
    layer = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None] * torch.outer(line, line))
    return layer

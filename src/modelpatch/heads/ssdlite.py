"""SSDlite: depthwise separable layers over the maps, and over three coarser ones made of the last.

Liu et al.: *SSD* (ECCV 2016); Sandler et al.: *MobileNetV2* (CVPR 2018), section 6.2. Layers are narrower than the papers',
since they are part of every patch, and normalised in groups, which needs no batch statistics.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd, ssdlite
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.ops import box_iou

from modelpatch.heads.base import HeadRecord, register_head
from modelpatch.heads.detector import BOXES, Detector, Targets, count_background, pack
from modelpatch.heads.layers import group_norm

EXTRA = 3  # maps that are added


@register_head("ssdlite")
class SSDLiteHead(Detector):
    """Depthwise separable layers over the maps and three coarser ones."""

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        widths = [*record.widths, *[record.hidden] * EXTRA]
        pairs = zip(widths[len(record.widths) - 1 : -1], widths[len(record.widths) :], strict=True)
        self.extra = nn.ModuleList(_halve(inputs, outputs) for inputs, outputs in pairs)
        anchors = DefaultBoxGenerator([[2, 3] for _ in widths], min_ratio=0.15, max_ratio=0.95)
        head = ssdlite.SSDLiteHead(widths, anchors.num_anchors_per_location(), record.outputs + 1, group_norm)
        self.ssd = ssd.SSD(
            nn.Identity(),
            anchors,
            (1, 1),  # read by its own transform alone, which does not run
            record.outputs + 1,
            head=head,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=BOXES,
            topk_candidates=300,
        )

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        outputs, anchors, sizes = self._outputs(maps)
        return pack(self.ssd.postprocess_detections(outputs, anchors, sizes))

    def losses(self, maps: tuple[Tensor, ...], targets: Targets) -> Tensor:
        outputs, anchors, _ = self._outputs(maps)
        asked, matched = count_background(targets), []
        for own, target in zip(anchors, asked, strict=True):
            none = torch.full((len(own),), -1, dtype=torch.int64, device=own.device)
            boxes = target["boxes"]
            matched.append(self.ssd.proposal_matcher(box_iou(boxes, own)) if len(boxes) else none)
        losses = self.ssd.compute_loss(asked, outputs, anchors, matched)
        return torch.stack(list(losses.values())).sum()

    def _outputs(self, maps: tuple[Tensor, ...]) -> tuple[Any, Any, list[tuple[int, int]]]:
        levels = list(maps)
        for layer in self.extra:
            levels.append(layer(levels[-1]))
        images, sizes = self.frame(maps)
        return self.ssd.head(levels), self.ssd.anchor_generator(images, levels), sizes


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    """A map of half the side."""
    narrow = nn.Conv2d(inputs, outputs, 1, bias=False)
    depthwise = nn.Conv2d(outputs, outputs, 3, 2, 1, groups=outputs, bias=False)
    mix = nn.Conv2d(outputs, outputs, 1, bias=False)
    layers = [(conv, group_norm(outputs), nn.ReLU6(inplace=True)) for conv in (narrow, depthwise, mix)]
    return nn.Sequential(*itertools.chain(*layers))

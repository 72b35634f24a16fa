"""Faster R-CNN: maps -> feature pyramid -> proposals -> a class and a finer box for each.

Ren et al.: *Faster R-CNN* (NeurIPS 2015); Lin et al.: *Feature Pyramid Networks* (CVPR 2017). Layers are narrower than the
papers', since they are part of every patch.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from modelpatch.heads.base import HeadRecord, register_head
from modelpatch.heads.detector import BOXES, Detector, Targets, count_background, pack

ANCHOR = 8  # the side of an anchor over its map's stride


@register_head("faster-rcnn")
class FasterRCNNHead(Detector):
    """A feature pyramid, a region proposal network and box heads."""

    def __init__(self, record: HeadRecord) -> None:
        super().__init__(record)
        hidden, names = record.hidden, [str(place) for place in range(len(record.taps))]
        self.pyramid = FeaturePyramidNetwork(list(record.widths), hidden, extra_blocks=LastLevelMaxPool())
        sides = [ANCHOR * stride for stride in (*record.strides, 2 * record.strides[-1])]
        anchors = AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides))
        self.proposals = RegionProposalNetwork(
            anchors,
            RPNHead(hidden, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=128,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 1000, "testing": 500},
            post_nms_top_n={"training": 500, "testing": 300},
            nms_thresh=0.7,
        )
        self.regions = RoIHeads(
            MultiScaleRoIAlign(names, 7, 2),
            TwoMLPHead(hidden * 49, 2 * hidden),
            FastRCNNPredictor(2 * hidden, record.outputs + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=128,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=BOXES,
        )

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        pyramid, (images, sizes) = self._pyramid(maps), self.frame(maps)
        proposals, _ = self.proposals(images, pyramid)
        found, _ = self.regions(pyramid, proposals, sizes)
        return pack(found)

    def losses(self, maps: tuple[Tensor, ...], targets: Targets) -> Tensor:
        pyramid, (images, sizes) = self._pyramid(maps), self.frame(maps)
        asked = count_background(targets)
        proposals, first = self.proposals(images, pyramid, asked)
        _, second = self.regions(pyramid, proposals, sizes, asked)
        return torch.stack([*first.values(), *second.values()]).sum()

    def _pyramid(self, maps: tuple[Tensor, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.pyramid(OrderedDict((str(place), x) for place, x in enumerate(maps)))
        return found

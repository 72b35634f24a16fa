"""Detectors: decoders that answer boxes, through torchvision's layers and losses.

    faster-rcnn    maps -> feature pyramid -> proposals -> a class and a finer box for each
    ssdlite        depthwise separable layers over the maps, and over three coarser ones made of the last

Ren et al.: *Faster R-CNN* (NeurIPS 2015); Lin et al.: *Feature Pyramid Networks* (CVPR 2017); Liu et al.: *SSD* (ECCV 2016);
Sandler et al.: *MobileNetV2* (CVPR 2018), section 6.2. Layers are narrower than the papers', as part of every patch.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd, ssdlite
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import Conv2dNormActivation

from modelpatch.heads.base import MAPS, Decoder, HeadRecord, group_norm, register_head

BOXES = 100  # of an answer
ANCHOR = 8  # the side of an anchor of Faster R-CNN over its map's stride
EXTRA = 3  # maps that SSDlite adds
Targets = Sequence[dict[str, Tensor]]  # of each image "boxes" (N, 4) in pixels and "labels" (N,), from 0 on


class Detector(Decoder):
    """A decoder that gives boxes (B, `BOXES`, 6), best first, then zeros: left, top, right, bottom in pixels, score, class."""

    takes = MAPS | {"hidden"}

    @abstractmethod
    def detect(self, maps: tuple[Tensor, ...], targets: Any = None) -> tuple[Any, dict[str, Tensor]]:
        """torchvision's boxes of every image, or in train mode the losses for targets whose class 0 is the background."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return pack(self.detect(maps)[0])

    def losses(self, maps: tuple[Tensor, ...], targets: Targets) -> Tensor:
        """The sum of the detector's losses, in train mode."""
        asked = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]
        return torch.stack(list(self.detect(maps, asked)[1].values())).sum()

    def frame(self, maps: tuple[Tensor, ...]) -> tuple[Any, list[tuple[int, int]]]:
        """The images' sizes as torchvision's layers take them; the images themselves are not needed."""
        height, width = (side * self.record.strides[0] for side in maps[0].shape[2:])
        sizes = [(height, width)] * len(maps[0])
        return ImageList(torch.empty(len(sizes), 3, height, width, device="meta"), sizes), sizes


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

    def detect(self, maps: tuple[Tensor, ...], targets: Any = None) -> tuple[Any, dict[str, Tensor]]:
        images, sizes = self.frame(maps)
        pyramid = self.pyramid({str(place): x for place, x in enumerate(maps)})
        proposals, first = self.proposals(images, pyramid, targets)
        found, second = self.regions(pyramid, proposals, sizes, targets)
        return found, {**first, **second}


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

    def detect(self, maps: tuple[Tensor, ...], targets: Any = None) -> tuple[Any, dict[str, Tensor]]:
        levels = list(maps)
        for layer in self.extra:
            levels.append(layer(levels[-1]))
        images, sizes = self.frame(maps)
        outputs, anchors = self.ssd.head(levels), self.ssd.anchor_generator(images, levels)
        if targets is None:
            return self.ssd.postprocess_detections(outputs, anchors, sizes), {}
        matched = []
        for own, target in zip(anchors, targets, strict=True):
            boxes, none = target["boxes"], torch.full((len(own),), -1, device=own.device)
            matched.append(self.ssd.proposal_matcher(box_iou(boxes, own)) if len(boxes) else none)
        return [], self.ssd.compute_loss(targets, outputs, anchors, matched)


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    """A map of half the side."""
    layer = partial(Conv2dNormActivation, norm_layer=group_norm, activation_layer=nn.ReLU6)
    narrow, halve = layer(inputs, outputs, 1), layer(outputs, outputs, 3, 2, groups=outputs)
    return nn.Sequential(*narrow, *halve, *layer(outputs, outputs, 1))


def pack(found: Sequence[dict[str, Tensor]]) -> Tensor:
    """torchvision's boxes of every image as one tensor (B, `BOXES`, 6); its classes begin with the background."""
    answers = found[0]["boxes"].new_zeros(len(found), BOXES, 6)
    for answer, one in zip(answers, found, strict=True):
        order = one["scores"].argsort(descending=True, stable=True)[:BOXES]
        columns = one["boxes"][order], one["scores"][order, None], one["labels"][order, None] - 1
        answer[: len(order)] = torch.cat([column.to(answer) for column in columns], 1)
    return answers


def unpack(answer: Tensor, least: float = 0.0) -> dict[str, Tensor]:
    """The boxes (N, 4), scores (N,) and labels (N,) int64 in one image's answer (`BOXES`, 6) with scores above `least`."""
    kept = answer[answer[:, 4] > least]
    return {"boxes": kept[:, :4], "scores": kept[:, 4], "labels": kept[:, 5].long()}

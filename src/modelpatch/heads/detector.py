"""Detectors: decoders that answer boxes, through torchvision's layers and losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelpatch.heads.base import MAPS, Decoder

BOXES = 100  # of an answer
Targets = Sequence[dict[str, Tensor]]  # of each image "boxes" (N, 4) in pixels and "labels" (N,), from 0 on


class Detector(Decoder):
    """A decoder that gives boxes (B, `BOXES`, 6): left, top, right, bottom in pixels, score and class.

    The boxes with the highest scores come first; rows of zeros are no boxes.
    """

    takes = MAPS | {"hidden"}

    @abstractmethod
    def losses(self, maps: tuple[Tensor, ...], targets: Targets) -> Tensor:
        """The sum of the detector's losses, in train mode."""

    def frame(self, maps: tuple[Tensor, ...]) -> tuple[Any, list[tuple[int, int]]]:
        """The images' sizes as torchvision's layers take them; the images themselves are not needed."""
        from torchvision.models.detection.image_list import ImageList

        height, width = (side * self.record.strides[0] for side in maps[0].shape[2:])
        sizes = [(height, width)] * len(maps[0])
        return ImageList(torch.empty(len(sizes), 3, height, width, device="meta"), sizes), sizes


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


def count_background(targets: Targets) -> list[dict[str, Tensor]]:
    """Targets with the background as class 0, as torchvision counts."""
    return [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]

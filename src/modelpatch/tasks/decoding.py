"""Which inner outputs of a chain a decoder reads, and the decoder itself for a backbone and a task.

A segment's output is a map where it has positions; its stride is the image's side over the map's. Of the segments of one
stride the last is read, unless segments are named:

    fcn32     the coarsest map                                     (FCN, section 4.2)
    fcn16     the two coarsest
    deeplab   the finest of stride 4 or more, within 1/8 of the coarsest's, and all within 1/2 of it

    faster-rcnn   all of stride 4 or more, within 1/8 of the coarsest's     (FPN, section 4)
    ssdlite       the two coarsest                                          (MobileNetV2, section 6.2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import TrainingError
from modelpatch.heads.base import Decoder, HeadRecord, as_map, pooled_axes
from modelpatch.tasks.record import TaskRecord

DecoderName = Literal["deeplab", "fcn32", "fcn16", "faster-rcnn", "ssdlite"]
DECODERS: dict[str, tuple[DecoderName, ...]] = {
    "classification": (),
    "segmentation": ("deeplab", "fcn32", "fcn16"),
    "detection": ("faster-rcnn", "ssdlite"),
}  # by kind of task, the default first
FINEST = 4  # the stride of the finest map, unless all are finer
HIDDEN = 64  # channels of a decoder's own layers: a fourth of the papers', for a patch is small


@dataclass(frozen=True)
class Map:
    """The output of a segment as a map: channels, and the pixels between two positions."""

    segment: int
    width: int
    stride: int


def make_decoder(
    backbone: Backbone, task: TaskRecord, pixels: int, name: DecoderName | None, taps: Sequence[str] = ()
) -> Decoder | None:
    """A fresh decoder for images of `pixels` x `pixels`, by default what suits the task; None for classes of whole images.

    Raises `TrainingError` for a decoder of another kind of task, and for segments that give no maps.
    """
    known = DECODERS[task.kind]
    if not known:
        if name is not None or taps:
            raise TrainingError(f"decoder={name!r} and taps are for dense tasks; {task.name} is a {task.kind} task.")
        return None
    name = name or known[0]
    if name not in known:
        raise TrainingError(f"decoder={name!r} is none for {task.kind}. Expected one of: {', '.join(known)}.")
    maps = find_maps(backbone, pixels)
    chosen = _named(backbone, maps, taps) if taps else _choose(maps, name)
    if not chosen:
        raise TrainingError(
            f"no segment of {backbone.spec} gives a map whose side divides {pixels} px. Choose another image_size."
        )
    record = HeadRecord(
        kind="fcn" if name in ("fcn32", "fcn16") else name,  # type: ignore[arg-type]
        features=sum(one.width for one in chosen),
        outputs=len(task.classes),
        taps=tuple(one.segment for one in chosen),
        widths=tuple(one.width for one in chosen),
        strides=tuple(one.stride for one in chosen),
        hidden=0 if name in ("fcn32", "fcn16") else HIDDEN,
    )
    head = record.build()
    assert isinstance(head, Decoder)
    return head


@torch.no_grad()
def find_maps(backbone: Backbone, pixels: int) -> list[Map]:
    """Every segment's output that is a map of more than one position, for images of this size."""
    chain = backbone.chain
    x = torch.zeros(1, 3, pixels, pixels, device=backbone.device)
    found = []
    for segment in chain:
        x = segment.module(x)
        axes = pooled_axes(chain, segment.index)
        if not axes or isinstance(segment.module, nn.AdaptiveAvgPool2d):  # which gives one size whatever the image's
            continue
        shape: Any = as_map(x, axes).shape
        if shape[2] == shape[3] > 1 and pixels % shape[2] == 0:
            found.append(Map(segment.index, shape[1], pixels // shape[2]))
    return found


def _choose(maps: Sequence[Map], decoder: str) -> list[Map]:
    """Of each stride the last map, without those behind a coarser one; of these what the decoder reads."""
    lasts: list[Map] = []
    for one in sorted({one.stride: one for one in maps}.values(), key=lambda one: -one.stride):
        if not lasts or one.segment < lasts[0].segment:
            lasts.insert(0, one)
    if not lasts:
        return []
    coarsest = lasts[-1].stride
    if decoder == "fcn32":
        return lasts[-1:]
    if decoder in ("fcn16", "ssdlite"):
        return lasts[-2:]
    fine = [one for one in lasts if 8 * one.stride >= coarsest and one.stride >= min(FINEST, coarsest // 2)]
    if decoder == "faster-rcnn":
        return fine
    return [fine[0], *(one for one in fine[1:] if 2 * one.stride >= coarsest)]


def _named(backbone: Backbone, maps: Sequence[Map], names: Sequence[str]) -> list[Map]:
    """The maps of the segments that are called so. Raises `TrainingError` for others."""
    known = {backbone.chain[one.segment].name: one for one in maps}
    if unknown := [name for name in names if name not in known]:
        raise TrainingError(
            f"no segment called {unknown[0]!r} gives a map. {backbone.spec} has: {', '.join(known) or 'none'}."
        )
    chosen = sorted({known[name].segment: known[name] for name in names}.values(), key=lambda one: one.segment)
    if [one.stride for one in chosen] != sorted(one.stride for one in chosen):
        raise TrainingError(f"the maps of {', '.join(names)} do not get coarser one after another. Name others.")
    return chosen

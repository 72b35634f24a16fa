"""Decoders of dense kinds: the inner outputs of a chain that they read, and a fresh one for a backbone.

A segment's output is a map where it has positions; its stride is the image's side over the map's. Of the segments of one
stride the last is read, unless segments are named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import TrainingError
from modelpatch.heads.base import Decoder, HeadRecord
from modelpatch.heads.reading import as_map, pooled_axes

FINEST = 4  # stride of the finest map, unless all are finer
HIDDEN = 64  # channels of a decoder's own layers: a fourth of the papers', since they are part of each patch


class FeatureMap(NamedTuple):
    """The output of a segment as a map: channels, and the pixels between two positions."""

    segment: int
    width: int
    stride: int


Choice = Callable[[Sequence[FeatureMap]], Sequence[FeatureMap]]


@dataclass(frozen=True)
class Decoding:
    """A decoder that a setting may name: the kind of its head, the maps it reads, and the channels of its own layers."""

    head: str
    choose: Choice
    hidden: int = HIDDEN


def coarsest(count: int) -> Choice:
    """Choose the coarsest maps."""
    return lambda maps: maps[-count:]


def fine(maps: Sequence[FeatureMap]) -> Sequence[FeatureMap]:
    """Choose all maps of stride 4 or more, within 1/8 of the coarsest's."""
    last = maps[-1].stride
    return [one for one in maps if 8 * one.stride >= last and one.stride >= min(FINEST, last // 2)]


def fine_and_coarse(maps: Sequence[FeatureMap]) -> Sequence[FeatureMap]:
    """Choose the first of the `fine` maps, and those within 1/2 of the coarsest."""
    first, *others = fine(maps)
    return [first, *(one for one in others if 2 * one.stride >= maps[-1].stride)]


def make_decoder(
    backbone: Backbone, classes: int, pixels: int, decoding: Decoding, taps: Sequence[str] = ()
) -> Decoder:
    """A fresh decoder for images of `pixels` x `pixels`. Raises `TrainingError` for segments that give no maps."""
    maps = find_maps(backbone, pixels)
    chosen = _named(backbone, maps, taps) if taps else _choose(maps, decoding.choose)
    if not chosen:
        raise TrainingError(
            f"no segment of {backbone.spec} gives a map whose side divides {pixels} px. Choose another image_size."
        )
    segments, widths, strides = zip(*chosen, strict=True)
    own: dict[str, Any] = {"taps": segments, "widths": widths, "strides": strides, "hidden": decoding.hidden}
    head = HeadRecord(kind=decoding.head, features=sum(widths), outputs=classes, **own).build()
    assert isinstance(head, Decoder)
    return head


@torch.no_grad()
def find_maps(backbone: Backbone, pixels: int) -> list[FeatureMap]:
    """Every segment's output that is a map of more than one position, for images of this size."""
    chain = backbone.chain
    x = torch.zeros(1, backbone.input_size[0], pixels, pixels, device=backbone.device)
    chain.prepare(x)
    found = []
    for segment in chain:
        x = segment.module(x)
        axes = pooled_axes(chain, segment.index)
        if not axes or isinstance(segment.module, nn.AdaptiveAvgPool2d):  # which gives one size whatever the image's
            continue
        shape: Any = as_map(x, axes).shape
        if shape[2] == shape[3] > 1 and pixels % shape[2] == 0:
            found.append(FeatureMap(segment.index, shape[1], pixels // shape[2]))
    return found


def _choose(maps: Sequence[FeatureMap], choose: Choice) -> Sequence[FeatureMap]:
    """Choose among the last map of each stride, without those behind a coarser one."""
    lasts: list[FeatureMap] = []
    for one in sorted({one.stride: one for one in maps}.values(), key=lambda one: -one.stride):
        if not lasts or one.segment < lasts[0].segment:
            lasts.insert(0, one)
    return choose(lasts) if lasts else []


def _named(backbone: Backbone, maps: Sequence[FeatureMap], names: Sequence[str]) -> list[FeatureMap]:
    """The maps of the segments with these names. Raises `TrainingError` for others."""
    known = {backbone.chain[one.segment].name: one for one in maps}
    if unknown := [name for name in names if name not in known]:
        raise TrainingError(
            f"no segment called {unknown[0]!r} gives a map. {backbone.spec} has: {', '.join(known) or 'none'}."
        )
    chosen = sorted({known[name].segment: known[name] for name in names}.values(), key=lambda one: one.segment)
    if [one.stride for one in chosen] != sorted(one.stride for one in chosen):
        raise TrainingError(f"the maps of {', '.join(names)} do not get coarser one after another. Name others.")
    return chosen

"""The frozen prefix, computed once.

Everything before a patch's first span is frozen and deterministic, so its output for an image never changes. The cache
holds that output for every image, in memory up to a budget and in a temporary file beyond it. With augmentation a
stated number of augmented views of every image is cached, and epoch k trains on view k modulo that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import CACHE, FrozenBackbone, Tuning
from modelpatch.data.augmentation import Augmentation
from modelpatch.data.images import ImageBatch, Images, allocate, pieces
from modelpatch.patch.model import PatchedModel

BATCH = 64
FOLDING = 1000  # images
Prefix = Callable[[Tensor, int], Tensor]  # images and an end to the output of segments [0, end)
WORTHWHILE = 0.1


class PlainInputs:
    """Images without a cache: augmented anew in every epoch."""

    start = 0

    def __init__(self, store: Images, augmentation: Augmentation, seed: int) -> None:
        self.store, self.augmentation, self.seed = store, augmentation, seed

    def batches(self, rows: Sequence[Tensor], epoch: int, first: int = 0) -> Iterator[ImageBatch]:
        """Inputs of segment `start` and targets for the rows of every batch from number `first` on, read ahead."""
        return self.store.batches(rows, self.augmentation, self.seed, epoch, first)


class CachedInputs:
    """Activations (V, N, ...) before segment `start` of V views of N images, and their labels (V, N).

    Epoch k trains on view k modulo V. `rows` are those of the images that count, all by default.
    """

    def __init__(self, start: int, values: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        self.start, self.values, self.labels, self.rows = start, values, labels, rows

    def batches(self, rows: Sequence[Tensor], epoch: int, first: int = 0) -> Iterator[ImageBatch]:
        """Inputs of segment `start` and class indices for the rows of every batch from number `first` on."""
        view = epoch % len(self.values)
        for batch in rows[first:]:
            own = batch if self.rows is None else self.rows[batch]
            yield ImageBatch(self.values[view, own], self.labels[view, own])


def cache_prefix(
    prefix: Prefix,
    images: Images,
    start: int,
    augmentation: Augmentation,
    views: int,
    seed: int,
    memory: int,
    advance: Callable[[int], None] = lambda _: None,
) -> CachedInputs:
    """Compute the output of segments `[0, start)` for `views` views of every image, one without augmentation.

    Images are read once and not kept.
    """
    views = views if augmentation.name != "none" or images.split.changes else 1
    values, labels = None, torch.zeros((views, len(images)), dtype=torch.int64)  # a stream's order differs by view
    for view, rows, (pixels, own) in images.views(views, augmentation, seed):
        outputs = prefix(pixels, start)
        if values is None:
            values = allocate((views, len(images), *outputs.shape[1:]), torch.float32, memory)
        values[view, rows], labels[view, rows] = outputs.cpu(), own
        advance(len(rows))
    assert values is not None, "a split holds images"
    return CachedInputs(start, values, labels)


def make_prefix(backbone: Backbone, model: PatchedModel, images: int) -> Prefix:
    """A function that computes the frozen prefix, through folded copies of the segments for a large number of images.

    Folded segments agree with the model's to rounding and take less time; making them takes as long as some hundred images.
    A head that reads inner segments needs the model's own, which keep what they pool.
    """
    if images < FOLDING or model.reading.inner or backbone.device.type != "cpu":
        return partial(run_prefix, model)
    frozen = FrozenBackbone(backbone, Tuning(channels_last=True, fold=True, piece_bytes=CACHE))
    return torch.no_grad()(frozen.run)


def run_prefix(model: PatchedModel, images: Tensor, start: int) -> Tensor:
    """The output of the frozen segments `[0, start)` for normalised images, on the model's device."""
    device = next(model.parameters()).device
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return torch.cat([model.run_prefix(piece, start) for piece in pieces(images)])


def prefix_share(backbone: Backbone, start: int) -> float:
    """The share of the chain's multiply-adds that lies before segment `start`."""
    if start == 0:
        return 0.0
    macs = [segment.macs for segment in backbone.chain]
    return sum(macs[:start]) / max(sum(macs), 1)


def cache_worthwhile(backbone: Backbone, start: int) -> bool:
    """Return True where a cache before segment `start` saves enough work to be worth its memory."""
    return prefix_share(backbone, start) >= WORTHWHILE

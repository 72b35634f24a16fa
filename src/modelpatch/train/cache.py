"""The frozen prefix, computed once.

Everything before a patch's first span is frozen and deterministic, so its output for an image never changes. The cache
holds that output for every image, in memory up to a budget and in a temporary file beyond it. With augmentation a
stated number of augmented views of every image is cached and the epochs take turns through them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.frozen import FrozenBackbone
from modelpatch.backbone.tuning import CACHE, Tuning
from modelpatch.data.images import AUGMENTATIONS, Augmentation, Images, allocate, pieces
from modelpatch.patch.model import PatchedModel

BATCH = 64
FOLDING = 1000  # images
Prefix = Callable[[Tensor, int], Tensor]  # images and an end to the output of segments [0, end)
WORTHWHILE = 0.1


class PlainInputs:
    """Images through no cache: every epoch decodes nothing but augments anew."""

    start = 0

    def __init__(self, store: Images, augmentation: Augmentation, seed: int) -> None:
        self.store, self.augmentation, self.seed = store, augmentation, seed

    def batch(self, rows: Tensor, epoch: int, step: int) -> Tensor:
        """Inputs of segment `start` for these rows."""
        return self.store.augmented(rows, self.augmentation, (self.seed, epoch, step))

    def targets(self, rows: Tensor, epoch: int, step: int) -> Any:
        """What a dense task asks about that batch."""
        return self.store.targets(rows, self.augmentation, (self.seed, epoch, step))

    def plain_targets(self, rows: Tensor) -> Any:
        """What it asks about the images as they are."""
        return self.store.targets(rows, AUGMENTATIONS["none"], ())


class CachedInputs:
    """What the model goes on from after segments `[0, start)`: for `views` views of every image, one without augmentation."""

    def __init__(
        self,
        prefix: Prefix,
        store: Images,
        start: int,
        augmentation: Augmentation,
        views: int,
        seed: int,
        memory: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.start = start
        self.views = 1 if augmentation.name == "none" else views
        shape: tuple[int, ...] | None = None
        for view in range(self.views):
            for step, rows in enumerate(torch.arange(len(store)).split(BATCH)):
                images = store.augmented(rows, augmentation, (seed, view, step))
                outputs = prefix(images, start)
                if shape is None:
                    shape = tuple(outputs.shape[1:])
                    self.values = allocate((self.views, len(store), *shape), torch.float32, memory)
                self.values[view, rows] = outputs.cpu()
                advance(len(rows))

    def batch(self, rows: Tensor, epoch: int, step: int) -> Tensor:
        """Inputs of segment `start` for these rows, from the epoch's view."""
        return self.values[epoch % self.views, rows]


def make_prefix(backbone: Backbone, model: PatchedModel, images: int) -> Prefix:
    """What computes the frozen prefix of a number of images: folded copies of the segments where there are enough images.

    Folded segments agree with the model's to rounding and take less time; making them takes as long as some hundred images.
    A head that reads inner segments needs the model's own, which keep what they pool.
    """
    if images < FOLDING or model.taps or backbone.device.type != "cpu":
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
    macs = [segment.macs for segment in backbone.chain]
    return sum(macs[:start]) / max(sum(macs), 1)


def cache_worthwhile(backbone: Backbone, start: int) -> bool:
    """Whether a cache before segment `start` saves enough work to be worth its memory."""
    return prefix_share(backbone, start) >= WORTHWHILE

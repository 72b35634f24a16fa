"""Inputs of a fit: images decoded for it alone, or shared with other fits on the same images.

    images -> [frozen segments, computed once for every image] -> inputs of segment `start` -> trained segments

`OwnInputs` caches the output of the segments before one model's first span. `SharedImages` computes the activations before
every block in one pass, for many fits: those of a selection train different parts, on different rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import Augmentation
from modelpatch.data.images import (
    NO_AUGMENTATION,
    Images,
    ImageStore,
    Pixels,
    View,
    allocate,
    open_images,
    pieces,
)
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.patch.model import PatchedModel
from modelpatch.train.batches import Inputs
from modelpatch.train.cache import (
    BATCH,
    CachedInputs,
    PlainInputs,
    cache_prefix,
    cache_worthwhile,
    make_prefix,
    prefix_share,
    run_prefix,
)
from modelpatch.train.folding import fold_segment
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings


class InputSource(Protocol):
    """The images of a fit by split."""

    def count(self, split: str) -> int:
        """Return the number of images."""

    def labels(self, split: str) -> Tensor:
        """Return the class indices (N,), int64."""

    def plain(self, split: str) -> Inputs:
        """Return the images as inputs, not augmented."""

    def inputs(self, model: PatchedModel, split: str, augmented: bool) -> Inputs:
        """Return inputs of a segment of the model before its first span, or of its head."""

    def prepare(self, model: PatchedModel) -> None:
        """Replace frozen segments of the model by equal ones that take less time."""


class OwnInputs(InputSource):
    """Images that are decoded for one fit, with a cache before its model's first span unless `cache=False` is set."""

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        settings: FitSettings,
        bar: Progress,
    ) -> None:
        self.backbone, self.data, self.preprocessing, self.augmentation = backbone, data, preprocessing, augmentation
        self.seed, self.memory, self.cache, self.bar = settings.seed, settings.memory, settings.cache, bar
        self.views = min(settings.views, settings.epochs)
        self._opened: dict[tuple[str, bool], Images] = {}

    def count(self, split: str) -> int:
        return len(getattr(self.data, split))

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(getattr(self.data, split).labels)

    def plain(self, split: str) -> Inputs:
        return PlainInputs(self._open(split, False), NO_AUGMENTATION, self.seed)

    def prepare(self, model: PatchedModel) -> None:
        """Leave the model its own segments."""

    def inputs(self, model: PatchedModel, split: str, augmented: bool) -> Inputs:
        """Return a split's images, or cached activations before the model's first span where that saves work."""
        first, augmentation = model.first, self.augmentation if augmented else NO_AUGMENTATION
        images: Split = getattr(self.data, split)
        if images.dense or not self.cache or not cache_worthwhile(self.backbone, first):
            return PlainInputs(self._open(split, augmented), augmentation, self.seed)
        views = self.views if augmented and (augmentation.name != "none" or images.augments) else 1
        share, count = prefix_share(self.backbone, first), views * len(images)
        with self.bar.task(f"caching {share:.0%} of the network, {views} view{'s' * (views != 1)}", count) as advance:
            prefix = make_prefix(self.backbone, model, count)
            source = self._open(split, augmented, once=True)
            return cache_prefix(prefix, source, first, augmentation, views, self.seed, self.memory, advance)

    def _open(self, split: str, augmented: bool, once: bool = False) -> Images:
        """The images of a split, the same ones for every reader if they are kept."""
        images: Split = getattr(self.data, split)
        augmented = augmented and images.changes
        if (split, augmented) in self._opened:
            return self._opened[split, augmented]
        images = images if augmented else images.with_transform(None)
        read_once = once or split == "test"
        opened = open_images(images, self.preprocessing, self.memory, once=read_once, shuffle=augmented)
        if not once:
            self._opened[split, augmented] = opened
        return opened


class SharedImages:
    """Images that many fits of one backbone train on: decoded once, activations before blocks computed once.

    `views` augmented views of every image and the plain one are made once, so that all fits see the same; unless `cache` is
    False, their activations before every block are kept as well, from the last block to the first, since late ones are
    small and save most, as long as they fit into `memory` bytes in memory and `disk` bytes in temporary files. The inputs of a
    model are those of the last boundary before its first span. A model that trains almost from the images on, for which a
    cache would save nothing, sees new views in every epoch, as in a fit alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        split: Split,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        *,
        views: int,
        seed: int,
        memory: int,
        disk: int,
        cache: bool = True,
        bar: Progress | None = None,
    ) -> None:
        self.backbone, self.augmentation, self.seed = backbone, augmentation, seed
        self.views = views if augmentation.name != "none" else 0
        self.memory, self.disk, self.cache = memory, disk, cache
        self.bar = bar or quiet_progress()
        self.store = ImageStore(split, preprocessing, memory)
        self._activations: dict[int, Tensor] | None = None
        self._folded: dict[int, nn.Module] = {}

    def folded(self, segment: int) -> nn.Module:
        """The frozen segment with its normalisation folded, made once; equal to rounding."""
        if segment not in self._folded:
            self._folded[segment] = fold_segment(self.backbone.chain[segment])
        return self._folded[segment]

    def fold(self, **rows: Tensor) -> SharedInputs:
        """The source of one fit: `fold(train=..., test=...)` names the rows of each of its splits."""
        return SharedInputs(self, rows)

    @property
    def activations(self) -> dict[int, Tensor]:
        """By boundary: (views + 1, N, ...) float32, the plain view last; 0 holds the images. Computed when first needed."""
        if self._activations is None:
            self._activations = self._compute()
        return self._activations

    @torch.no_grad()
    def _compute(self) -> dict[int, Tensor]:
        chain, count, views = self.backbone.chain, len(self.store), self.views + 1
        kept = self._allocate(views, count)
        with self.bar.task(f"activations before {len(kept)} segments", views * count) as advance:
            for view in range(views):
                augmentation = self.augmentation if view < self.views else NO_AUGMENTATION
                for step, rows in enumerate(torch.arange(count).split(BATCH)):
                    images = self.store.batch(rows, augmentation, (self.seed, view, step)).images.to(
                        self.backbone.device
                    )
                    done = 0
                    for x in pieces(images.contiguous(memory_format=torch.channels_last)):
                        chosen, at = rows[done : done + len(x)], 0
                        done += len(x)
                        for boundary in sorted(kept):
                            x, at = chain.run(x, at, boundary), boundary
                            kept[boundary][view, chosen] = x.cpu()
                    advance(len(rows))
        return kept

    def _allocate(self, views: int, count: int) -> dict[int, Tensor]:
        """Allocate the images, and the boundaries that the budgets allow."""
        shapes = output_shapes(self.backbone, self.store.preprocessing.input_size)
        memory, disk = self.memory, self.disk
        kept: dict[int, Tensor] = {}
        for boundary in (0, *(chain_boundaries(self.backbone) if self.cache else ())):
            shape = (views, count, *shapes[boundary])
            size = 4 * math.prod(shape)
            in_memory = size <= memory
            if boundary and not in_memory and size > disk:
                break
            kept[boundary] = allocate(shape, torch.float32, size if in_memory else 0)
            memory, disk = (memory - size, disk) if in_memory else (memory, disk - size)
        return kept


class SharedInputs(InputSource):
    """Some rows of shared images as the splits of one fit."""

    def __init__(self, shared: SharedImages, rows: dict[str, Tensor]) -> None:
        self.shared, self.rows = shared, rows

    def count(self, split: str) -> int:
        return len(self.rows[split])

    def labels(self, split: str) -> Tensor:
        return self.shared.store.labels[self.rows[split]]

    def plain(self, split: str) -> Inputs:
        return PlainInputs(ImageRows(self.shared.store, self.rows[split]), NO_AUGMENTATION, self.shared.seed)

    def prepare(self, model: PatchedModel) -> None:
        """Replace frozen segments by ones whose normalisation is folded, shared by all fits."""
        spans = dict(model.spans)
        for number, start in enumerate(model.starts):
            if start not in spans and start >= model.first:
                model.parts[number] = self.shared.folded(start)

    def inputs(self, model: PatchedModel, split: str, augmented: bool) -> Inputs:
        """Return shared activations before the model's first span, or the images where a cache saves no work."""
        shared, rows = self.shared, self.rows[split]
        augmented = augmented and shared.views > 0
        augmentation = shared.augmentation if augmented else NO_AUGMENTATION
        images = ImageRows(shared.store, rows)
        if not cache_worthwhile(shared.backbone, model.first):
            return PlainInputs(images, augmentation, shared.seed)
        if model.reading.inner:  # its head reads more than one boundary
            count = max(shared.views, 1) if augmented else 1
            prefix = partial(run_prefix, model)
            return cache_prefix(prefix, images, model.first, augmentation, count, shared.seed, shared.memory)
        start = max(boundary for boundary in shared.activations if boundary <= model.first)
        values = shared.activations[start][: shared.views] if augmented else shared.activations[start][shared.views :]
        return CachedInputs(start, values, shared.store.labels.expand(len(values), -1), rows)


class ImageRows(Images):
    """Some rows of a store, numbered from 0."""

    def __init__(self, store: ImageStore, rows: Tensor) -> None:
        super().__init__(store.split, store.preprocessing)
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        return self.store.labels[self.rows]

    def read(self, batches: Sequence[Tensor], view: View | None, first: int = 0) -> Iterator[Pixels]:
        """The decoded images of every batch of rows from number `first` on."""
        return self.store.read([self.rows[rows] for rows in batches[first:]], view)


def chain_boundaries(backbone: Backbone) -> list[int]:
    """Return the segments before which a cache saves work, the last first: the head's input, and every block."""
    starts = [len(backbone.chain), *(block.index for block in reversed(backbone.chain.blocks))]
    return [start for start in starts if cache_worthwhile(backbone, start)]


@torch.no_grad()
def output_shapes(backbone: Backbone, input_size: tuple[int, int, int]) -> dict[int, tuple[int, ...]]:
    """The shape of one image's activation before every segment and before the head, at this input size."""
    x = torch.zeros(1, *input_size, device=backbone.device)
    shapes = {0: tuple(x.shape[1:])}
    for index in range(len(backbone.chain)):
        x = backbone.chain.run(x, index, index + 1)
        shapes[index + 1] = tuple(x.shape[1:])
    return shapes

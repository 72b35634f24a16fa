"""Inputs of a fit: images, or what the frozen segments before the first patched one make of them, computed once.

    images -> [frozen segments, cached] -> inputs of segment `start` -> trained segments

The cache is kept in memory up to a budget and in a temporary file beyond it. With augmentation it holds a stated number of
views of every image. `OwnInputs` cache what one model needs. `SharedImages` computes the activations before every block in
one pass, for many fits: those of a selection train different parts, on different rows.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.trace import trace_layers
from modelpatch.backbone.tuning import CACHE, FrozenBackbone, Tuning
from modelpatch.data.augmentation import Augmentation
from modelpatch.data.images import (
    NO_AUGMENTATION,
    ImageBatch,
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
from modelpatch.errors import UntraceableBackboneError
from modelpatch.patch.model import PatchedModel
from modelpatch.text import count_of
from modelpatch.train.batches import Minibatch, place
from modelpatch.train.progress import Progress
from modelpatch.train.settings import FitSettings

FOLDING = 1000  # images
WORTHWHILE = 0.1  # of the multiply-adds
TOLERANCE = 1e-3  # of a folded segment's largest output
Prefix = Callable[[Tensor, int], Tensor]  # images and an end to the output of segments [0, end)


@dataclass(frozen=True)
class PlainInputs:
    """Images without a cache: augmented anew in every epoch."""

    images: Images
    augmentation: Augmentation
    seed: int
    start: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rows: Sequence[Tensor], epoch: int, first: int = 0) -> Iterator[ImageBatch]:
        return self.images.batches(rows, self.augmentation, self.seed, epoch, first)


@dataclass(frozen=True)
class CachedInputs:
    """Activations (V, N, ...) before segment `start` of V views of N images, and their labels or targets (V, N, ...).

    Epoch k trains on view k modulo V. `rows` are those of the images that count, all by default.
    """

    start: int
    values: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return self.values.shape[1] if self.rows is None else len(self.rows)

    def batches(self, rows: Sequence[Tensor], epoch: int, first: int = 0) -> Iterator[ImageBatch]:
        view = epoch % len(self.values)
        for batch in rows[first:]:
            own = batch if self.rows is None else self.rows[batch]
            yield ImageBatch(self.values[view, own], self.labels[view, own])


Inputs = PlainInputs | CachedInputs  # `batches` gives inputs of segment `start` and targets for the rows of every batch


@dataclass(frozen=True)
class RowBatches:
    """Batches of `size` rows of inputs, in a random order that follows (seed, epoch), or in order without a seed.

    With `weights` (N,) rows are drawn by these with replacement.
    """

    inputs: Inputs
    size: int
    seed: int | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(cut_rows(len(self.inputs), self.size, self.seed))

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        rows = cut_rows(len(self.inputs), self.size, self.seed, epoch, self.weights)
        for inputs, targets in self.inputs.batches(rows, epoch, first):
            yield Minibatch(inputs, targets, self.inputs.start)


def cut_rows(rows: int, size: int, seed: int | None, epoch: int = 0, weights: Tensor | None = None) -> list[Tensor]:
    """Return the rows of each batch of an epoch, in order without a seed, drawn with replacement by `weights`.

    In random order a last row of its own joins the batch before, for layers that need two.
    """
    if seed is None:
        return list(torch.arange(rows).split(size))
    random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=random)
    if weights is not None:
        order = torch.multinomial(weights, rows, replacement=True, generator=random)
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [order[-size - 1 :]]
    return batches


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
    """Compute the output of segments `[0, start)` for `views` views of every image. Images are read once and not kept."""
    values = labels = None  # labels of every view, since a stream's order differs by view
    for view, rows, (pixels, own) in images.views(views, augmentation, seed):
        outputs = prefix(pixels, start)
        if values is None or labels is None:
            labels = torch.zeros((views, len(images), *own.shape[1:]), dtype=own.dtype)
            values = allocate((views, len(images), *outputs.shape[1:]), torch.float32, memory)
        values[view, rows], labels[view, rows] = outputs.cpu(), own
        advance(len(rows))
    assert values is not None and labels is not None, "a split holds images"  # noqa: PT018
    return CachedInputs(start, values, labels)


def make_prefix(backbone: Backbone, model: PatchedModel, images: int) -> Prefix:
    """A function that computes the frozen prefix, for a large number of images through folded copies of the segments.

    These agree to rounding; making them takes as long as some hundred images. A head that reads inner segments needs the
    model's own, which keep what they pool.
    """
    if images < FOLDING or model.reading.inner or backbone.device.type != "cpu":
        return partial(run_prefix, model)
    frozen = FrozenBackbone(backbone, Tuning(channels_last=True, fold=True, piece_bytes=CACHE))
    return torch.no_grad()(frozen.run)


def run_prefix(model: PatchedModel, images: Tensor, start: int) -> Tensor:
    """The output of the frozen segments `[0, start)` for normalised images, on the model's device."""
    images = place(images, next(model.parameters()).device)
    return torch.cat([model.run_prefix(piece, start) for piece in pieces(images)])


def prefix_share(backbone: Backbone, start: int) -> float:
    """The share of the chain's multiply-adds that lies before segment `start`."""
    macs = [segment.macs for segment in backbone.chain] if start else [0]
    return sum(macs[:start]) / max(sum(macs), 1)


def cache_worthwhile(backbone: Backbone, start: int) -> bool:
    """Return True where a cache before segment `start` saves enough work to be worth its memory."""
    return prefix_share(backbone, start) >= WORTHWHILE


@dataclass(frozen=True)
class OwnInputs:
    """Images that are decoded for one fit, with a cache before its model's first span unless `cache=False` is set.

    Several fits of the same data may share what was `opened`.
    """

    backbone: Backbone
    data: Task
    preprocessing: Preprocessing
    augmentation: Augmentation
    settings: FitSettings
    bar: Progress
    opened: dict[tuple[str, bool], Images] = field(default_factory=dict)

    def prepare(self, model: PatchedModel) -> None:
        """Leave the model's frozen segments as they are."""

    def images(self, split: str) -> Images:
        """Return a split's images, not augmented."""
        return self._open(split, False)

    def inputs(self, model: PatchedModel, split: str, augmented: bool, views: int | None = None) -> Inputs:
        """Return a split's images, or cached activations before the model's first span where that saves work.

        Augmented ones are as many `views` of every image, as the settings say by default.
        """
        first, augmentation = model.first, self.augmentation if augmented else NO_AUGMENTATION
        images, settings = getattr(self.data, split), self.settings
        if images.dense or not settings.cache or not cache_worthwhile(self.backbone, first):
            return PlainInputs(self._open(split, augmented), augmentation, settings.seed)
        varied = augmented and (augmentation.name != "none" or images.augments)
        views = views or (min(settings.views, settings.epochs) if varied else 1)
        share, count = prefix_share(self.backbone, first), views * len(images)
        with self.bar.task(f"caching {share:.0%} of the network, {count_of(views, 'view')}", count) as advance:
            prefix, source = make_prefix(self.backbone, model, count), self._open(split, augmented, once=True)
            return cache_prefix(prefix, source, first, augmentation, views, settings.seed, settings.memory, advance)

    def _open(self, split: str, augmented: bool, once: bool = False) -> Images:
        """The images of a split, the same ones for every reader if they are kept."""
        images: Split = getattr(self.data, split)
        changed = augmented and images.changes
        opened = self.opened.get((split, changed))
        if opened is None:
            images = images if changed else images.with_transform(None)
            read_once = once or split == "test"
            opened = open_images(images, self.preprocessing, self.settings.memory, once=read_once, shuffle=changed)
            if not once:
                self.opened[split, changed] = opened
        return opened


@dataclass(eq=False)
class SharedImages:
    """Images that many fits of one backbone train on: decoded once, activations before blocks computed once.

    As many augmented views of every image as the settings say and the plain one are made once, so that all fits see the same;
    unless `cache=False` is set, their activations before every block are kept as well, from the last block to the first,
    since late ones are small and save most, as long as they fit into the settings' `memory` and `disk` bytes in temporary
    files. The inputs of a model are those of the last boundary before its first span. A model that trains almost from the
    images on, for which a cache would save nothing, sees new views in every epoch, as in a fit alone.
    """

    backbone: Backbone
    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation
    settings: FitSettings
    disk: int
    bar: Progress

    def __post_init__(self) -> None:
        self.views = min(self.settings.views, self.settings.epochs) if self.augmentation.name != "none" else 0
        self.store = ImageStore(self.split, self.preprocessing, self.settings.memory)
        self.folded: dict[int, nn.Module] = {}  # frozen segments with their normalisation folded, by number

    @cached_property
    @torch.no_grad()
    def activations(self) -> dict[int, Tensor]:
        """By boundary: (views + 1, N, ...) float32, the plain view last; 0 holds the images. Computed when first needed."""
        kept, device = self._allocate(), self.backbone.device
        boundaries, total = sorted(kept), (self.views + 1) * len(self.store)
        with self.bar.task(f"activations before {len(kept)} segments", total) as advance:
            for first, count, augmentation in ((0, self.views, self.augmentation), (self.views, 1, NO_AUGMENTATION)):
                views = self.store.views(count, augmentation, self.settings.seed) if count else ()
                for view, rows, (images, _) in views:
                    parts = pieces(place(images, device))
                    for x, chosen in zip(parts, rows.split(len(parts[0])), strict=True):
                        at = 0
                        for boundary in boundaries:
                            x, at = self.backbone.chain.run(x, at, boundary), boundary
                            kept[boundary][first + view, chosen] = x.cpu()
                    advance(len(rows))
        return kept

    def _allocate(self) -> dict[int, Tensor]:
        """Allocate the images, and the boundaries before which a cache saves work that the budgets allow, the last first."""
        chain, memory, disk = self.backbone.chain, self.settings.memory, self.disk
        x = torch.zeros(1, *self.store.preprocessing.input_size, device=self.backbone.device)
        shapes = [x.shape[1:]]
        chain.prepare(x)
        for segment in chain:
            x = segment.module(x)
            shapes.append(x.shape[1:])
        boundaries = (len(chain), *(block.index for block in reversed(chain.blocks))) if self.settings.cache else ()
        kept: dict[int, Tensor] = {}
        for boundary in (0, *(start for start in boundaries if cache_worthwhile(self.backbone, start))):
            shape = (self.views + 1, len(self.store), *shapes[boundary])
            size = 4 * math.prod(shape)
            in_memory = size <= memory
            if boundary and not in_memory and size > disk:
                break
            kept[boundary] = allocate(shape, torch.float32, size if in_memory else 0)
            memory, disk = (memory - size, disk) if in_memory else (memory, disk - size)
        return kept


@dataclass(frozen=True)
class SharedInputs:
    """Some `rows` of shared images as the splits of one fit, by name: `train`, `test`, ..."""

    shared: SharedImages
    rows: dict[str, Tensor]

    def images(self, split: str) -> Images:
        return ImageRows(self.shared.store, self.rows[split])

    def prepare(self, model: PatchedModel) -> None:
        """Replace frozen segments by ones whose normalisation is folded, shared by all fits; equal to rounding."""
        spans, folded = dict(model.spans), self.shared.folded
        for number, start in enumerate(model.starts):
            if start not in spans and start >= model.first:
                if start not in folded:
                    folded[start] = fold_segment(self.shared.backbone.chain[start])
                model.parts[number] = folded[start]

    def inputs(self, model: PatchedModel, split: str, augmented: bool, views: int | None = None) -> Inputs:
        """Return shared activations before the model's first span, or the images where a cache saves no work.

        Augmented ones are those of the first `views`, of all by default.
        """
        shared, settings, images = self.shared, self.shared.settings, self.images(split)
        augmented = augmented and shared.views > 0
        views = min(views or shared.views, shared.views) if augmented else 1
        augmentation = shared.augmentation if augmented else NO_AUGMENTATION
        if not cache_worthwhile(shared.backbone, model.first):
            return PlainInputs(images, augmentation, settings.seed)
        if model.reading.inner:  # its head reads more than one boundary
            prefix = partial(run_prefix, model)
            return cache_prefix(prefix, images, model.first, augmentation, views, settings.seed, settings.memory)
        start = max(boundary for boundary in shared.activations if boundary <= model.first)
        values = shared.activations[start][:views] if augmented else shared.activations[start][shared.views :]
        return CachedInputs(start, values, shared.store.labels.expand(len(values), -1), self.rows[split])


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
        return self.store.read([self.rows[rows] for rows in batches[first:]], view)


@torch.no_grad()
def fold_segment(segment: Segment) -> nn.Module:
    """A frozen copy of the segment's module with its BatchNorm layers folded into the convolutions that they alone read.

        BN(W x + b) = W' x + b'        W' = γ W / √(σ² + ε),  b' = γ (b - μ) / √(σ² + ε) + β

    It takes fewer passes over memory, forward and backward, and agrees to rounding: good enough to compare candidates by, not
    for what a patch is measured with. A plain clone where there is nothing to fold, or where it would not compute the same.
    """
    folded = copy.deepcopy(segment.module).requires_grad_(False).eval()
    found = False
    for conv_name, norm_name in _pairs(folded):
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        if type(conv) is not nn.Conv2d or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if norm.num_features == conv.out_channels:
            folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            folded.set_submodule(norm_name, nn.Sequential(*norm.children()))  # timm's layers hold an activation as well
            found = True
    return folded if found and _same(segment, folded) else clone_module(segment.module)


def _pairs(module: nn.Module) -> Iterable[tuple[str, str]]:
    """The names of layers of which the second alone reads the first; where tracing fails, in the order of their definition."""
    try:
        nodes = trace_layers(module).nodes
    except UntraceableBackboneError:
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | _BatchNorm)]
        return itertools.pairwise(layers)
    calls = [node for node in nodes if node.op == "call_module"]
    followed = [(node.all_input_nodes[0], node) for node in calls if len(node.all_input_nodes) == 1]
    return [(str(a.target), str(b.target)) for a, b in followed if a.op == "call_module" and len(a.users) == 1]


def _same(segment: Segment, folded: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    device = next(folded.parameters()).device
    example = torch.randn(1, *segment.input_shape, generator=generator).to(device)
    try:
        expected, given = segment.module(example.clone()), folded(example.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return given.shape == expected.shape and bool((given - expected).abs().max() <= TOLERANCE * expected.abs().max())

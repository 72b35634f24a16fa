"""The backbone as a list of segments, cut wherever exactly one tensor is alive.

    image -> [segment 0] -> [segment 1] -> ... -> [segment n-1] -> features (B, D) -> classifier -> logits

`chain(x)` computes exactly what the network computes before its classifier, bit for bit: the segments run the
network's own modules in the network's own order. A chain is checked against the network when it is built; where a
network cannot be traced, the chain is coarser, never wrong.
"""

import difflib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.cuts import Cutter, Forward, has_children
from modelpatch.backbone.sizes import Sizes
from modelpatch.backbone.steps import Steps, attach
from modelpatch.errors import BackboneError, UntraceableBackboneError

Parts = list[tuple[str, nn.Module]]
NAME_PARTS = "Name its parts in order instead: load_backbone(module, segments=['stem', 'stage1', ...], classifier='fc')"


@dataclass(frozen=True)
class Segment:
    """One link of the chain: one tensor in, one tensor out.

    `tensor_names` maps what `module` calls its parameters and buffers to what the backbone calls them, `tied` are the
    backbone's names of those that other segments hold as well, which no patch can own. `stage` numbers the runs of blocks at
    one resolution and is None outside them. The shapes have no batch axis.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    tensor_names: Mapping[str, str] = field(repr=False)
    is_block: bool
    stage: int | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    tied: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def bundles(self) -> bool:
        """True if the output is several tensors side by side, with no axes of positions and channels."""
        return isinstance(self.module, Steps) and self.module.bundles

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by the backbone's names."""
        for name, tensor in _named_tensors(self.module):
            yield self.tensor_names[name], tensor

    def in_eval_mode(self) -> Self:
        """The segment, over a clone of its module where that is in train mode and would move its statistics."""
        trains = any(module.training for module in self.module.modules())
        return replace(self, module=clone_module(self.module)) if trains else self

    @cached_property
    def parameters(self) -> int:
        """Number of parameters (not buffers)."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return count_macs(self.module, self.input_shape)


class Chain(Sequence[Segment]):
    """The segments in order. `chain(x)` maps images (B, C, H, W) to features (B, D).

    `tables` are the backbone's tensors that no segment holds, since what several read is made of them.
    """

    def __init__(self, segments: Sequence[Segment], head: nn.Module) -> None:
        self.segments = tuple(segments)
        self.head = head
        self.sizes: Sizes | None = None
        self.tables: Mapping[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, 0, len(self))

    def run(self, x: Tensor, start: int, end: int) -> Tensor:
        """The output of segments `[start, end)` for `x`, the output of segment `start - 1` (or the images)."""
        if start == 0:
            self.prepare(x)
        for segment in self.segments[start:end]:
            x = segment.module(x)
        return x

    def prepare(self, images: Tensor) -> None:
        """Let the segments run what they give for images (B, C, H, W) of a size that the chain has not run yet.

        Raises `BackboneError` for images that the network does not take.
        """
        if self.sizes is not None:
            self.sizes.prepare(images)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: Any) -> Any:
        return self.segments[index]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.name for segment in self.segments)

    @property
    def blocks(self) -> tuple[Segment, ...]:
        """The residual or transformer blocks; for plain networks (VGG) the layers that hold weights."""
        return tuple(segment for segment in self.segments if segment.is_block)

    @property
    def stages(self) -> tuple[tuple[Segment, ...], ...]:
        """The blocks grouped into runs at one resolution."""
        return tuple(tuple(run) for _, run in itertools.groupby(self.blocks, lambda block: block.stage))

    @property
    def feature_dim(self) -> int:
        """D, the width of the features that heads read."""
        return self.segments[-1].output_shape[-1]

    def segment_of(self, name: str) -> Segment:
        """The segment that holds the backbone tensor `name`. Raises KeyError for none, or for one that several share."""
        return self._owners[name]

    def tensor(self, name: str) -> Tensor:
        """The backbone tensor `name`. Raises KeyError as `segment_of` does."""
        return dict(self.segment_of(name).named_tensors())[name]

    @cached_property
    def _owners(self) -> dict[str, Segment]:
        pairs = [(name, segment) for segment in self.segments for name, _ in segment.named_tensors()]
        counts = Counter(name for name, _ in pairs)
        return {name: segment for name, segment in pairs if counts[name] == 1}

    def __repr__(self) -> str:
        return f"Chain({len(self)} segments, {len(self.blocks)} blocks in {len(self.stages)} stages)"


def build_chain(module: nn.Module, example: Tensor, classifier: str | None, segments: Sequence[str] = ()) -> Chain:
    """Cut a frozen module in eval mode into a chain.

    `example` (2, C, H, W) float says what images it reads; `classifier` names the module whose input ends the chain (None:
    the module returns features). `segments` names modules to run one after another instead of recording the network.
    Raises `UntraceableBackboneError` when no cut gives the network's own result, or a name is that of no module.
    """
    modules = dict(module.named_modules())
    if unknown := [name for name in (*segments, classifier) if name and name not in modules]:
        close = difflib.get_close_matches(unknown[0], modules, 5) or [name for name, _ in module.named_children()][:10]
        raise UntraceableBackboneError(
            f"{type(module).__name__} has no module {unknown[0]!r}, which segments or classifier name. It has: "
            f"{', '.join(close)}, ..."
        )
    with torch.no_grad():
        if segments:
            try:
                return _listed_chain([(name, modules[name]) for name in segments], module, example, classifier)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise UntraceableBackboneError(
                    f"the segments {', '.join(segments)} of {type(module).__name__} cannot run one after another: {error}"
                ) from error
        if not has_pre_logits(module):
            try:
                return _recorded_chain(module, example, classifier)
            except UntraceableBackboneError as error:
                raise UntraceableBackboneError(f"{error}. {NAME_PARTS}") from error
        for ends in (classifier,) if classifier or not has_several_classifiers(module) else ():
            with suppress(UntraceableBackboneError):
                chain = _recorded_chain(module, example, ends)
                if ends is None or isinstance(modules[ends], nn.Linear) or _ends_in(chain, pre_logits(module), example):
                    return chain
        try:
            return _recorded_chain(module, example, None, pre_logits)
        except UntraceableBackboneError:
            return _listed_chain([("network", PooledFeatures(module))], module, example, classifier)


def _ends_in(chain: Chain, features: Forward, example: Tensor) -> bool:
    """True if the chain gives these features."""
    found, expected = chain(example), features(example).flatten(1)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _recorded_chain(
    module: nn.Module, example: Tensor, classifier: str | None, features: Callable[[nn.Module], Forward] | None = None
) -> Chain:
    """The chain up to the module `classifier`, else of the whole network; or of its `features` alone, without a head."""
    sizes = Sizes(Cutter(module, features or itself, classifier), example)
    head = NoHead(module, sizes.parts) if features else sizes.rest
    chain = _assemble(sizes.parts, head, sizes.shapes, module, example, classifier, features and features(module))
    chain.sizes, chain.tables = sizes, sizes.tables
    return chain


def itself(module: nn.Module) -> Forward:
    """The network as what is run of it; a function with a name, which other processes find."""
    return module


def has_pre_logits(module: nn.Module) -> bool:
    """True for a network of timm's kind, which says what its features are."""
    return hasattr(module, "forward_features") and hasattr(module, "forward_head")


def has_several_classifiers(module: nn.Module) -> bool:
    """True for a network of timm's kind whose classifier is not one module."""
    found = module.get_classifier() if hasattr(module, "get_classifier") and has_pre_logits(module) else None  # type: ignore[operator]
    heads = [*found] if isinstance(found, tuple | list | nn.ModuleList) else []
    return any(True for head in heads for _ in head.parameters())


class NoHead(nn.Module):
    """A place for the tensors of classifiers that read more than the features (several classifiers of one network)."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        super().__init__()
        held = {id(tensor) for _, part in parts for _, tensor in _named_tensors(part)}
        for name, tensor in _named_tensors(module):
            if id(tensor) not in held:
                attach(self, name, module)

    def forward(self, features: Tensor) -> Tensor:
        raise BackboneError("this backbone's own logits cannot be computed from its features; call backbone(images).")


class PooledFeatures(nn.Module):
    """A timm model without its classifier as one module: nothing can be cached or shared, but everything works."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward_head(self.module.forward_features(x), pre_logits=True)


def pre_logits(module: nn.Module) -> Forward:
    """The features of a network of timm's kind: all that it would return without its classifier."""
    return PooledFeatures(module).forward


def _listed_chain(parts: Parts, module: nn.Module, example: Tensor, classifier: str | None) -> Chain:
    shapes, x, versions = [tuple(example.shape[1:])], example, list[tuple[Tensor, int]]()
    for name, part in parts:
        x = part(x)
        shapes.append(tuple(x.shape[1:]))
        if any(tensor._version != version for tensor, version in versions):
            raise UntraceableBackboneError(
                f"segment {name!r} writes its input in place. Build it with inplace=False, or name a module that holds it "
                "together with the one before."
            )
        versions.append((x, x._version))
    head = nn.Identity() if classifier is None else module.get_submodule(classifier)
    return _assemble(parts, head, shapes, module, example, classifier)


def _assemble(
    parts: Parts,
    head: nn.Module,
    shapes: list[tuple[int, ...]],
    module: nn.Module,
    example: Tensor,
    classifier: str | None,
    features: Forward | None = None,
) -> Chain:
    """The chain of `parts`, if it and its head give the network's own output, bit for bit, and that is finite.

    `shapes` are those of the image and of every part's output, without the batch axis.
    """
    probe = torch.randn(example[:1].shape, generator=torch.Generator().manual_seed(0)).to(example)
    found = probe
    for _, part in parts:
        found = part(found)
    expected = features(probe) if features else module(probe)
    if not torch.isfinite(expected).all():
        raise BackboneError(f"{type(module).__name__} answers with NaN or infinity. Look at its weights.")
    if not torch.equal(found if features else head(found), expected):
        what = f"the {len(parts)} segments found in {type(module).__name__}"
        raise UntraceableBackboneError(f"{what} do not reproduce it. {NAME_PARTS}")
    if classifier is not None and len(shapes[-1]) == 3:
        pooled = _reads_maps(module, classifier, shapes[-1], example)  # it is a convolution, whose answers are pooled
        head = NoHead(module, parts) if pooled else nn.Sequential(nn.Unflatten(1, shapes[-1]), head)
        parts = [*parts, ("pool", nn.AdaptiveAvgPool2d(1))] if pooled else parts
        shapes = [*shapes, (shapes[-1][0], 1, 1)] if pooled else shapes
    if len(shapes[-1]) != 1:
        parts, shapes = [*parts, ("flatten", nn.Flatten())], [*shapes, (math.prod(shapes[-1]),)]
    blocks = _find_blocks([part for _, part in parts])
    runs = itertools.groupby(blocks, lambda index: spatial_size(shapes[index + 1], shapes[0]))
    stages = {index: stage for stage, (_, run) in enumerate(runs) for index in run}
    names = {id(tensor): name for name, tensor in _named_tensors(module)}
    holders = Counter(names[id(tensor)] for _, part in parts for _, tensor in _named_tensors(part))
    tied = frozenset(name for name, count in holders.items() if count > 1)
    segments = [
        Segment(
            index=index,
            name=name,
            module=part,
            tensor_names={local: names[id(tensor)] for local, tensor in _named_tensors(part)},
            is_block=index in blocks,
            stage=stages.get(index),
            input_shape=shapes[index],
            output_shape=shapes[index + 1],
            tied=tied.intersection(names[id(tensor)] for _, tensor in _named_tensors(part)),
        )
        for index, (name, part) in enumerate(parts)
    ]
    return Chain(segments, head)


def _reads_maps(module: nn.Module, classifier: str, shape: tuple[int, ...], example: Tensor) -> bool:
    """True if the classifier reads maps of several positions: here, or where images are twice as large."""
    if math.prod(shape[1:]) > 1:
        return True
    found: list[Tensor] = []
    handle = module.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        with suppress(RuntimeError, AssertionError, TypeError, ValueError, LookupError):  # it takes no other size
            module(example.new_zeros(1, example.shape[1], *(2 * side for side in example.shape[2:])))
    finally:
        handle.remove()
    return any(math.prod(tensor.shape[2:]) > 1 for tensor in found)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _find_blocks(parts: Sequence[nn.Module]) -> list[int]:
    """Composite segments with at least two weights; where they are the minority (VGG), every segment with weights."""
    counts = [sum(parameter.ndim >= 2 for parameter in part.parameters()) for part in parts]
    weighted = [index for index, count in enumerate(counts) if count]
    composite = [index for index in weighted if counts[index] > 1 and has_children(parts[index])]
    return composite if 2 * len(composite) >= len(weighted) else weighted


def spatial_size(shape: tuple[int, ...], image: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of an activation, whether its channels come first (C, H, W) or last (H, W, C) or in tokens."""
    if len(shape) == 3:
        ratio = image[2] / image[1]
        return shape[1:] if shape[2] == round(shape[1] * ratio) else shape[:2]
    return shape[:-1]


def channels_first(shape: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """True if an activation has the axes (C, H, W), and not (H, W, C) or those of tokens."""
    return len(shape) == 3 and spatial_size(shape, image) == shape[1:]


def count_macs(module: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of a module for one input of `input_shape` (no batch axis), counted by running a clone of it."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    clone = clone_module(module)  # in train mode the module itself would move its statistics
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clone(torch.zeros(1, *input_shape, device=device))
    return counter.get_total_flops() // 2

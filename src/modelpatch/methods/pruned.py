"""Fine-tune blocks whose channels were pruned first: a patch that is smaller and faster than the blocks it replaces.

    keep the (1 - ratio) n channels of each group of coupled layers with the largest |W|_p,  then train what is left

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 4.2. Channels inside a block are
pruned; what enters and leaves it keeps its shape, so that the frozen blocks around it run on. Which layers are coupled
is found by Torch-Pruning (Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023).
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.errors import MethodNotApplicableError, require
from modelpatch.methods.blocks import find_segments, graft_on, own_segments, start_at
from modelpatch.methods.method import register_method
from modelpatch.methods.subset import Subset
from modelpatch.methods.transformer import find_parts
from modelpatch.patch.blueprint import Blueprint, register_graft
from modelpatch.patch.model import PatchedModel
from modelpatch.text import first_line

GRAFT = "pruned"
MOST = 0.9  # of a group's channels, where the ratio holds for all groups together
MOST_INDICES, STEP = 2**19, 2**10  # that Torch-Pruning follows: they multiply where tensors are laid out anew
# what Torch-Pruning raises at its limits
UNFOLLOWED = (RuntimeError, ValueError, LookupError, AttributeError, AssertionError, TypeError)
_KNOWN: WeakKeyDictionary[Backbone, dict[Any, list[nn.Module]]] = WeakKeyDictionary()  # what is left of pruned blocks


@register_method
class Pruned(Subset):
    """`Subset` over blocks that lose the share `ratio` of their inner channels before the training.

    `scope="local"` takes that share of every group of coupled channels, `global` of all groups together, at most nine
    tenths of any. `norm` is that of a channel's weights.
    """

    name = "pruned"
    order = 5
    shares_across_tasks = False

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scope: Literal["local", "global"] = "local"
    norm: Literal["l1", "l2"] = "l2"

    def changes(self, backbone: Backbone) -> Blueprint:
        """Adds the blocks' smaller tensors and owns the others. Raises `MissingExtraError` without Torch-Pruning, too."""
        owned: list[str] = []
        grafts = []
        for segment, pruned in self._pruned(backbone):
            before, after = (dict((*m.named_parameters(), *m.named_buffers())) for m in (segment.module, pruned))
            shapes = {name: list(tensor.shape) for name, tensor in after.items() if tensor.shape != before[name].shape}
            added = {segment.tensor_names.get(name) for name in shapes}
            owned += [name for name in own_segments([segment], self.statistics).owned if name not in added]
            grafts.append(graft_on(segment, GRAFT, shapes=shapes))
        return Blueprint(owned=tuple(owned), grafts=tuple(grafts))

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        for segment, pruned in self._pruned(backbone):
            start_at(model, segment, self._reset(pruned) if self.reinitialize else pruned)

    def _pruned(self, backbone: Backbone) -> list[tuple[Segment, nn.Module]]:
        """The blocks and what is left of them, computed once a backbone."""
        segments = find_segments(backbone, self.blocks)
        key = (tuple(segment.index for segment in segments), self.ratio, self.scope, self.norm)
        known = _KNOWN.setdefault(backbone, {})
        if key not in known:
            parts = {segment.index: find_parts(backbone, segment) for segment in segments}
            only = {
                index: tuple(reader for mlp in own.mlp for reader in mlp.readers)
                for index, own in parts.items()
                if own.attention
            }
            known[key] = prune(segments, self.ratio, self.scope, self.norm, only)
        return list(zip(segments, known[key], strict=True))


def prune(
    segments: list[Segment], ratio: float, scope: str, norm: str, only: Mapping[int, tuple[str, ...]]
) -> list[nn.Module]:
    """Copies of the segments' modules without their weakest inner channels.

    `only` names, by segment, the layers of transformer blocks that are looked at: those that read an MLP's input. No other
    channels of these blocks can go alone, and following them takes minutes and all memory.

    Raises `MethodNotApplicableError` for a segment without any and a ratio that removes none, and `MissingExtraError`.
    """
    copies, scores = [], dict[Any, Tensor]()
    for number, segment in enumerate(segments):
        try:
            copies.append(_Prunable(segment.module, torch.zeros(1, *segment.input_shape)))
            scores |= {
                (number, name): score for name, score in copies[-1].scores(norm, only.get(segment.index)).items()
            }
        except UNFOLLOWED as error:
            raise MethodNotApplicableError(
                f"Torch-Pruning cannot follow the channels of {segment.name}: {first_line(error)[:200]}. Name other blocks."
            ) from error
    for number, segment in enumerate(segments):
        if not any(owner == number for owner, _ in scores):
            raise MethodNotApplicableError(
                f"{segment.name} has no inner channels that can be pruned: all reach what enters or leaves it. Name "
                "other blocks."
            )
    removed = _weakest(scores, ratio, scope)
    if not any(removed.values()):
        most = max(len(score) for score in scores.values())
        raise MethodNotApplicableError(
            f"ratio={ratio} removes none of the inner channels of {', '.join(segment.name for segment in segments)}, whose "
            f"largest layer has {most}. Give more, or tune the blocks whole: `subset`."
        )
    for (number, name), weakest in removed.items():
        if weakest:
            copies[number].remove(name, weakest)
    return [one.module.requires_grad_(False) for one in copies]


def _weakest(scores: Mapping[Any, Tensor], ratio: float, scope: str) -> dict[Any, list[int]]:
    """The channels to remove from every group: the share `ratio` of each, or of all together but at most `MOST` of each."""
    counts = {key: int(ratio * len(score)) for key, score in scores.items()}
    if scope == "global":
        every = torch.cat(list(scores.values())).sort().values
        bar = every[min(int(ratio * len(every)), len(every) - 1)]
        counts = {key: min(int((score < bar).sum()), math.floor(MOST * len(score))) for key, score in scores.items()}
    return {key: scores[key].argsort(stable=True)[:count].tolist() for key, count in counts.items()}


@dataclass
class _Bounds:
    """The indices that may still be followed for one group; a step counts as `STEP` of them."""

    left: int = 0


class _BoundedSteps(list[Any]):
    """Steps from some indices to those coupled to them, which raise ValueError once too many have been followed."""

    def __init__(self, steps: list[Any], bounds: _Bounds) -> None:
        super().__init__(steps)
        self.bounds = bounds

    def __setitem__(self, place: Any, step: Any) -> None:
        def run(indices: list[Any]) -> list[Any]:
            count = len(indices) * (1 if getattr(step, "reverse", True) else getattr(step, "_stride", 1))
            self.bounds.left -= STEP + count
            if self.bounds.left < 0:
                raise ValueError(f"more than {MOST_INDICES:,} indices of tensors are coupled to a channel")
            return step(indices)

        super().__setitem__(place, run if callable(step) else step)


class _Prunable:
    """A copy of a module whose layers can lose channels, together with all that is coupled to them."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.library = require("torch_pruning", "prune", "the method `pruned`", "torch-pruning")
        self.module, self.example = copy.deepcopy(module).cpu().eval().requires_grad_(True), example
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on parameters outside layers, which no inner group touches
            self.graph = self.library.DependencyGraph().build_dependency(self.module, example_inputs=example)
        self.bounds = _Bounds()
        for node in self.graph.module2node.values():
            for step in node.dependencies:
                step.index_mapping = _BoundedSteps(step.index_mapping, self.bounds)  # its items are set for each group

    def remove(self, name: str, channels: list[int]) -> None:
        """Remove some outputs of a layer and what is coupled to them."""
        self._group(self.module.get_submodule(name), channels).prune()

    def _group(self, layer: nn.Module, channels: list[int]) -> Any:
        """Some outputs of a layer and all that is coupled to them. Raises one of `UNFOLLOWED`."""
        self.bounds.left = MOST_INDICES
        return self.graph.get_pruning_group(layer, self.graph.get_pruner_of_module(layer).prune_out_channels, channels)

    def scores(self, norm: str, only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The mean norm of every inner channel over the layers coupled to it, relative to its group's mean, by the root."""
        importance = self.library.importance.MagnitudeImportance(p=1 if norm == "l1" else 2, normalizer="mean")
        names = {id(child): name for name, child in self.module.named_modules()}
        found, coupled = dict[str, Tensor](), set[Any]()
        for layer in list(self.graph.module2node):
            if not isinstance(layer, nn.Conv2d | nn.Linear) or layer in coupled:
                continue
            if only is not None and names[id(layer)] not in only:
                continue
            pruner = self.graph.get_pruner_of_module(layer)
            try:
                first = self._group(layer, [0])
            except UNFOLLOWED:
                continue
            outputs = [one for one in first if self.graph.is_out_channel_pruning_fn(one.dep.handler)]
            coupled |= {one.dep.target.module for one in outputs}
            if self._is_inner(names[id(layer)]):
                own = sorted({place for one in outputs if one.dep.target.module is layer for place in one.idxs})
                units = own[1] if len(own) > 1 else pruner.get_out_channels(layer)  # halves of a gate go together
                group = self._group(layer, list(range(units)))
                found[names[id(layer)]] = importance(group).detach()[:units]
        return found

    def _is_inner(self, name: str) -> bool:
        """True if the module still runs, to an output of the same shape, without a channel of this layer."""
        try:
            trial = _Prunable(self.module, self.example)
            trial.remove(name, [0])
            with torch.no_grad():
                return trial.module(self.example).shape == self.module(self.example).shape
        except UNFOLLOWED:
            return False


@register_graft(GRAFT, interpolates=False)
def shrink(variant: nn.Module, shapes: dict[str, list[int]]) -> nn.Module:
    """Give the named tensors of a block smaller shapes, and their layers the numbers of channels that go with them."""
    for name, shape in shapes.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = variant.get_submodule(owner_name)
        tensor = getattr(owner, leaf)
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
            raise ValueError(f"{name} cannot have the shape {shape!r}")
        if len(shape) != tensor.ndim or any(side > most for side, most in zip(shape, tensor.shape, strict=True)):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} cannot be pruned to {tuple(shape)}")
        new = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        setattr(owner, leaf, nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)
        if leaf == "weight":
            _resize(owner, shape)
    return variant


def _resize(layer: nn.Module, shape: list[int]) -> None:
    if isinstance(layer, nn.Conv2d):
        if layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1:
            layer.groups = shape[0]
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, _BatchNorm):
        layer.num_features = shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(shape)
    else:
        raise ValueError(f"a {type(layer).__name__} cannot be pruned")

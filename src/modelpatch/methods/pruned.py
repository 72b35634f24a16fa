"""Fine-tune blocks whose channels were pruned first: a patch that is smaller and faster than the blocks it replaces.

    keep the (1 - ratio) n channels of each group of coupled layers with the largest |W|_p,  then train what is left

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 4.2. Channels inside a block are
pruned; what enters and leaves it keeps its shape, so that the frozen blocks around it run on. Which layers are coupled
is found by Torch-Pruning (Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023).
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.errors import MethodNotApplicableError, MissingExtraError
from modelpatch.methods.blocks import find_segments, own_segments, start_at
from modelpatch.methods.method import register_method
from modelpatch.methods.subset import Subset
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft
from modelpatch.patch.model import PatchedModel

GRAFT = "pruned"
MOST = 0.9  # of a group's channels, where the ratio holds for all groups together


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
        """Adds the blocks' smaller tensors and owns the others.

        Raises `MethodNotApplicableError` for a block without inner channels, `MissingExtraError` without Torch-Pruning.
        """
        owned: list[str] = []
        grafts = []
        for segment, pruned in self._pruned(backbone):
            before, after = (dict((*m.named_parameters(), *m.named_buffers())) for m in (segment.module, pruned))
            shapes = {name: list(tensor.shape) for name, tensor in after.items() if tensor.shape != before[name].shape}
            added = {segment.tensor_names.get(name) for name in shapes}
            owned += [name for name in own_segments([segment], self.statistics).owned if name not in added]
            grafts.append(Graft(kind=GRAFT, start=segment.index, end=segment.index + 1, arguments={"shapes": shapes}))
        return Blueprint(owned=tuple(owned), grafts=tuple(grafts))

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Start at what pruning left of the base's values, or at random ones of the same shapes."""
        for segment, pruned in self._pruned(backbone):
            start_at(model, segment, self._reset(pruned) if self.reinitialize else pruned)

    def _pruned(self, backbone: Backbone) -> list[tuple[Segment, nn.Module]]:
        """The blocks and what is left of them, computed once a backbone."""
        segments = find_segments(backbone, self.blocks)
        key = (tuple(segment.index for segment in segments), self.ratio, self.scope, self.norm)
        known = _KNOWN.setdefault(backbone, {})
        if key not in known:
            known[key] = prune(segments, self.ratio, self.scope, self.norm)
        return list(zip(segments, known[key], strict=True))


_KNOWN: WeakKeyDictionary[Backbone, dict[Any, list[nn.Module]]] = WeakKeyDictionary()


def prune(segments: list[Segment], ratio: float, scope: str, norm: str) -> list[nn.Module]:
    """Copies of the segments' modules without their weakest inner channels.

    Raises `MethodNotApplicableError` for a segment that has none and a ratio that removes none, `MissingExtraError` without
    Torch-Pruning.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise MissingExtraError("torch-pruning", "prune", "the method `pruned`")
    copies = [_Prunable(segment) for segment in segments]
    scores = {(number, name): score for number, one in enumerate(copies) for name, score in one.scores(norm).items()}
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


class _Prunable:
    """A copy of a segment's module, and which of its layers' outputs can lose channels without changing what leaves it."""

    def __init__(self, segment: Segment) -> None:
        self.module, self.example = copy.deepcopy(segment.module).cpu().eval(), torch.zeros(1, *segment.input_shape)
        self.shape = (1, *segment.output_shape)
        self.graph = _graph(self.module, self.example)
        names = {id(child): name for name, child in self.module.named_modules()}
        groups = self.graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
        self.roots = [name for group in groups if self._inner(name := names[id(group[0].dep.target.module)])]

    def _inner(self, name: str) -> bool:
        """True if the module still runs, to an output of the same shape, without a channel of this layer."""
        trial = copy.deepcopy(self.module)
        try:
            _group(_graph(trial, self.example), trial.get_submodule(name), [0]).prune()
            with torch.no_grad():
                return tuple(trial(self.example).shape) == self.shape
        except (RuntimeError, ValueError, IndexError, AttributeError, AssertionError, TypeError):
            return False

    def scores(self, norm: str) -> dict[str, Tensor]:
        """The mean norm of every channel over the layers coupled to it, relative to its group's mean, by the group's root."""
        import torch_pruning as tp

        importance = tp.importance.MagnitudeImportance(p=1 if norm == "l1" else 2, normalizer="mean")
        result = {}
        for name in self.roots:
            layer = self.module.get_submodule(name)
            channels = list(range(len(layer.get_parameter("weight"))))
            result[name] = importance(_group(self.graph, layer, channels)).detach()
        return result

    def remove(self, name: str, channels: list[int]) -> None:
        if channels:
            _group(self.graph, self.module.get_submodule(name), channels).prune()


def _graph(module: nn.Module, example: Tensor) -> Any:
    import torch_pruning as tp

    module.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on parameters outside layers, which no inner group touches
        return tp.DependencyGraph().build_dependency(module, example_inputs=example)


def _group(graph: Any, layer: nn.Module, channels: list[int]) -> Any:
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels)


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
        if isinstance(tensor, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(new))
        else:
            owner.register_buffer(leaf, new)
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

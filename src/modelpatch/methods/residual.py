"""Residual blocks taken apart, and the stages in which their outputs can be wired anew.

block(x) = after(branch(x) + shortcut(x))          the sum is found in the block's own graph (ResNet, ConvNeXt, ...)
block(x) = (block(x) - x) + x                      a block of several sums in a row is one branch (transformers)
block(x) = block(x)                                no shortcut (the first block of a MobileNet group)
"""

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, Field
from torch import Tensor, fx, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain, channels_first
from modelpatch.backbone.clone import original_of
from modelpatch.backbone.steps import Steps
from modelpatch.backbone.trace import trace_calls
from modelpatch.errors import MethodError, MethodNotApplicableError, UntraceableBackboneError

Edge = tuple[int, int]
Cut = tuple[fx.Node, fx.Node, fx.Node]  # the node that adds branch and shortcut, and those two
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
GROUPS = 4  # stages that a run of transformer blocks is divided into
_STAGES: WeakKeyDictionary[Backbone, tuple["SkipStage", ...]] = WeakKeyDictionary()
_FORMS: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[str, type], ...], "Form"]] = WeakKeyDictionary()


class SplitBlock(nn.Module):
    """A block in two halves, bit for bit: `before` the sum, x to (branch, shortcut), and `after` it. Runs its modules."""

    shortcut = True

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = self.before(x)
        return self.after(branch + shortcut)


class WholeBlock(nn.Module):
    """A block whose branch is all that it adds to its input (`shortcut`), or all that it computes (no shortcut)."""

    def __init__(self, block: nn.Module, shortcut: bool) -> None:
        super().__init__()
        self.block, self.shortcut = block, shortcut

    def before(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.block(x) - x, x) if self.shortcut else (self.block(x), None)

    def after(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@dataclass(frozen=True)
class Form:
    """Wiring of a block: what it adds to what it computes; for a dense block its layers, which read all features before."""

    shortcut: Literal["none", "identity", "projection"]
    layers: tuple[str, ...] = ()
    cut: Cut | None = None


def split_block(block: nn.Module) -> SplitBlock | WholeBlock:
    """A block taken apart; the result shares its modules."""
    form = form_of(block)
    if form.cut is None:
        return WholeBlock(block, shortcut=form.shortcut == "identity")
    node, *operands = form.cut
    source = node.graph.find_nodes(op="placeholder")[0]
    return SplitBlock(_part(block, source, operands), _part(block, node, node.graph.output_node().all_input_nodes))


def form_of(block: nn.Module) -> Form:
    """The wiring of a block; one that torch.fx cannot follow is taken to have no shortcut.

    Tracing takes longer than all else that builds a model: clones with the modules of their original have its form.
    """
    original = original_of(block)
    kinds = tuple((name, type(module)) for name, module in block.named_modules())
    known, form = _FORMS.get(original, ((), Form("none")))
    if known != kinds:
        form = _trace_form(block)
        _FORMS[original] = kinds, form
    return form


def _trace_form(block: nn.Module) -> Form:
    try:
        graph = trace_calls(block)
    except UntraceableBackboneError:
        return Form("none")
    source = graph.find_nodes(op="placeholder")[0]
    if layers := _dense_layers(graph, source):
        return Form("none", layers)
    added = (node for node in graph.nodes if _adds_two(node) and not any(map(_is_slice, node.all_input_nodes)))
    sums = [node for node in added if all(source in _ancestors([one]) for one in node.all_input_nodes)]
    whole = isinstance(block, Steps) and not block.sizeless  # a half would keep what belongs to one size of images
    for node in reversed([] if whole else sums):
        if cut := _cut_at(node, source, block, sums):
            identity = _skip_identities(cut[2], block) is source
            return Form("identity" if identity else "projection", cut=cut)
    adds_input = any(_skip_identities(operand, block) is source for node in sums for operand in node.all_input_nodes)
    return Form("identity" if adds_input else "none")


def _is_slice(node: fx.Node) -> bool:
    """Return True for the first channels of a tensor, to which RexNet adds a narrower input."""
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, tuple) and isinstance(index[-1], slice) and not index[-1].start and bool(index[-1].stop)


def _dense_layers(graph: fx.Graph, source: fx.Node) -> tuple[str, ...]:
    """The layers of torch.cat([x, layer_1([x]), layer_2([x, ...]), ...], 1); empty for any other graph."""
    features = [source]
    for call in graph.nodes:
        if call.op == "call_module":
            if len(call.args) != 1 or not isinstance(call.args[0], list) or list(call.args[0]) != features:
                return ()
            features.append(call)
    result = graph.output_node().all_input_nodes
    joins = len(result) == 1 and result[0].target is torch.cat and result[0].all_input_nodes == features
    return tuple(str(call.target) for call in features[1:]) if joins else ()


def _adds_two(node: fx.Node) -> bool:
    """True if a node adds two tensors."""
    adds = node.op in ("call_function", "call_method") and node.target in ADDITIONS
    return adds and len(node.args) == len(node.all_input_nodes) == 2 and not node.kwargs


def _cut_at(node: fx.Node, source: fx.Node, block: nn.Module, sums: Collection[fx.Node]) -> Cut | None:
    """The cut at a sum, if all that the block computes passes through it, nothing with weights follows, and one operand
    is a path without sums and with fewer weights than the other: the shortcut."""
    after = _ancestors(node.graph.output_node().all_input_nodes, stop=node)
    if node not in after or source in after or _count_weights(after - {node}, block):
        return None
    weights = {operand: _count_weights(_ancestors([operand]), block) for operand in node.all_input_nodes}
    shortcut, branch = sorted(weights, key=weights.__getitem__)
    if weights[shortcut] == weights[branch] or not _ancestors([shortcut]).isdisjoint(sums):
        return None
    return node, branch, shortcut


def _ancestors(nodes: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
    """The nodes and all they are computed from, not looking beyond `stop`."""
    found, waiting = set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node is stop else node.all_input_nodes
    return found


def _count_weights(nodes: Iterable[fx.Node], block: nn.Module) -> int:
    """Parameters with two or more axes in the modules that the nodes call."""
    modules = [block.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return sum(parameter.ndim >= 2 for module in modules for parameter in module.parameters())


def _skip_identities(node: fx.Node, block: nn.Module) -> fx.Node:
    while node.op == "call_module" and isinstance(block.get_submodule(str(node.target)), nn.Identity):
        node = node.all_input_nodes[0]
    return node


def _part(block: nn.Module, source: fx.Node, results: Sequence[fx.Node]) -> fx.GraphModule:
    """The nodes from `source` to `results` as a module; one result is a tensor, several are a tuple."""
    needed = _ancestors(results, stop=source)
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in source.graph.nodes:  # in their own order, since some write in place
        if node in needed and node is not source:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    copied = tuple(copies[node] for node in results)
    graph.output(copied[0] if len(copied) == 1 else copied)
    return fx.GraphModule(block, graph, class_name="Part")


class Layout(BaseModel, frozen=True, extra="forbid"):
    """Axes of an activation: channels and positions.

    `tokens` are (B, N, C): `prefix` tokens without a position, then a grid of `height` x `width` of them (for images of
    another size a grid of the same proportions).
    """

    kind: Literal["channels-first", "channels-last", "tokens"] = "channels-first"
    prefix: int = Field(default=0, ge=0)
    height: int = Field(default=1, ge=1)
    width: int = Field(default=1, ge=1)

    @classmethod
    def of(cls, shape: tuple[int, ...], image: tuple[int, ...]) -> Self:
        """The layout of an activation of `shape`, without batch axis, in a network that reads images (C, H, W).

        Of tokens, the largest grid of square patches that they fill is the image; those before it have no position.
        """
        if len(shape) == 3:
            return cls(kind="channels-first" if channels_first(shape, image) else "channels-last")
        sides = (side for side in range(1, min(image[1:]) + 1) if image[1] % side == image[2] % side == 0)
        for side in sides:
            height, width = image[1] // side, image[2] // side
            if height * width <= shape[0]:
                return cls(kind="tokens", prefix=shape[0] - height * width, height=height, width=width)
        raise MethodNotApplicableError(
            f"the {shape[0]} tokens of a block do not cover an image of {image[1]} x {image[2]} pixels in square patches. "
            "Try the method `scale-bias` or `subset`."
        )

    @property
    def axis(self) -> int:
        """The axis of channels, behind the batch axis."""
        return 0 if self.kind == "channels-first" else -1

    def grid(self, x: Tensor) -> Tensor:
        """The activation as (B, C, H, W), without prefix tokens. Raises `MethodError` for tokens that fill no grid."""
        if self.kind == "channels-first":
            return x
        if self.kind == "channels-last":
            return x.permute(0, 3, 1, 2)
        count = x.shape[1] - self.prefix
        height = round(self.height * math.sqrt(count / (self.height * self.width)))
        if height == 0 or count % height:
            raise MethodError(
                f"{count} tokens do not fill a grid of proportions {self.height} to {self.width}, which the patch was made "
                "for. Give images of those proportions."
            )
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, (height, count // height))


@dataclass(frozen=True)
class SkipStage:
    """A run of segments `[start, end)` whose blocks' outputs n_1 ... n_k have one shape, so that skips can join them.

    `first` is 0 where the shortcut of the first block gives a node n_0, else 1. In a `dense` stage the nodes are the
    features that the layers of one dense block add.
    """

    start: int
    end: int
    first: int
    depth: int
    dense: bool = False

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All skips: k(k+1)/2 where there is a node n_0, else k(k-1)/2."""
        return skip_edges(self.first, self.depth)


def skip_edges(first: int, depth: int) -> tuple[Edge, ...]:
    """Every pair (i, j) of nodes with first <= i < j <= depth, by j, then i.

    >>> skip_edges(0, 2)
    ((0, 1), (0, 2), (1, 2))
    """
    return tuple((i, j) for j in range(first + 1, depth + 1) for i in range(first, j))


def stages_of(backbone: Backbone) -> tuple[SkipStage, ...]:
    """The stages that have at least one skip, in order. Raises `MethodNotApplicableError` for networks without any (VGG)."""
    if backbone in _STAGES:
        return _STAGES[backbone]
    stages: list[SkipStage] = []
    for block in backbone.chain.blocks:
        form = form_of(block.module) if len(block.output_shape) > 1 else Form("none")
        joins = form.shortcut == "identity" and block.input_shape == block.output_shape
        if joins and stages and stages[-1].end == block.index and not stages[-1].dense:
            stages[-1] = replace(stages[-1], end=block.index + 1, depth=stages[-1].depth + 1)
        elif form.layers:
            stages.append(SkipStage(block.index, block.index + 1, first=0, depth=len(form.layers), dense=True))
        else:
            stages.append(SkipStage(block.index, block.index + 1, first=int(form.shortcut == "none"), depth=1))
    found = tuple(part for stage in stages for part in _divide(stage, backbone.chain) if part.edges)
    if not found:
        raise MethodNotApplicableError(
            f"{backbone.spec} has no blocks that add their input, so there are no skips to weigh. Delta needs a residual, "
            "dense or transformer network. Try the method `scale-bias` or `subset`."
        )
    _STAGES[backbone] = found
    return found


def _divide(stage: SkipStage, chain: Chain) -> list[SkipStage]:
    """A run of transformer blocks in equal parts; other stages as they are."""
    if len(chain[stage.start].output_shape) != 2:
        return [stage]
    bounds = sorted({stage.start + round(part * stage.depth / GROUPS) for part in range(GROUPS + 1)})
    return [
        SkipStage(start, end, first=stage.first if start == stage.start else 0, depth=end - start)
        for start, end in itertools.pairwise(bounds)
    ]

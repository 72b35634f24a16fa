"""Residual blocks taken apart, and the stages in which their outputs can be wired anew.

    block(x) = after(branch(x) + shortcut(x))          the sum is found in the block's own graph (ResNet, ConvNeXt, ...)
    block(x) = (block(x) - x) + x                      a block of several sums in a row is one branch (transformers)
    block(x) = block(x)                                no shortcut (the first block of a MobileNet group)

Nothing depends on a network's family: which form a block has follows from how its children are wired.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from modelpatch.backbone.chain import Chain, Segment
from modelpatch.backbone.trace import trace_calls
from modelpatch.errors import UntraceableBackboneError

Edge = tuple[int, int]
Shortcut = Literal["none", "identity", "projection"]
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
ADD_METHODS = ("add", "add_")
GROUPS = 4  # stages that a run of transformer blocks is divided into


class SplitBlock(nn.Module):
    """A block in two halves: `before` the sum, x to (branch, shortcut), and `after` it. Runs the block's own modules."""

    shortcut = True

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The branch and the shortcut of `x`."""
        return self.before(x)

    def join(self, z: Tensor) -> Tensor:
        """The rest of the block, from the sum on."""
        return self.after(z)

    def forward(self, x: Tensor) -> Tensor:
        """The block itself, bit for bit."""
        branch, shortcut = self.before(x)
        return self.after(branch + shortcut)


class WholeBlock(nn.Module):
    """A block whose branch is all that it adds to its input (`shortcut`), or all that it computes (no shortcut)."""

    def __init__(self, block: nn.Module, shortcut: bool) -> None:
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.block(x) - x, x) if self.shortcut else (self.block(x), None)

    def join(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@dataclass(frozen=True)
class _Cut:
    """The cut of a block's graph: from `source`, its input, to the node that adds `branch` and `shortcut`."""

    source: fx.Node
    node: fx.Node
    branch: fx.Node
    shortcut: fx.Node


@dataclass(frozen=True)
class Form:
    """Wiring of a block: it adds its input, a projection of it, or nothing to what it computes; for a dense
    block the names of its layers, each of which reads the list of all features before it."""

    shortcut: Shortcut
    layers: tuple[str, ...] = ()
    cut: _Cut | None = None


def split_block(block: nn.Module) -> SplitBlock | WholeBlock:
    """A block taken apart; the result shares its modules."""
    form = form_of(block)
    if form.cut is None:
        return WholeBlock(block, shortcut=form.shortcut == "identity")
    before = _part(block, form.cut.source, [form.cut.branch, form.cut.shortcut])
    return SplitBlock(before, _part(block, form.cut.node, _result(form.cut.node.graph)))


def form_of(block: nn.Module) -> Form:
    """The wiring of a block; one that torch.fx cannot follow is taken to have no shortcut."""
    try:
        graph = trace_calls(block)
    except UntraceableBackboneError:
        return Form("none")
    source = next(node for node in graph.nodes if node.op == "placeholder")
    if layers := _dense_layers(graph, source):
        return Form("none", layers)
    sums = [node for node in graph.nodes if _is_sum(node, source)]
    for node in reversed(sums):
        if cut := _cut_at(node, source, block, sums):
            identity = _skip_identities(cut.shortcut, block) is source
            return Form("identity" if identity else "projection", cut=cut)
    adds_input = any(_skip_identities(operand, block) is source for node in sums for operand in node.all_input_nodes)
    return Form("identity" if adds_input else "none")


def _dense_layers(graph: fx.Graph, source: fx.Node) -> tuple[str, ...]:
    """The layers of torch.cat([x, layer_1([x]), layer_2([x, ...]), ...], 1); empty for any other graph."""
    features = [source]
    for call in graph.nodes:
        if call.op == "call_module":
            if len(call.args) != 1 or not isinstance(call.args[0], list) or list(call.args[0]) != features:
                return ()
            features.append(call)
    result = _result(graph)
    joins = len(result) == 1 and result[0].target is torch.cat and result[0].all_input_nodes == features
    return tuple(str(call.target) for call in features[1:]) if joins else ()


def _is_sum(node: fx.Node, source: fx.Node) -> bool:
    """True if a node adds two tensors that both come from the block's input."""
    functions = node.op == "call_function" and node.target in ADD_FUNCTIONS
    methods = node.op == "call_method" and node.target in ADD_METHODS
    if not (functions or methods) or len(node.args) != 2 or node.kwargs:
        return False
    return len(node.all_input_nodes) == 2 and all(source in _ancestors([other]) for other in node.all_input_nodes)


def _cut_at(node: fx.Node, source: fx.Node, block: nn.Module, sums: Collection[fx.Node]) -> _Cut | None:
    """The cut at a sum, if all that the block computes passes through it, nothing with weights follows, and one operand
    is a path without sums and with fewer weights than the other: the shortcut."""
    after = _ancestors(_result(node.graph), stop=node)
    if node not in after or source in after or _count_weights(after - {node}, block):
        return None
    weights = {operand: _count_weights(_ancestors([operand]), block) for operand in node.all_input_nodes}
    shortcut, branch = sorted(weights, key=weights.__getitem__)
    if weights[shortcut] == weights[branch] or not _ancestors([shortcut]).isdisjoint(sums):
        return None
    return _Cut(source, node, branch, shortcut)


def _result(graph: fx.Graph) -> list[fx.Node]:
    return next(node for node in graph.nodes if node.op == "output").all_input_nodes


def _ancestors(nodes: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
    """The nodes and all they are computed from, not looking beyond `stop`."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
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
        """All skips (i, j), first <= i < j <= k; k(k+1)/2 of them where there is a node n_0, else k(k-1)/2."""
        return skip_edges(self.first, self.depth)


def skip_edges(first: int, depth: int) -> tuple[Edge, ...]:
    """Every pair (i, j) of nodes with first <= i < j <= depth, by j, then i.

    >>> skip_edges(0, 2)
    ((0, 1), (0, 2), (1, 2))
    """
    return tuple((i, j) for j in range(first + 1, depth + 1) for i in range(first, j))


def find_stages(chain: Chain) -> tuple[SkipStage, ...]:
    """The stages of a chain that have at least one skip, in order; none for networks without shortcuts (VGG)."""
    stages: list[SkipStage] = []
    for block in chain.blocks:
        form = form_of(block.module) if len(block.output_shape) > 1 else Form("none")
        if stages and form.shortcut == "identity" and _continues(stages[-1], block, chain):
            stages[-1] = replace(stages[-1], end=block.index + 1, depth=stages[-1].depth + 1)
        elif form.layers:
            stages.append(SkipStage(block.index, block.index + 1, first=0, depth=len(form.layers), dense=True))
        else:
            stages.append(SkipStage(block.index, block.index + 1, first=int(form.shortcut == "none"), depth=1))
    divided = [part for stage in stages for part in _divide(stage, chain)]
    return tuple(stage for stage in divided if stage.edges)


def _continues(stage: SkipStage, block: Segment, chain: Chain) -> bool:
    """True if a block that adds its input follows the stage at once and keeps the shape of its nodes."""
    same = block.input_shape == block.output_shape == chain[stage.end - 1].output_shape
    return same and not stage.dense and stage.end == block.index


def _divide(stage: SkipStage, chain: Chain) -> list[SkipStage]:
    """A run of transformer blocks in equal parts; other stages as they are."""
    if len(chain[stage.start].output_shape) != 2:
        return [stage]
    bounds = sorted({stage.start + round(part * stage.depth / GROUPS) for part in range(GROUPS + 1)})
    return [
        SkipStage(start, end, first=stage.first if start == stage.start else 0, depth=end - start)
        for start, end in itertools.pairwise(bounds)
    ]

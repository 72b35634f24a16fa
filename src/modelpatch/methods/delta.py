"""Δ-Networks: a frozen network whose skip connections are weighed anew for every input.

    x ──┬─────────────> Δ ──> λ (B, p), one weight a sample and edge
        ├─> M_1 ─> + ─> n_1 ─> M_2 ─> + ─> n_2 ─> ...          z_j = M_j(n_{j-1}) + Σ_{i<j} λ_ij n_i
        └──────────┴─────────────────┘                         n_j = act(z_j),   λ = Δ(x) in (0, 1)^p,   p = k(k+1)/2

One Δ-module, a small convolutional network, reads the input x of a stage of k blocks and weighs every pair of nodes i < j
of it. n_0 is the shortcut of the first block, where it has one; M_1 reads x itself. The frozen network is λ = 1 on the skips
that it has and 0 on all others. In a dense stage layer j reads cat(λ_0j n_0, ..., λ_{j-1,j} n_{j-1}), and has all skips.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), arXiv:2303.14772, equations 3 to 6 and the ablations
of Table 5.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import count_macs
from modelpatch.errors import MethodError
from modelpatch.methods.method import Method, Optimizer, register_method
from modelpatch.methods.residual import Edge, Layout, SkipStage, form_of, skip_edges, split_block, stages_of
from modelpatch.patch.blueprint import Blueprint, Graft, Span, register_graft
from modelpatch.patch.model import PatchedModel
from modelpatch.text import count_of

GRAFT = "delta"
MAX_CHANNELS = 8192  # a file that asks for more is refused before memory is
Skips = Literal["conditioned", "existing", "all", "learned", "random", "unchanged"]


class StageSettings(BaseModel, frozen=True, extra="forbid"):
    """One stage as a patch file describes it: `channels` of its input, `width` of its nodes, and the method's options."""

    skips: Skips
    batch_norm: bool
    channels: int = Field(ge=1, le=MAX_CHANNELS)
    width: int = Field(ge=1, le=MAX_CHANNELS)
    layout: Layout


class Norm(_BatchNorm):
    """BatchNorm of an activation of any number of axes. It counts no batches: all its buffers are numbers of a patch."""

    def __init__(self, channels: int, axis: int = 1) -> None:
        super().__init__(channels)
        self.axis = axis
        self.register_buffer("num_batches_tracked", None)

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()  # type: ignore[union-attr]
        self.running_var.fill_(1)  # type: ignore[union-attr]

    def forward(self, input: Tensor) -> Tensor:
        """A batch with one value a channel has no variance: it is normalised by the running statistics."""
        training = self.training and input.numel() > self.num_features
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        momentum = 0.0 if self.momentum is None else self.momentum
        y = F.batch_norm(input.movedim(self.axis, 1), *statistics, training, momentum, self.eps)
        return y.movedim(1, self.axis)


class DeltaModule(nn.Module):
    """λ = sigmoid(Linear(GAP(ReLU(BN(Conv(ReLU(BN(Conv(x))))))))): a stage's input to weights (B, p) in (0, 1).

    Both convolutions are 3x3 without bias and C/2 wide: 6.75 C² + 2 C + (C/2 + 1) p parameters.
    """

    def __init__(self, channels: int, edges: int, layout: Layout | None = None) -> None:
        super().__init__()
        half = max(channels // 2, 1)
        self.layout = layout or Layout()
        self.conv1 = nn.Conv2d(channels, half, 3, padding=1, bias=False)
        self.norm1 = Norm(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.norm2 = Norm(half)
        self.linear = nn.Linear(half, edges)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(self.layout.grid(x))))
        y = F.relu(self.norm2(self.conv2(y)))
        return torch.sigmoid(self.linear(y.mean((2, 3))))

    def start_near(self, weights: list[float]) -> None:
        """Start at about the given weights whatever the input: W = 0, b = +4 for a weight of 1 and -4 for 0."""
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor(weights) * 8 - 4)


class FixedWeights(nn.Module):
    """λ (B, p) whatever the input: 1; learned, started at 1; or drawn from U(0, 1) for every sample in every pass."""

    def __init__(self, edges: int, skips: Skips) -> None:
        super().__init__()
        self.edges, self.random = edges, skips == "random"
        self.weights = nn.Parameter(torch.ones(edges)) if skips in ("existing", "learned") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.random:
            return torch.rand(len(x), self.edges, dtype=x.dtype, device=x.device)
        return x.new_ones(len(x), self.edges) if self.weights is None else self.weights.expand(len(x), -1)


class DeltaStage(nn.Module, ABC):
    """A stage with a weighted skip on each of its `edges` (i, j); `existing` says which of them the frozen network has.

    `strength` α turns the patch after training: λ_α = (1 - α) λ_frozen + α λ, and likewise for the BatchNorm of z. At 0
    the `frozen` stage runs.
    """

    strength: float = 1.0

    def __init__(self, frozen: nn.Module, settings: StageSettings, first: int, depth: int, dense: bool) -> None:
        super().__init__()
        edges: tuple[Edge, ...] = skip_edges(first, depth)
        if not edges:
            raise ValueError("the blocks have no skip between them")
        if settings.skips in ("existing", "unchanged") and not dense:
            edges = tuple((i, j) for i, j in edges if j == i + 1)
        self.edges = edges
        self.existing = tuple(dense or j == i + 1 for i, j in edges)
        self.delta: nn.Module = FixedWeights(len(edges), settings.skips)
        if settings.skips == "conditioned":
            self.delta = DeltaModule(settings.channels, len(edges), settings.layout)
        axis = settings.layout.axis or 1
        norms = [Norm(settings.width, axis) if settings.batch_norm else nn.Identity() for _ in range(depth)]
        self.norms = nn.ModuleList(norms)
        self.frozen: Any = frozen
        nodes = range(1, depth + 1)
        self._incoming = {j: [(number, i) for number, (i, k) in enumerate(edges) if k == j] for j in nodes}

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) if self.strength == 0 else self.mix(x, self.weights(x))

    def weights(self, x: Tensor) -> Tensor:
        """λ (B, p) for a stage input x, at the present strength."""
        weights = self.delta(x)
        if self.strength == 1:
            return weights
        return torch.lerp(weights.new_tensor(self.existing), weights, self.strength)

    @abstractmethod
    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """The stage with given weights (B, p) on its skips."""

    def _normalise(self, z: Tensor, j: int) -> Tensor:
        y = self.norms[j - 1](z)
        return y if self.strength == 1 or y is z else torch.lerp(z, y, self.strength)


def _each(weight: Tensor, node: Tensor) -> Tensor:
    """One number a sample (B,), shaped to multiply a node (B, ...)."""
    return weight.view(-1, *[1] * (node.ndim - 1))


class ResidualStage(DeltaStage):
    """z_j = M_j(n_{j-1}) + Σ_{i<j} λ_ij n_i over the blocks of a stage."""

    def __init__(self, blocks: list[nn.Module], settings: StageSettings) -> None:
        parts = [split_block(block) for block in blocks]
        first = int(not parts[0].shortcut)
        super().__init__(nn.Sequential(*parts), settings, first, depth=len(parts), dense=False)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        nodes: dict[int, Tensor] = {}
        for j, block in enumerate(self.frozen, 1):
            z, shortcut = block.before(x)
            if j == 1 and shortcut is not None:
                nodes[0] = shortcut
            for number, i in self._incoming[j]:
                z = torch.addcmul(z, _each(weights[:, number], z), nodes[i])  # faster than a product and a sum
            nodes[j] = x = block.after(self._normalise(z, j))
        return x


class DenseStage(DeltaStage):
    """n_j = M_j(cat(λ_0j n_0, ..., λ_{j-1,j} n_{j-1})); the output is cat(n_0, ..., n_k), as in the frozen block."""

    def __init__(self, block: nn.Module, layers: tuple[str, ...], settings: StageSettings) -> None:
        super().__init__(block, settings, first=0, depth=len(layers), dense=True)
        self.layers = layers

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        nodes = {0: x}
        for j, name in enumerate(self.layers, 1):
            layer = self.frozen.get_submodule(name)
            features = [_each(weights[:, number], nodes[i]) * nodes[i] for number, i in self._incoming[j]]
            nodes[j] = self._normalise(layer(features), j)
        return torch.cat(list(nodes.values()), 1)


@register_graft(GRAFT)
def build_stage(variant: nn.Module, **arguments: Any) -> DeltaStage:
    """The stage whose blocks `variant` holds: a `Sequential` of several, or one block."""
    settings = StageSettings.model_validate(arguments)
    blocks = list(variant) if type(variant) is nn.Sequential else [variant]  # not a block that is a kind of one
    if len(blocks) == 1 and (layers := form_of(blocks[0]).layers):
        return DenseStage(blocks[0], layers, settings)
    return ResidualStage(blocks, settings)


@register_method
class DeltaNetwork(Method):
    """Trains Δ-modules that weigh the skips within the last `modules` stages (a number or `all`), and the head.

    A stage is a run of blocks whose outputs have one shape; transformer blocks are divided into four stages. `stages`
    names them instead: by what their blocks' names begin with (`layer4`), or by number among the stages that have skips
    (`stage0`, `stage-1`). `start` is the Δ-modules' PyTorch initialisation, where every λ is about 0.5 (`random`), or
    λ near the frozen network's (`identity`). `batch_norm` normalises every z_j before its activation; the scale and shift of
    these norms learn at `norm_lr` (None: ten times `lr`; like all scales and shifts they want a high rate).

    `skips` chooses what weighs the skips (Table 5): the Δ-modules (`conditioned`); one learned weight for each skip the
    network has (`existing`) or for every pair of nodes (`learned`), started at 1; 1 everywhere (`all`); or numbers drawn
    from U(0, 1) for every sample in every pass, at inference too (`random`); or nothing (`unchanged`).
    """

    name = "delta"
    paper = "Devaguptapu et al., Δ-Networks for Efficient Model Patching, 2023"
    order = 6
    compared = ("delta", "delta(modules=all,batch_norm=true)")
    searched = ("delta",)
    rewires = True

    lr: PositiveFloat = 3e-3
    optimizer: Optimizer = "adam"
    modules: PositiveInt | Literal["all"] = 1
    stages: tuple[str, ...] = ()
    skips: Skips = "conditioned"
    batch_norm: bool = False
    norm_lr: PositiveFloat | None = None
    start: Literal["random", "identity"] = "random"

    def changes(self, backbone: Backbone) -> Blueprint:
        if self.stages and self.modules != 1:
            raise MethodError(
                f"delta: modules={self.modules} and stages={','.join(self.stages)} contradict each other. Set one of them."
            )
        if self.norm_lr is not None and not self.batch_norm:
            raise MethodError(f"delta: norm_lr={self.norm_lr} is for batch_norm=True. Set both or neither.")
        if self.start == "identity" and self.skips != "conditioned":
            raise MethodError(f"delta: start='identity' is for Δ-modules; skips={self.skips!r} has none. Drop one.")
        return Blueprint(grafts=tuple(self._graft(backbone, stage) for stage in self._choose(backbone)))

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        if self.start == "identity":
            for stage in delta_stages(model):
                stage.delta.start_near([float(existing) for existing in stage.existing])  # type: ignore[operator]

    def rate(self, name: str) -> float:
        if re.match(r"graft/\d+-\d+/norms\.", name):
            return 10 * self.lr if self.norm_lr is None else self.norm_lr
        return super().rate(name)

    def sizes(self, backbone: Backbone) -> list[tuple[str, Method]]:
        counts = range(1, len(stages_of(backbone)) + 1)
        return [(f"with {count_of(count, 'module')}", replace(self, modules=count)) for count in counts]

    def _choose(self, backbone: Backbone) -> list[SkipStage]:
        found = stages_of(backbone)
        names = [[segment.name for segment in backbone.chain[stage.start : stage.end]] for stage in found]
        spans = [blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}" for blocks in names]
        listed = ", ".join(f"stage{number} ({span})" for number, span in enumerate(spans))
        count = len(found) if self.modules == "all" else self.modules
        if count > len(found):
            raise MethodError(
                f"delta: modules={count}, but {backbone.spec} has {len(found)} stages with skips: {listed}."
            )
        numbers = {f"stage{n}": {n % len(found)} for n in range(-len(found), len(found))}
        chosen: set[int] = set()
        for name in self.stages:
            within = {n for n, blocks in enumerate(names) if all(f"{one}.".startswith(f"{name}.") for one in blocks)}
            if not within and name not in numbers:
                raise MethodError(f"delta: {name!r} names no stage of {backbone.spec} with skips. Stages: {listed}.")
            chosen |= within or numbers[name]
        return [found[n] for n in sorted(chosen)] if self.stages else list(found[-count:])

    def _graft(self, backbone: Backbone, stage: SkipStage) -> Graft:
        shape, output = backbone.chain[stage.start].input_shape, backbone.chain[stage.end - 1].output_shape
        layout = Layout.of(shape, backbone.input_size)
        channels, width = shape[layout.axis], output[layout.axis]
        settings = StageSettings(
            skips=self.skips,
            batch_norm=self.batch_norm,
            channels=channels,
            width=(width - channels) // stage.depth if stage.dense else width,
            layout=layout,
        )
        return Graft(kind=GRAFT, start=stage.start, end=stage.end, arguments=settings.model_dump())


@dataclass(frozen=True)
class DeltaCost:
    """The cost of `modules` Δ-modules on the last stages: parameters, and multiply-adds for one image."""

    modules: int
    parameters: int
    macs: int


def delta_costs(backbone: Backbone) -> tuple[DeltaCost, ...]:
    """The cost of each possible number of Δ-modules on a backbone, head excluded. Nothing is allocated or trained."""
    costs: list[DeltaCost] = []
    parameters = macs = 0
    for number, stage in enumerate(reversed(stages_of(backbone)), 1):
        shape = backbone.chain[stage.start].input_shape
        with torch.device("meta"):
            layout = Layout.of(shape, backbone.input_size)
            module = DeltaModule(shape[layout.axis], len(stage.edges), layout)
            macs += count_macs(module, shape)
        parameters += sum(parameter.numel() for parameter in module.parameters())
        costs.append(DeltaCost(number, parameters, macs))
    return tuple(costs)


@dataclass(frozen=True)
class SkipWeights:
    """The λ that a stage over the segments `span` gave its `edges` (i, j): `weights` (B, p) for B images.

    `existing` says which edges the frozen network has, `moments` (k, 2) are mean and mean square of z_1 ... z_k.
    """

    span: Span
    edges: tuple[Edge, ...]
    existing: tuple[bool, ...]
    weights: Tensor
    moments: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64))

    @classmethod
    def join(cls, records: Sequence[Self]) -> Self:
        """The record of all images of several records of one stage."""
        weights = torch.cat([one.weights.cpu() for one in records])
        moments = torch.stack([len(one.weights) * one.moments for one in records]).sum(0)
        return replace(records[0], weights=weights, moments=moments / len(weights))

    @property
    def variances(self) -> list[float]:
        """The variance of z_1 ... z_k (equations 5 and 6)."""
        mean, square = self.moments.unbind(1)
        return list((square - mean**2).tolist())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: each edge with its mean and standard deviation over the images, each node's variance."""
        mean, deviation = self.weights.mean(0).tolist(), self.weights.std(0, correction=0).tolist()
        rows = zip(self.edges, self.existing, mean, deviation, strict=True)
        keys = ("from", "to", "existing", "mean", "deviation")
        return {
            "span": list(self.span),
            "edges": [dict(zip(keys, (*edge, *rest), strict=True)) for edge, *rest in rows],
            "variances": self.variances,
        }


def delta_stages(model: nn.Module) -> list[DeltaStage]:
    """The stages of a model whose skips are weighed, in order."""
    return [module for module in model.modules() if isinstance(module, DeltaStage)]


@torch.no_grad()
def skip_weights(model: PatchedModel, images: Tensor) -> list[SkipWeights]:
    """λ and the moments of z of every patched stage for normalised images (B, C, H, W), in the stages' order.

    Raises `MethodError` for a model that weighs no skips.
    """
    parts = zip(model.spans, model.variants, strict=True)
    found = [(span, stage) for span, part in parts for stage in delta_stages(part)]
    if not found:
        raise MethodError("the model weighs no skips. Give one that a patch of the method `delta` made.")
    weights: dict[nn.Module, Tensor] = {}
    moments: dict[nn.Module, tuple[float, float]] = {}

    def weigh(stage: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights[stage] = stage.weights(inputs[0])  # type: ignore[operator]

    def measure(norm: nn.Module, inputs: Any, z: Tensor) -> None:
        variance, mean = (one.item() for one in torch.var_mean(z.float(), correction=0))
        moments[norm] = mean, variance + mean**2

    with ExitStack() as hooks:
        for _, stage in found:
            hooks.callback(stage.register_forward_pre_hook(weigh).remove)
            for norm in stage.norms:
                hooks.callback(norm.register_forward_hook(measure).remove)
        model(images)
    records = []
    for span, stage in found:
        own = torch.tensor([moments[norm] for norm in stage.norms if norm in moments], dtype=torch.float64)
        records.append(SkipWeights(span, stage.edges, stage.existing, weights[stage], own.view(-1, 2)))
    return records


def skip_variances(model: PatchedModel, images: Tensor) -> list[list[float]]:
    """The variance of z_1 ... z_k for every patched stage (see `SkipWeights.variances`)."""
    return [record.variances for record in skip_weights(model, images)]

"""One stage of a network with its skips weighed anew: the modules that a Δ-Network adds to a backbone.

    x ──┬─────────────> Δ ──> λ (B, p), one weight a sample and edge
        ├─> M_1 ─> + ─> n_1 ─> M_2 ─> + ─> n_2 ─> ...          z_j = M_j(n_{j-1}) + Σ_{i<j} λ_ij n_i
        └──────────┴─────────────────┘                         n_j = act(z_j)

n_0 is the shortcut of the first block, where it has one; M_1 reads x itself. The frozen network is λ = 1 on the skips
that it has and 0 on all others. In a dense stage layer j reads cat(λ_0j n_0, ..., λ_{j-1,j} n_{j-1}), and has all skips.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.errors import MethodError
from modelpatch.methods.residual import Edge, form_of, skip_edges, split_block
from modelpatch.patch.blueprint import register_graft

GRAFT = "delta"
MAX_CHANNELS = 8192  # a file that asks for more is refused before memory is
Skips = Literal["conditioned", "existing", "all", "learned", "random", "unchanged"]


class Layout(BaseModel):
    """Axes of an activation: channels and positions.

    `tokens` are (B, N, C): `prefix` tokens without a position, then a grid of `height` x `width` of them (for images of
    another size a grid of the same proportions).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["channels-first", "channels-last", "tokens"] = "channels-first"
    prefix: int = Field(default=0, ge=0)
    height: int = Field(default=1, ge=1)
    width: int = Field(default=1, ge=1)

    @property
    def channel_axis(self) -> int:
        return 1 if self.kind == "channels-first" else -1

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


class StageSettings(BaseModel):
    """One stage as a patch file describes it: `channels` of its input, `width` of its nodes, and the method's options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        """Mean 0, variance 1."""
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
    """A stage in which every node is joined to every later one by a weighted skip.

    `edges` (i, j) are in the order of the weights; `existing` says which of them the frozen network has. `strength` α
    turns the patch after training: λ_α = (1 - α) λ_frozen + α λ, and likewise for the BatchNorm of z. At 0, base mode, the
    untouched blocks run.
    """

    strength: float = 1.0

    def __init__(self, settings: StageSettings, first: int, depth: int, dense: bool) -> None:
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
        axis = settings.layout.channel_axis
        norms = [Norm(settings.width, axis) if settings.batch_norm else nn.Identity() for _ in range(depth)]
        self.norms = nn.ModuleList(norms)
        nodes = range(1, depth + 1)
        self._incoming = {j: [(number, i) for number, (i, k) in enumerate(edges) if k == j] for j in nodes}

    def forward(self, x: Tensor) -> Tensor:
        return self.untouched(x) if self.strength == 0 else self.mix(x, self.weights(x))

    def weights(self, x: Tensor) -> Tensor:
        """λ (B, p) for a stage input x, at the present strength."""
        weights = self.delta(x)
        if self.strength == 1:
            return weights
        return torch.lerp(weights.new_tensor(self.existing), weights, self.strength)

    @abstractmethod
    def untouched(self, x: Tensor) -> Tensor:
        """The frozen stage."""

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
        super().__init__(settings, first=int(not parts[0].shortcut), depth=len(parts), dense=False)
        self.blocks = nn.ModuleList(parts)

    def untouched(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        nodes: dict[int, Tensor] = {}
        for j, block in enumerate(self.blocks, 1):
            z, shortcut = block.split(x)  # type: ignore[operator]
            if j == 1 and shortcut is not None:
                nodes[0] = shortcut
            for number, i in self._incoming[j]:
                z = torch.addcmul(z, _each(weights[:, number], z), nodes[i])  # faster than a product and a sum
            nodes[j] = x = block.join(self._normalise(z, j))  # type: ignore[operator]
        return x


class DenseStage(DeltaStage):
    """n_j = M_j(cat(λ_0j n_0, ..., λ_{j-1,j} n_{j-1})); the output is cat(n_0, ..., n_k), as in the frozen block."""

    def __init__(self, block: nn.Module, layers: tuple[str, ...], settings: StageSettings) -> None:
        super().__init__(settings, first=0, depth=len(layers), dense=True)
        self.block = block
        self.layers = layers

    def untouched(self, x: Tensor) -> Tensor:
        return self.block(x)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        nodes = {0: x}
        for j, name in enumerate(self.layers, 1):
            layer = self.block.get_submodule(name)
            features = [_each(weights[:, number], nodes[i]) * nodes[i] for number, i in self._incoming[j]]
            nodes[j] = self._normalise(layer(features), j)
        return torch.cat(list(nodes.values()), 1)


@register_graft(GRAFT)
def build_stage(variant: nn.Module, **arguments: Any) -> DeltaStage:
    """The stage whose blocks `variant` holds: a `Sequential` of several, or one block."""
    settings = StageSettings.model_validate(arguments)
    blocks = list(variant) if isinstance(variant, nn.Sequential) else [variant]
    if len(blocks) == 1 and (layers := form_of(blocks[0]).layers):
        return DenseStage(blocks[0], layers, settings)
    return ResidualStage(blocks, settings)

"""Δ-Networks: a frozen network whose skip connections are weighed anew for every input.

    z_j = M_j(n_{j-1}) + Σ_{i<j} λ_ij n_i,   n_j = act(z_j),   λ = Δ(x) in (0, 1)^p,   p = k(k+1)/2

One Δ-module, a small convolutional network, reads the input x of a stage of k blocks and gives every pair of nodes
i < j of that stage a weight, its own for each sample; skips that the network has are weighed instead of kept. With
λ = 1 on those and 0 on all others it is the frozen network.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), arXiv:2303.14772, equations 3 to 6 and the ablations
of Table 5. `delta_stage.py` holds the modules, `residual.py` finds the stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import channels_first, count_macs
from modelpatch.errors import MethodError, MethodNotApplicableError
from modelpatch.methods.delta_stage import GRAFT, DeltaModule, DeltaStage, Layout, Skips, StageSettings
from modelpatch.methods.method import Method, Optimizer, register_method
from modelpatch.methods.residual import Edge, SkipStage, find_stages
from modelpatch.patch.blueprint import Blueprint, Graft, Span
from modelpatch.patch.model import PatchedModel


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
    from U(0, 1) for every sample in every pass, at inference too (`random`). `unchanged` leaves the skips as they are: with
    `batch_norm` it says what those norms alone do.
    """

    name = "delta"
    paper = "Devaguptapu et al., Δ-Networks for Efficient Model Patching, 2023"
    order = 6
    compared = ("delta", "delta(modules=all,batch_norm=true)")
    searched = ("delta",)
    rewires = True

    lr: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Optimizer = "adam"
    modules: PositiveInt | Literal["all"] = 1
    stages: tuple[str, ...] = ()
    skips: Skips = "conditioned"
    batch_norm: bool = False
    norm_lr: PositiveFloat | None = None
    start: Literal["random", "identity"] = "random"

    def changes(self, backbone: Backbone) -> Blueprint:
        """Adds a `DeltaStage` over each chosen stage; owns no tensor of the backbone."""
        if self.stages and self.modules != 1:
            raise MethodError(
                f"delta: modules={self.modules} and stages={','.join(self.stages)} contradict each other. Set one of them."
            )
        if self.norm_lr is not None and not self.batch_norm:
            raise MethodError(f"delta: norm_lr={self.norm_lr} is for batch_norm=True. Set both or neither.")
        if self.start == "identity" and self.skips != "conditioned":
            raise MethodError(
                f"delta: start='identity' is how Δ-modules start; skips={self.skips!r} has none. Drop one of them."
            )
        return Blueprint(grafts=tuple(self._graft(backbone, stage) for stage in self._choose(backbone)))

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Start the Δ-modules as `start` says."""
        if self.start == "identity":
            for stage in delta_stages(model):
                stage.delta.start_near([float(existing) for existing in stage.existing])  # type: ignore[operator]

    def rate(self, name: str) -> float:
        """The scales and shifts of the norms behind z_j learn at their own rate."""
        if re.match(r"graft/\d+-\d+/norms\.", name):
            return 10 * self.lr if self.norm_lr is None else self.norm_lr
        return super().rate(name)

    def sizes(self, backbone: Backbone) -> list[tuple[str, Method]]:
        """The method with every number of modules."""
        counts = range(1, len(stages_of(backbone)) + 1)
        return [(f"with {count} module{'s' if count > 1 else ''}", replace(self, modules=count)) for count in counts]

    def _choose(self, backbone: Backbone) -> tuple[SkipStage, ...]:
        found = stages_of(backbone)
        if self.stages:
            chosen = {stage for name in self.stages for stage in _find(backbone, found, name)}
            return tuple(stage for stage in found if stage in chosen)
        count = len(found) if self.modules == "all" else self.modules
        if count > len(found):
            listed = _list(backbone, found)
            raise MethodError(
                f"delta: modules={count}, but {backbone.spec} has {len(found)} stages with skips: {listed}."
            )
        return found[-count:]

    def _graft(self, backbone: Backbone, stage: SkipStage) -> Graft:
        shape, output = (backbone.chain[stage.start].input_shape, backbone.chain[stage.end - 1].output_shape)
        layout = layout_of(shape, backbone.input_size)
        channels, width = shape[_axis(layout)], output[_axis(layout)]
        settings = StageSettings(
            skips=self.skips,
            batch_norm=self.batch_norm,
            channels=channels,
            width=(width - channels) // stage.depth if stage.dense else width,
            layout=layout,
        )
        return Graft(kind=GRAFT, start=stage.start, end=stage.end, arguments=settings.model_dump())


def stages_of(backbone: Backbone) -> tuple[SkipStage, ...]:
    """The stages of a backbone that have skips. Raises `MethodNotApplicableError` if there are none."""
    found = find_stages(backbone.chain)
    if not found:
        raise MethodNotApplicableError(
            f"{backbone.spec} has no blocks that add their input, so there are no skips to weigh. Delta needs a residual, "
            "dense or transformer network. Try the method `scale-bias` or `subset`."
        )
    return found


def _find(backbone: Backbone, stages: tuple[SkipStage, ...], name: str) -> list[SkipStage]:
    """The stages a name means. Raises `MethodError` for a name that means none."""
    names = [[segment.name for segment in backbone.chain[stage.start : stage.end]] for stage in stages]
    found = [
        stage
        for stage, blocks in zip(stages, names, strict=True)
        if all(block == name or block.startswith(name + ".") for block in blocks)
    ]
    numbers = {f"stage{n}": stages[n] for n in range(-len(stages), len(stages))}
    if not found and name in numbers:
        return [numbers[name]]
    if not found:
        raise MethodError(
            f"delta: {name!r} names no stage of {backbone.spec} with skips. Its stages: {_list(backbone, stages)}."
        )
    return found


def _list(backbone: Backbone, stages: tuple[SkipStage, ...]) -> str:
    names = [(backbone.chain[stage.start].name, backbone.chain[stage.end - 1].name) for stage in stages]
    spans = [first if first == last else f"{first} to {last}" for first, last in names]
    return ", ".join(f"stage{number} ({span})" for number, span in enumerate(spans))


def layout_of(shape: tuple[int, ...], image: tuple[int, ...]) -> Layout:
    """The layout of an activation of `shape`, without batch axis, in a network that reads images (C, H, W).

    Of tokens, the largest grid of square patches that they fill is the image; those before it have no position.
    """
    if len(shape) == 3:
        return Layout(kind="channels-first" if channels_first(shape, image) else "channels-last")
    sides = (side for side in range(1, min(image[1:]) + 1) if image[1] % side == image[2] % side == 0)
    for side in sides:
        height, width = image[1] // side, image[2] // side
        if height * width <= shape[0]:
            return Layout(kind="tokens", prefix=shape[0] - height * width, height=height, width=width)
    raise MethodNotApplicableError(
        f"the {shape[0]} tokens of a block do not cover an image of {image[1]} x {image[2]} pixels in square patches. "
        "Try the method `scale-bias` or `subset`."
    )


def _axis(layout: Layout) -> int:
    """The axis of channels in a shape without batch axis."""
    return 0 if layout.kind == "channels-first" else -1


@dataclass(frozen=True)
class DeltaCost:
    """The cost of `modules` Δ-modules on the last stages: parameters, and multiply-adds for one image."""

    modules: int
    parameters: int
    macs: int


def delta_costs(backbone: Backbone) -> tuple[DeltaCost, ...]:
    """The dial between size and capacity: what each possible number of Δ-modules adds to a backbone, head excluded.

    The multiply-adds are those of the modules' convolutions and linear layers. Nothing is allocated or trained.
    """
    costs: list[DeltaCost] = []
    parameters = macs = 0
    for number, stage in enumerate(reversed(stages_of(backbone)), 1):
        shape = backbone.chain[stage.start].input_shape
        with torch.device("meta"):
            layout = layout_of(shape, backbone.input_size)
            module = DeltaModule(shape[_axis(layout)], len(stage.edges), layout)
            macs += count_macs(module, shape)
        parameters += sum(parameter.numel() for parameter in module.parameters())
        costs.append(DeltaCost(number, parameters, macs))
    return tuple(costs)


@dataclass(frozen=True)
class SkipWeights:
    """The λ that a stage over the segments `span` gave its `edges` (i, j): `weights` (B, p) for B images.

    `existing` says which of the edges the frozen network has. `moments` (k, 2) are mean and mean square of z_1 ... z_k, as
    they enter their activations, over the same images.
    """

    span: Span
    edges: tuple[Edge, ...]
    existing: tuple[bool, ...]
    weights: Tensor
    moments: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64))

    @classmethod
    def join(cls, records: Sequence[SkipWeights]) -> SkipWeights:
        """The record of all images of several records of one stage."""
        weights = torch.cat([one.weights.cpu() for one in records])
        moments = torch.stack([len(one.weights) * one.moments for one in records]).sum(0)
        return replace(records[0], weights=weights, moments=moments / len(weights))

    @property
    def variances(self) -> list[float]:
        """The variance of z_1 ... z_k.

        Along skips that are added without a norm it grows from node to node, and doubles where what is added is as large as
        the branch and independent of it (equations 5 and 6); with `batch_norm=True` it is about 1.
        """
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
    weights: list[Tensor] = []
    moments: list[list[tuple[float, float]]] = [[] for _ in found]
    with ExitStack() as hooks:
        for (_, stage), own in zip(found, moments, strict=True):

            def weigh(_: nn.Module, inputs: tuple[Tensor, ...], stage: DeltaStage = stage) -> None:
                weights.append(stage.weights(inputs[0]))

            def measure(_: nn.Module, inputs: Any, z: Tensor, own: list[tuple[float, float]] = own) -> None:
                variance, mean = (one.item() for one in torch.var_mean(z.float(), correction=0))
                own.append((mean, variance + mean**2))

            hooks.callback(stage.register_forward_pre_hook(weigh).remove)
            for norm in stage.norms:
                hooks.callback(norm.register_forward_hook(measure).remove)
        model(images)
    return [
        SkipWeights(span, stage.edges, stage.existing, given, torch.tensor(own, dtype=torch.float64).view(-1, 2))
        for (span, stage), given, own in zip(found, weights, moments, strict=True)
    ]


def skip_variances(model: PatchedModel, images: Tensor) -> list[list[float]]:
    """The variance of z_1 ... z_k for every patched stage (see `SkipWeights.variances`)."""
    return [record.variances for record in skip_weights(model, images)]

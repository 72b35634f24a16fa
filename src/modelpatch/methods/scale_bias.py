"""A task's own normalisation parameters over shared convolutions.

    y = gamma_t * (x - mu_t) / sqrt(sigma_t^2 + eps) + beta_t        gamma_t, beta_t, optionally mu_t, sigma_t per task

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning*
(ICLR 2019), sections 3 and 4. On networks without normalisation an explicit scale and bias per channel is added after every
convolution, which folds into it: W' = gamma W, b' = gamma b + beta.
"""

from collections.abc import Iterable
from typing import Literal, cast

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.errors import MethodError, MethodNotApplicableError
from modelpatch.methods.blocks import RUNNING, graft_on, name_tensors
from modelpatch.methods.hooks import Batches, Hook
from modelpatch.methods.layers import CONVOLUTIONS, LINEAR, wrap_modules
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint, register_graft
from modelpatch.patch.folding import Foldable, with_weights
from modelpatch.patch.model import PatchedModel

GRAFT = "channel-affine"
SCALED = LINEAR + CONVOLUTIONS  # the layers that an affine folds into


@register_method
class ScaleBias(Method):
    """Trains the scale and bias of every normalisation layer (BatchNorm, LayerNorm, GroupNorm, RMSNorm) and the head.

    `statistics` of BatchNorm layers: `frozen` keeps the backbone's; `recomputed` measures them once on the task's images
    before training; `learned` runs the layers in train mode, as the paper does, which needs large batches. With
    `affine=False` only the statistics change (the paper's Table 6). `layers` picks what carries the scale and bias:
    the network's own `norm` layers, a `channel` affine added after every convolution, or `auto`, norm where there is one.
    """

    name = "scale-bias"
    paper = "Mudrakarta et al., K for the Price of 1, ICLR 2019"
    order = 2
    compared = ("scale-bias",)
    searched = ("scale-bias",)
    shares_across_tasks = True

    lr: PositiveFloat = 1e-2
    statistics: Literal["frozen", "recomputed", "learned"] = "frozen"
    affine: bool = True
    layers: Literal["auto", "norm", "channel"] = "auto"

    def changes(self, backbone: Backbone) -> Blueprint:
        if self.layers == "channel" and not self.affine:
            raise MethodError("scale-bias: affine=False leaves nothing of layers='channel' to train. Drop one of them.")
        if not self.affine and self.statistics == "frozen":
            raise MethodError(
                "scale-bias: affine=False with statistics='frozen' leaves nothing to change. Set statistics='recomputed' "
                "or 'learned'."
            )
        affine, statistics = self.affine and self.layers != "channel", self.statistics != "frozen"
        owned = norm_tensors(backbone.chain, affine, statistics)
        if self.layers == "channel" or (self.layers == "auto" and not owned and self.affine):
            grafts = tuple(
                graft_on(segment, GRAFT, layers=layers)
                for segment in backbone.chain
                if (layers := [name for name, one in segment.module.named_modules() if isinstance(one, nn.Conv2d)])
            )
            if not grafts:
                raise MethodNotApplicableError(f"{backbone.spec} has no convolution to scale. Try the method `subset`.")
            return Blueprint(owned=owned, grafts=grafts)
        if not owned:
            raise MethodNotApplicableError(
                f"{backbone.spec} has no normalisation layer with "
                f"{'scale and bias' if self.affine else 'running statistics'}. Try layers='channel' or the method `subset`."
            )
        return Blueprint(owned=owned)

    def hooks(self) -> tuple[Hook, ...]:
        return (RecomputeStatistics(),) if self.statistics == "recomputed" else ()


def norm_tensors(segments: Iterable[Segment], affine: bool, statistics: bool) -> tuple[str, ...]:
    """The backbone's names of the segments' norm parameters, if `affine`, and running statistics, if `statistics`."""

    def pick(module: nn.Module) -> list[str]:
        parameters = [name for name, _ in module.named_parameters(recurse=False)] if affine and is_norm(module) else []
        own = statistics and isinstance(module, _BatchNorm) and module.running_mean is not None
        return [*parameters, *RUNNING] if own else parameters

    return name_tensors(segments, pick)


def is_norm(module: nn.Module) -> bool:
    """True for a normalisation layer with parameters or statistics of its own."""
    if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    own = list(module.parameters(recurse=False))
    return "Norm" in type(module).__name__ and bool(own) and all(parameter.ndim == 1 for parameter in own)


class RecomputeStatistics(Hook):
    """Replace the patch's own running means and variances by their average over one pass of the task's images."""

    @torch.no_grad()
    def begin(self, model: PatchedModel, batches: Batches) -> None:
        model.eval()
        momenta = {norm: norm.momentum for norm in model.owned_norms()}
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average, not an exponential one
            norm.train()
        for images in batches():
            model(images)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            norm.eval()


class ChannelAffine(Foldable):
    """y = scale * layer(x) + bias per output channel, started as the identity.

    `layer` is a convolution (B, C, H, W) or linear layer (B, ..., C). At a `strength` below 1 the scale is
    1 + strength (scale - 1) and the bias strength * bias.
    """

    strength = 1.0

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self.axes = () if isinstance(layer, nn.Linear) else (1, 1)  # those after the channels
        self.scale = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.layer = layer  # last: some have a scale of their own

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self._effect()
        return self.layer(x) * scale.view(-1, *self.axes) + bias.view(-1, *self.axes)

    def fold(self) -> nn.Module:
        """W' = scale W, b' = scale b + bias; a layer that makes its weight itself stays wrapped."""
        if type(self.layer) not in SCALED:
            return self
        scale, bias = self._effect()
        weight = scale.view(-1, *[1] * (self.layer.weight.ndim - 1)) * self.layer.weight
        own = bias if self.layer.bias is None else scale * self.layer.bias + bias
        return with_weights(self.layer, weight, own)

    def _effect(self) -> tuple[Tensor, Tensor]:
        scale, bias = cast(Tensor, self.scale), cast(Tensor, self.bias)
        if self.strength != 1:
            scale, bias = torch.lerp(torch.ones_like(scale), scale, self.strength), self.strength * bias
        return scale, bias


@register_graft(GRAFT)
def add_channel_affines(variant: nn.Module, layers: list[str]) -> nn.Module:
    """Wrap the layers named in `layers` (the empty name is the variant itself) in a `ChannelAffine`."""

    def wrap(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise TypeError(
                f"{name or 'the segment'} is a {type(layer).__name__}, not a linear layer or 2-d convolution"
            )
        return ChannelAffine(layer)

    return wrap_modules(variant, layers, wrap)

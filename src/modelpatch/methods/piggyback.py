"""Piggyback: a task as a binary mask over frozen weights.

    y = (W ⊙ m) x,    m = 1[r ≥ τ]        r real-valued scores, trained; W frozen
    ∂E/∂r = ∂E/∂(W ⊙ m) ⊙ W               straight through the threshold

Mallya, Davis and Lazebnik: *Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights* (ECCV 2018),
sections 3 and 4. Scores start above the threshold, so that the first forward pass is the base's. A patch stores the masks,
one bit a weight at most, never the scores.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError, MethodNotApplicableError
from modelpatch.methods.blocks import name_tensors
from modelpatch.methods.method import Method, Optimizer, register_method
from modelpatch.methods.scale_bias import norm_tensors
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.contents import Patch

Scaling = Literal["none", "mean", "weight"]
NORM_LR = 1e-2


@register_method
class Piggyback(Method):
    """Trains a score for every weight of every convolution and linear layer, and the head.

    `threshold` is τ and `start_at` the size of the first scores: `start="constant"` gives all of them that value,
    `"uniform"` draws from (-start_at, start_at), `"magnitude"` starts a layer at its mean |W| and scales τ with it.
    `at_threshold` says what a score equal to τ gives: `kept` as in the paper, `masked` as in its code. `scaling` divides
    the scores' gradient by the layer's `mean` |W| or by every `weight`'s own |w|. `ternary` masks are -1 below 0, 1 from τ
    on and 0 between. `norms="trained"` trains the normalisation layers' scale and bias too, at `norm_lr` (None: 0.01; the
    paper's Trained BN). `warm_start` names a patch file of another task on the same backbone to start the masks from: its
    bits say where a score starts, so that `start="uniform"` contradicts it; `magnitude` says how far from the threshold.
    """

    name = "piggyback"
    paper = "Mallya et al., Piggyback, ECCV 2018"
    order = 9
    compared = ("piggyback", "piggyback(norms=trained)")
    searched = ("piggyback",)

    lr: PositiveFloat = 1e-4
    norm_lr: PositiveFloat | None = None
    optimizer: Optimizer = "adam"
    threshold: PositiveFloat = 5e-3
    start: Literal["constant", "uniform", "magnitude"] = "constant"
    start_at: PositiveFloat = 1e-2
    at_threshold: Literal["kept", "masked"] = "kept"
    scaling: Scaling = "none"
    ternary: bool = False
    norms: Literal["frozen", "trained"] = "frozen"
    warm_start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_at <= self.threshold:
            raise MethodError(
                f"piggyback: start_at={self.start_at} is not above threshold={self.threshold}, so that every weight would "
                "start masked. Raise start_at."
            )
        if self.norm_lr is not None and self.norms == "frozen":
            raise MethodError(f"piggyback: norm_lr={self.norm_lr} is for norms='trained'. Set both or neither.")
        if self.warm_start is not None and self.start == "uniform":
            raise MethodError(
                "piggyback: warm_start starts every score where the earlier mask says, start='uniform' where chance says. "
                "Drop one of them."
            )

    def changes(self, backbone: Backbone) -> Blueprint:
        masked = weight_names(backbone)
        if self.norms == "frozen":
            return Blueprint(owned=masked)
        norms = norm_tensors(backbone.chain, affine=True, statistics=False)
        if not norms:
            raise MethodNotApplicableError(
                f"{backbone.spec} has no normalisation layer for piggyback's norms='trained'. Leave it at 'frozen'."
            )
        return Blueprint(owned=(*masked, *norms))

    def reweightings(self, backbone: Backbone) -> dict[str, Callable[[], Reweighting]]:
        earlier: Mapping[str, Tensor] = {}
        if self.warm_start is not None:
            patch = Patch.load(self.warm_start)
            patch.check_backbone(backbone)
            if not any(name.startswith("mask/") for name in patch.tensors):
                raise MethodError(
                    f"piggyback: warm_start={self.warm_start!r} is a {patch.method.name} patch without masks."
                )
            earlier = patch.tensors
        weights = {name: backbone.chain.tensor(name).detach() for name in weight_names(backbone)}
        return {name: partial(Mask, self, weight, earlier.get(f"mask/{name}")) for name, weight in weights.items()}

    def rate(self, name: str) -> float:
        return (self.norm_lr or NORM_LR) if name.startswith("replace/") else super().rate(name)

    def warn(self, reach: float) -> str | None:
        """Adam moves a score by at most about `lr` in a step: a mask that cannot change is said before the training."""
        distance = self.start_at - self.threshold
        if self.optimizer == "sgd" or self.start != "constant" or self.lr * reach >= distance:
            return None
        return (
            f"no bit of a mask can flip: the scores start {distance:.3g} above the threshold and move by at most "
            f"{self.lr * reach:.3g} in all steps together. Train longer, raise lr, or lower start_at."
        )


def weight_names(backbone: Backbone) -> tuple[str, ...]:
    """The backbone's names of every matrix or kernel that a layer multiplies with. Raises `MethodNotApplicableError`."""

    def pick(module: nn.Module) -> list[str]:
        multiplies = isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.MultiheadAttention)
        return [name for name, one in module.named_parameters(recurse=False) if multiplies and one.ndim > 1]

    names = name_tensors(backbone.chain, pick)
    if not names:
        raise MethodNotApplicableError(f"{backbone.spec} has no weights to mask. Try the method `scale-bias`.")
    return names


class Mask(Reweighting):
    """W -> W ⊙ m with m made from `scores` of W's shape. `earlier` is a mask to start from (bool or int8)."""

    def __init__(self, method: Piggyback, weight: Tensor, earlier: Tensor | None = None) -> None:
        super().__init__()
        self.ternary, self.strict, self.scaling = method.ternary, method.at_threshold == "masked", method.scaling
        above = float(weight.abs().mean()) if method.start == "magnitude" else method.start_at
        self.threshold = method.threshold * above / method.start_at
        start = torch.full_like(weight, above)
        if method.start == "uniform":
            start = (2 * torch.rand_like(weight) - 1) * above
        if earlier is not None:  # a masked weight starts as far below the threshold as a kept one above it
            below = 2 * self.threshold - above
            earlier = earlier.to(weight.device)
            # in a ternary mask between the two thresholds, or the weight would start negative
            start = start.masked_fill(earlier == 0, max(below, 0.0) if self.ternary else below)
            start = start.masked_fill(earlier < 0, -above)
        self.scores = nn.Parameter(start)

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = StraightThrough.apply(weight, self.scores, self.mask(), self.scaling)
        return masked

    @torch.no_grad()
    def mask(self) -> Tensor:
        """m: bool, or int8 in {-1, 0, 1} for ternary masks."""
        kept = self.scores > self.threshold if self.strict else self.scores >= self.threshold
        return kept.to(torch.int8) - (self.scores < 0).to(torch.int8) if self.ternary else kept

    def stored(self) -> dict[str, Tensor]:
        return {"mask": self.mask()}


class StraightThrough(torch.autograd.Function):
    """W ⊙ m, whose gradient passes the threshold unchanged: ∂E/∂r = δ ⊙ W, divided as `scaling` says; ∂E/∂W = δ ⊙ m."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(weight, mask if ctx.needs_input_grad[0] else None)
        ctx.scaling = scaling
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        own = None if mask is None else gradients[0] * mask
        if ctx.scaling == "weight":
            return own, gradients[0] * weight.sign(), None, None  # w / |w|, with 0 for a weight of 0
        gradient = gradients[0] * weight
        if ctx.scaling == "mean":
            gradient = gradient / weight.abs().mean().clamp(min=1e-12)
        return own, gradient, None, None

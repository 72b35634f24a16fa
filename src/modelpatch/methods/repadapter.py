"""RepAdapter: a linear bottleneck before frozen linear layers, which takes it in once it is trained.

    y = W (x + s (U (D x + d) + u)) + b  =  W (I + s U D) x + (b + s W (U d + u))

D (width, C) is dense and random, U (C, width) block-diagonal in `groups` and zero at the start. Without an activation
between them both are part of the next layer: a model folded by `patch.folding` costs what the frozen network costs.

Luo, Huang, Zhou, Sun, Jiang, Wang, Ji: *Towards Efficient Visual Adaption via Structural Re-parameterization* (2023),
arXiv:2302.08106, equations 5 to 9. The adapters stand before the attention and before the MLP. A ViT-B/16 at a width of 8 in 2
groups has 221,184 weights (the paper's 0.22 million) and 18,624 biases.
"""

from dataclasses import field
from typing import Annotated, cast

import torch
from pydantic import Field, PositiveFloat, validate_call
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError, MethodNotApplicableError
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.bottleneck import Scale, Width, parts_of
from modelpatch.methods.layers import LINEAR, is_owner, wrap_modules
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint, register_graft
from modelpatch.patch.folding import Foldable, with_weights

GRAFT = "rep-adapter"
Groups = Annotated[int, Field(ge=1, le=256)]


@register_method
class RepAdapter(Method):
    """Trains a linear bottleneck of `width` channels before the attention and the MLP of transformer blocks, and the head.

    `groups` divides its second half, `scale` is the paper's s. Attention with separate layers for queries, keys and values
    gets one for each; `nn.MultiheadAttention`, which reads its weights itself, gets none. `blocks` holds names as in
    `Subset`; none means all transformer blocks.
    """

    name = "repadapter"
    paper = "Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, 2023"
    order = 17
    names_blocks = True

    lr: PositiveFloat = 1e-3
    width: Width = 8
    groups: Groups = 2
    scale: Scale = 1.0
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        if self.width % self.groups:
            raise MethodError(f"repadapter: width={self.width} cannot be divided into groups={self.groups}.")
        given = {"width": self.width, "groups": self.groups, "scale": self.scale}
        grafts = []
        for segment, parts in parts_of(backbone, self.blocks, ("attention", "mlp"), self.name):
            readers = [name for part in parts if part.channels % self.groups == 0 for name in part.readers]
            if layers := [name for name in readers if is_owner(backbone, segment, name)]:
                grafts.append(graft_on(segment, GRAFT, **given, layers=layers))
        if not grafts:
            raise MethodNotApplicableError(
                f"repadapter: no linear layer of {backbone.spec} reads the input of attention or MLP in channels that "
                f"groups={self.groups} divides. Set groups=1, or try `adaptformer` or `ssf`."
            )
        return Blueprint(grafts=tuple(grafts))


class RepAdapted(Foldable):
    """layer(x + scale * strength * (U (D x + d) + u)); U is one matrix a group, (groups, C / groups, width / groups)."""

    strength = 1.0

    def __init__(self, layer: nn.Linear, width: int, groups: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(layer.in_features, width)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up = nn.Parameter(torch.zeros(groups, layer.in_features // groups, width // groups))
        self.bias = nn.Parameter(torch.zeros(layer.in_features))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x).unflatten(-1, (len(self.up), -1))
        added = torch.einsum("...gw,gcw->...gc", hidden, self.up).flatten(-2) + self.bias
        return self.layer(x + self.scale * self.strength * added)

    def fold(self) -> nn.Module:
        """W' = W (I + s U D), b' = b + s W (U d + u); a layer that makes its weight itself stays wrapped."""
        if type(self.layer) not in LINEAR:
            return self
        up, bias = torch.block_diag(*self.up), cast(Tensor, self.bias)
        frozen, scale = self.layer.weight, self.scale * self.strength
        own = scale * frozen @ (up @ self.down.bias + bias)
        weight = frozen + scale * frozen @ up @ self.down.weight
        return with_weights(self.layer, weight, own if self.layer.bias is None else self.layer.bias + own)


@register_graft(GRAFT)
@validate_call(config={"arbitrary_types_allowed": True})
def add_rep_adapters(variant: nn.Module, width: Width, groups: Groups, scale: Scale, layers: list[str]) -> nn.Module:
    """Wrap the linear layers named in `layers` in a `RepAdapted`. Raises TypeError or ValueError for what does not fit."""

    def wrap(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Linear):  # also one whose weight is masked in training
            raise TypeError(f"{name or 'the segment'} is a {type(layer).__name__}, not a linear layer")
        if layer.in_features % groups or width % groups:
            raise ValueError(f"{groups} groups do not divide {layer.in_features} channels and a width of {width}")
        return RepAdapted(layer, width, groups, scale)

    return wrap_modules(variant, layers, wrap)

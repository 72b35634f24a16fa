"""Convpass: a convolution beside the attention and beside the MLP of every transformer block.

    y = x + A(LN(x)) + s B(LN(x)),   z = y + MLP(LN(y)) + s B'(LN(y))        B(x) = U σ(K * σ(D x)),   σ GELU

D (h, C) is random, K (h, h, 3, 3) starts as the identity and U (C, h) at zero; the tokens lie as in the image, a class token
is an image of its own.

Jie, Deng: *Convolutional Bypasses Are Better Vision Transformer Adapters* (2022), arXiv:2207.07039, section 3.2. A ViT-B/16 at
h = 8 has 327,552 numbers (the paper's 0.33 million).
"""

from dataclasses import field
from typing import Any

from pydantic import BaseModel, Field, PositiveFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.bottleneck import Bottlenecked, Channels, Scale, Width, parts_of
from modelpatch.methods.layers import wrap_modules
from modelpatch.methods.method import Method, register_method
from modelpatch.methods.token_maps import Prefix, convolve, count_prefix
from modelpatch.patch.blueprint import Blueprint, register_graft

GRAFT = "convpass"


@register_method
class Convpass(Method):
    """Trains a bypass of `width` channels beside the attention and the MLP of the named transformer blocks, and the head.

    `scale` is the paper's s. `blocks` holds names as in `Subset`; none means all transformer blocks.
    """

    name = "convpass"
    paper = "Jie et al., Convolutional Bypasses Are Better Vision Transformer Adapters, 2022"
    order = 18
    names_blocks = True

    lr: PositiveFloat = 1e-3
    width: Width = 8
    scale: Scale = 1.0
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        given = {"width": self.width, "scale": self.scale}
        found = parts_of(backbone, self.blocks, ("attention", "mlp"), self.name)
        return Blueprint(
            grafts=tuple(
                graft_on(
                    segment,
                    GRAFT,
                    modules={part.name: part.channels for part in parts},
                    prefix=count_prefix(backbone, segment),
                    **given,
                )
                for segment, parts in found
            )
        )


class ConvpassSettings(BaseModel, frozen=True, extra="forbid"):
    """The bypasses of one block as a patch file describes them: `modules` are names of modules and their channels."""

    modules: dict[str, Channels] = Field(min_length=1, max_length=64)
    prefix: Prefix
    width: Width
    scale: Scale


class ConvolutionalBypass(nn.Module):
    """U σ(K * σ(D x)) over tokens or channels-last maps; zero as built."""

    def __init__(self, channels: int, width: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.GELU()
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.convolution.weight)
        for zero in (self.down.bias, self.convolution.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(convolve(self.act(self.down(x)), self.prefix, self.convolution)))


@register_graft(GRAFT)
def add_convpass(variant: nn.Module, **arguments: Any) -> nn.Module:
    """Put bypasses beside the modules named. Raises ValueError for arguments of another kind or size."""
    settings = ConvpassSettings.model_validate(arguments)

    def wrap(name: str, module: nn.Module) -> nn.Module:
        bypass = ConvolutionalBypass(settings.modules[name], settings.width, settings.prefix)
        return Bottlenecked(module, bypass, after=False, scale=settings.scale)

    return wrap_modules(variant, settings.modules, wrap)

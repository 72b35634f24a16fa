"""Mona: adapters with convolutions of several sizes on the stream of every transformer block, after attention and after MLP.

    Mona(x) = x + U σ(g(f(D n(x)))),   n(x) = s₁ ⊙ LN(x) + s₂ ⊙ x,   σ GELU
    f(h) = h + (K₃ * h + K₅ * h + K₇ * h) / 3    depthwise,    g(h) = h + P h    pointwise

    y = Mona(x + A(LN(x))),   z = Mona'(y + MLP(LN(y)))

D (width, C) is random, s₁ starts at 1e-6, s₂ at 1, and U (C, width), unlike in the paper's code, at zero, so that a draft is
the frozen network.

Yin, Hu, Li, Zhang: *5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks* (CVPR 2025),
section 3.2, equations 2 to 5. A block has 2 (133 C + 9,728) numbers at the paper's width of 64, and in general
2 (C (2 width + 5) + width² + 88 width).
"""

from dataclasses import field
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.bottleneck import Channels, Width, parts_of
from modelpatch.methods.layers import wrap_modules
from modelpatch.methods.method import Method, register_method
from modelpatch.methods.token_maps import Prefix, convolve, count_prefix
from modelpatch.methods.transformer import find_stream
from modelpatch.patch.blueprint import Blueprint, register_graft
from modelpatch.patch.folding import Wrapper

GRAFT = "mona"
SIZES = (3, 5, 7)


@register_method
class Mona(Method):
    """Trains an adapter of `width` channels after attention and after MLP of the named transformer blocks, and the head.

    It reads the stream of a block, so it needs blocks that add what an MLP makes of it. `blocks` holds names as in `Subset`;
    none means all transformer blocks.
    """

    name = "mona"
    paper = "Yin et al., Breaking Performance Shackles of Full Fine-Tuning, CVPR 2025"
    order = 19
    names_blocks = True

    lr: PositiveFloat = 1e-3
    width: Width = 64
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        grafts = []
        for segment, parts in parts_of(backbone, self.blocks, ("mlp",), self.name):
            reader = find_stream(segment, parts[-1].name)
            if reader is not None:
                given = {"reader": reader, "channels": parts[-1].channels, "width": self.width}
                grafts.append(graft_on(segment, GRAFT, **given, prefix=count_prefix(backbone, segment)))
        if not grafts:
            raise MethodNotApplicableError(
                f"mona: no block of {backbone.spec} adds what its MLP makes of the stream to it. Try `convpass` or "
                "`adaptformer`."
            )
        return Blueprint(grafts=tuple(grafts))


class MonaSettings(BaseModel, frozen=True, extra="forbid"):
    """The adapters of one block as a patch file describes them: `reader` names what reads the stream before the MLP."""

    reader: str = Field(min_length=1, max_length=256)
    channels: Channels
    width: Width
    prefix: Prefix


class MonaAdapter(nn.Module):
    """Mona(x) - x over tokens or channels-last maps, times its `strength`; zero as built."""

    strength = 1.0

    def __init__(self, channels: int, width: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.norm = nn.LayerNorm(channels)
        self.normed, self.plain = nn.Parameter(torch.full((channels,), 1e-6)), nn.Parameter(torch.ones(channels))
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.depthwise = nn.ModuleList(nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in SIZES)
        self.pointwise = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(self.norm(x) * self.normed + x * self.plain)
        return self.strength * self.up(F.gelu(convolve(hidden, self.prefix, self._mix)))

    def _mix(self, hidden: Tensor) -> Tensor:
        first, second, third = (convolution(hidden) for convolution in self.depthwise)
        hidden = hidden + (first + second + third) / 3
        return hidden + self.pointwise(hidden)


class MonaReader(Wrapper):
    """A module that reads the stream after its adapter, which keeps what it added until the end of the block."""

    def __init__(self, module: nn.Module, adapter: MonaAdapter) -> None:
        super().__init__()
        self.module, self.adapter = module, adapter
        self.added: dict[int, Tensor] = {}  # by thread: several may run one module

    def forward(self, x: Tensor) -> Tensor:
        self.added[get_ident()] = added = self.adapter(x)
        return self.module(x + added)


class MonaBlock(nn.Module):
    """A block with an adapter on its stream before the MLP, whose addition the block's output takes up, and one at its end."""

    def __init__(self, block: nn.Module, reader: MonaReader, adapter: MonaAdapter) -> None:
        super().__init__()
        self.block, self.adapter = block, adapter
        self._reader = [reader]  # a part of the block already

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = y + self._reader[0].added.pop(get_ident()).reshape_as(y)  # Swin lays maps out in rows before the MLP
        return y + self.adapter(y)


@register_graft(GRAFT)
def add_mona(variant: nn.Module, **arguments: Any) -> nn.Module:
    """Put adapters on the stream of a block. Raises ValueError for arguments of another kind or size."""
    settings = MonaSettings.model_validate(arguments)
    sizes = settings.channels, settings.width, settings.prefix
    reader = MonaReader(variant.get_submodule(settings.reader), MonaAdapter(*sizes))
    return MonaBlock(wrap_modules(variant, [settings.reader], lambda *_: reader), reader, MonaAdapter(*sizes))

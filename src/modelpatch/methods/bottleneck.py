"""Bottlenecks beside or after a frozen module, the building blocks of adapters for transformers.

    beside    m(x) + s U act(D x + b) + s c          after    h + U act(D h + b) + c,   h = m(x)

D (width, channels) is random and U (channels, width) starts at zero, so that both start as the frozen module.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import find_segments, graft_on
from modelpatch.methods.layers import wrap_modules
from modelpatch.methods.transformer import BlockPart, find_parts
from modelpatch.patch.blueprint import Blueprint, register_graft
from modelpatch.patch.folding import Wrapper

GRAFT = "bottleneck"
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}

# a file that asks for more is refused before memory is
Width = Annotated[int, Field(ge=1, le=4096)]
Channels = Annotated[int, Field(ge=1, le=16384)]
Scale = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
Activation = Literal["relu", "gelu"]


class BottleneckSettings(BaseModel, frozen=True, extra="forbid"):
    """The bottlenecks of one block as a patch file describes them: `modules` are names of modules and their channels."""

    place: Literal["beside", "after"]
    modules: dict[str, Channels] = Field(min_length=1, max_length=64)
    width: Width
    activation: Activation
    scale: Scale


class Bottleneck(nn.Module):
    """U act(D x + b) + c over the last axis; zero as built."""

    def __init__(self, channels: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


class Bottlenecked(Wrapper):
    """A module with an adapter beside or `after` it, at its scale times its `strength`; of a tuple it changes the first."""

    strength = 1.0

    def __init__(self, module: nn.Module, adapter: nn.Module, *, after: bool, scale: float) -> None:
        super().__init__()
        self.module, self.adapter, self.after, self.scale = module, adapter, after, scale

    def forward(self, *inputs: Any, **named: Any) -> Any:
        result = self.module(*inputs, **named)
        y, rest = (result[0], tuple(result[1:])) if isinstance(result, tuple | list) else (result, None)
        x = y if self.after else inputs[0] if inputs else next(iter(named.values()))
        y = y + self.scale * self.strength * self.adapter(x)
        return y if rest is None else (y, *rest)


@register_graft(GRAFT)
def add_bottlenecks(variant: nn.Module, **arguments: Any) -> nn.Module:
    """Put bottlenecks beside or after the modules named. Raises ValueError for arguments of another kind or size."""
    settings = BottleneckSettings.model_validate(arguments)

    def wrap(name: str, module: nn.Module) -> nn.Module:
        adapter = Bottleneck(settings.modules[name], settings.width, settings.activation)
        return Bottlenecked(module, adapter, after=settings.place == "after", scale=settings.scale)

    return wrap_modules(variant, settings.modules, wrap)


def bottlenecks(
    backbone: Backbone,
    blocks: Sequence[str],
    kinds: Sequence[Literal["attention", "mlp"]],
    method: str,
    **settings: Any,
) -> Blueprint:
    """Bottlenecks at the parts `kinds` of all named transformer blocks. Raises `MethodNotApplicableError` without any."""
    found = parts_of(backbone, blocks, kinds, method)
    return Blueprint(
        grafts=tuple(
            graft_on(segment, GRAFT, modules={part.name: part.channels for part in parts}, **settings)
            for segment, parts in found
        )
    )


def parts_of(
    backbone: Backbone, blocks: Sequence[str], kinds: Sequence[Literal["attention", "mlp"]], method: str
) -> list[tuple[Segment, list[BlockPart]]]:
    """The parts `kinds` of the named segments, of all blocks without names, segment by segment."""
    found: list[tuple[Segment, list[BlockPart]]] = []
    for segment in find_segments(backbone, blocks):
        parts = find_parts(backbone, segment)
        if chosen := [part for kind in kinds for part in getattr(parts, kind)]:
            found.append((segment, chosen))
    if not found:
        raise MethodNotApplicableError(
            f"{method}: {backbone.spec} has no transformer block with {' or '.join(kinds)} in "
            f"{', '.join(blocks) or 'its blocks'}. It needs blocks of tokens whose parts are modules of their own. Try "
            "`scale-bias`, `ssf` or `lora`."
        )
    return found

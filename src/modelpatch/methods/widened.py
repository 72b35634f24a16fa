"""Widened blocks: extra filters beside the frozen ones, for tasks that the frozen filters cannot serve, masked or not.

    block'(x) = after(branch(x) + shortcut(x) + U ReLU(V x + b))      V (filters, C, k, k) random, U (C', filters) zero

Added capacity is what Mallya, Davis and Lazebnik leave open in *Piggyback: Adapting a Single Network to Multiple Tasks by
Learning to Mask Weights* (ECCV 2018). A patch holds filters (C k² + 1 + C') numbers a block; on tokens, channels-last maps
and vectors V is a linear layer, as if k were 1.
"""

from dataclasses import field
from typing import Annotated

from pydantic import Field, PositiveFloat, validate_call
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment, channels_first
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import find_segments, graft_on
from modelpatch.methods.method import Method, register_method
from modelpatch.methods.residual import SplitBlock, split_block
from modelpatch.patch.blueprint import Blueprint, register_graft

GRAFT = "widened"

# a file that asks for more is refused before memory is
Filters = Annotated[int, Field(ge=1, le=1024)]
Kernel = Annotated[int, Field(ge=1, le=7)]
Channels = Annotated[int, Field(ge=1, le=8192)]
Stride = Annotated[int, Field(ge=1, le=64)]


@register_method
class Widened(Method):
    """Trains `filters` extra filters in each of the named blocks, and the head.

    The filters read the block's input through kernels of `kernel` x `kernel` positions. `blocks` holds names as in `Subset`;
    none means all blocks that can have some. `Piggyback() + Widened()` masks the frozen filters and adds others.
    """

    name = "widened"
    paper = "Mallya et al., Piggyback, ECCV 2018 (added capacity, its future work)"
    order = 8
    compared = ("widened",)
    names_blocks = True

    lr: PositiveFloat = 3e-3
    filters: Filters = 8
    kernel: Kernel = 3
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        """Adds filters to the blocks that can have some: not to those that make tokens of maps or join tokens."""
        segments = find_segments(backbone, self.blocks)
        found = [(segment, self._arguments(segment, backbone.input_size)) for segment in segments]
        grafts = tuple(graft_on(segment, GRAFT, **arguments) for segment, arguments in found if arguments)
        if not grafts:
            raise MethodNotApplicableError(
                f"widened: no filter of {backbone.spec} stands beside {', '.join(self.blocks) or 'its blocks'}, whose inputs "
                "and outputs are laid out differently. Name other blocks, or try the method `scale-bias` or `subset`."
            )
        return Blueprint(grafts=grafts)

    def _arguments(self, segment: Segment, image: tuple[int, ...]) -> dict[str, int | None]:
        """The filters beside a segment as a patch file describes them; empty where none can be added."""
        before, after = segment.input_shape, segment.output_shape
        maps = channels_first(before, image)
        if len(before) != len(after) or len(after) < 2 or maps != channels_first(after, image):
            return {}
        axis = 0 if maps else -1
        channels = {"inputs": before[axis], "outputs": after[axis], "filters": self.filters}
        if not maps:
            return {**channels, "kernel": None, "stride": 1} if before[:-1] == after[:-1] else {}
        stride = max(round(before[1] / after[1]), 1)
        if any(-(-was // stride) < now for was, now in zip(before[1:], after[1:], strict=True)):
            return {}
        return {**channels, "kernel": self.kernel, "stride": stride}


class ExtraFilters(nn.Sequential):
    """U ReLU(V x + b): an input (B, C, H, W), or (B, ..., C) without kernels, to what is added to the block's output."""

    def __init__(self, inputs: int, outputs: int, filters: int, kernel: int | None, stride: int) -> None:
        super().__init__()
        self.first: nn.Module
        self.last: nn.Linear | nn.Conv2d
        if kernel is None:
            self.first, self.relu = nn.Linear(inputs, filters), nn.ReLU()
            self.last = nn.Linear(filters, outputs, bias=False)
        else:
            self.first = nn.Conv2d(inputs, filters, kernel, stride, padding=kernel // 2)
            self.relu, self.last = nn.ReLU(), nn.Conv2d(filters, outputs, 1, bias=False)
        nn.init.zeros_(self.last.weight)


class WidenedBlock(nn.Module):
    """A block with extra filters, added at their `strength` where its branch and shortcut are, else to its output."""

    strength = 1.0

    def __init__(self, block: nn.Module, extra: ExtraFilters) -> None:
        super().__init__()
        self.block, self.extra = split_block(block), extra

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.block, SplitBlock):
            branch, shortcut = self.block.before(x)
            return self.block.after(self._widen(branch + shortcut, x))
        return self._widen(self.block(x), x)

    def _widen(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` and what the filters add to it; where they have a position more at the edge than the block, it is left out."""
        extra = self.extra(x)
        if isinstance(self.extra.first, nn.Conv2d):
            extra = extra[..., : y.shape[-2], : y.shape[-1]]
        return y + (extra if self.strength == 1 else self.strength * extra)


@register_graft(GRAFT)
@validate_call(config={"arbitrary_types_allowed": True})
def add_filters(
    variant: nn.Module,
    inputs: Channels,
    outputs: Channels,
    filters: Filters,
    kernel: Kernel | None = None,
    stride: Stride = 1,
) -> nn.Module:
    """A block with extra filters; without a `kernel` they read channels on the last axis. Raises ValueError for others."""
    return WidenedBlock(variant, ExtraFilters(inputs, outputs, filters, kernel, stride))

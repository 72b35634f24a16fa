"""Visual prompt tuning: trained tokens beside those of the image.

    deep       [x, _] = L([x, P])  in every block L, with prompts P (length, C) of its own
    shallow    [x, _] = L_N(... L_1([x, P]))  in all blocks L_1 to L_N, with one P

The paper puts them behind the class token, here they stand at the end: to attention without places both are the same, and
blocks that give tokens places of their own (windows, RoPE) are refused.

Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim: *Visual Prompt Tuning* (ECCV 2022), section 3.2, equations 3 to 8. A
ViT-B/16 has 768 numbers a prompt: 460,800 for 50 in all 12 blocks.
"""

import math
from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, validate_call
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.errors import BackboneError, MethodNotApplicableError
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.bottleneck import Channels, parts_of
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft

GRAFT = "prompts"
Length = Annotated[int, Field(ge=1, le=4096)]


@register_method
class VPT(Method):
    """Trains `length` prompts, and the head: of every named block (`depth="deep"`), or one set before the first of them.

    `blocks` holds names as in `Subset`; none means all transformer blocks.
    """

    name = "vpt"
    paper = "Jia et al., Visual Prompt Tuning, ECCV 2022"
    order = 20
    names_blocks = True

    lr: PositiveFloat = 3e-3
    length: Length = 50
    depth: Literal["deep", "shallow"] = "deep"
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        found = [segment for segment, _ in parts_of(backbone, self.blocks, ("attention",), self.name)]
        fixed = [segment.name for segment in found if not takes_more_tokens(segment)]
        if fixed:
            raise MethodNotApplicableError(
                f"vpt: {fixed[0]} of {backbone.spec} takes its own number of tokens alone (windows, or places of tokens "
                "inside attention). Try `convpass`, `adaptformer` or `ssf`."
            )
        widths = [segment.input_shape[-1] for segment in found]
        if self.depth == "deep":
            prompted = [
                (segment, {"length": self.length, "channels": width})
                for segment, width in zip(found, widths, strict=True)
            ]
            return Blueprint(grafts=tuple(graft_on(segment, GRAFT, **given) for segment, given in prompted))
        if len(set(widths)) > 1:
            raise MethodNotApplicableError(
                f"vpt: tokens of {backbone.spec} have {min(widths)} to {max(widths)} channels. Set depth='deep'."
            )
        start, end = found[0].index, found[-1].index + 1
        if end - start != len(found):
            between = next(
                backbone.chain[index].name for index in range(start, end) if backbone.chain[index] not in found
            )
            raise MethodNotApplicableError(
                f"vpt: {between} stands between the blocks of {backbone.spec}, and would not take prompts. Set depth='deep'."
            )
        given = {"length": self.length, "channels": widths[0]}
        return Blueprint(grafts=(Graft(kind=GRAFT, start=start, end=end, arguments=given),))


@torch.no_grad()
def takes_more_tokens(segment: Segment) -> bool:
    """True for a block of tokens that takes some more, and moves no other where these are appended in another order."""
    if len(segment.input_shape) != 2:
        return False
    tokens, channels = segment.input_shape
    device = next(segment.module.parameters()).device
    x = torch.randn(1, tokens + 3, channels, generator=torch.Generator().manual_seed(0)).to(device)
    order = [*range(tokens), tokens + 2, tokens, tokens + 1]
    block = clone_module(segment.module)
    try:
        one, other = block(x), block(x[:, order])
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, BackboneError):
        return False  # BackboneError: it has tables of places for this number of tokens alone
    return one.shape == x.shape and torch.allclose(one[:, :tokens], other[:, :tokens], rtol=1e-3, atol=1e-4)


class Prompted(nn.Module):
    """Blocks that see `length` tokens besides their own, which are dropped after them."""

    def __init__(self, blocks: nn.Module, length: int, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.prompts = nn.Parameter(torch.empty(length, channels))
        bound = math.sqrt(6 / (2 * channels))  # the paper's for 16 x 16 x 3 pixels and as many channels
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(torch.cat([x, self.prompts.expand(len(x), -1, -1)], 1))
        return y[:, : x.shape[1]]


@register_graft(GRAFT, interpolates=False)
@validate_call(config={"arbitrary_types_allowed": True})
def add_prompts(variant: nn.Module, length: Length, channels: Channels) -> nn.Module:
    """Append prompts to the tokens of a span. Raises ValueError for lengths and channels that no network has."""
    return Prompted(variant, length, channels)

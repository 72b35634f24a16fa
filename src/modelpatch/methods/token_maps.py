"""Convolutions over the tokens of a transformer block, for adapters that know the tokens' places in the image.

tokens (B, P + h w, C)  ->  the map (B, C, h, w), and each of the P prefix tokens as an image of one pixel
maps (B, h, w, C)       ->  (B, C, h, w)
"""

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor, cat

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment

Prefix = Annotated[int, Field(ge=0, le=4096)]


def convolve(x: Tensor, prefix: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run `run`, over maps (B, C, h, w), on tokens or a channels-last map. Raises ValueError for no square of tokens."""
    if x.ndim == 4:
        return run(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    side = math.isqrt(max(x.shape[1] - prefix, 0))
    if side * side != x.shape[1] - prefix or not side:
        raise ValueError(f"{x.shape[1]} tokens are no square map behind {prefix} others")
    places = run(x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
    if not prefix:
        return places
    alone = x[:, :prefix].flatten(0, 1)[:, :, None, None]
    return cat([run(alone).flatten(1).unflatten(0, (len(x), prefix)), places], 1)


def count_prefix(backbone: Backbone, segment: Segment) -> int:
    """The number of tokens before the image's (classes, registers): what timm says, else what is left of a square."""
    if len(segment.input_shape) != 2:
        return 0
    tokens = segment.input_shape[0]
    given = getattr(backbone.module, "num_prefix_tokens", None)
    return given if isinstance(given, int) else tokens - math.isqrt(tokens) ** 2

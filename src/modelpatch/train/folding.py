"""Frozen normalisation folded into the convolutions before it: fewer passes over memory, forward and backward.

    BN(W x + b) = W' x + b'        W' = γ W / √(σ² + ε),  b' = γ (b - μ) / √(σ² + ε) + β

The results agree to rounding, not bit for bit: good enough to compare candidates by, not for what a patch is measured with.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module

TOLERANCE = 1e-3  # of the largest output


@torch.no_grad()
def fold_segment(segment: Segment) -> nn.Module:
    """A frozen copy of the segment's module with its BatchNorm layers folded into the convolutions defined before them.

    A plain clone where there is nothing to fold, or where the folded one would not compute the same.
    """
    folded = copy.deepcopy(segment.module).requires_grad_(False).eval()
    leaves = [(name, module) for name, module in folded.named_modules() if isinstance(module, nn.Conv2d | _BatchNorm)]
    found = False
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(leaves):
        if type(conv) is not nn.Conv2d or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if norm.num_features == conv.out_channels:
            folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            folded.set_submodule(norm_name, nn.Sequential(*norm.children()))  # timm's layers hold an activation as well
            found = True
    return folded if found and _same(segment, folded) else clone_module(segment.module)


def _same(segment: Segment, folded: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    device = next(folded.parameters()).device
    example = torch.randn(1, *segment.input_shape, generator=generator).to(device)
    try:
        expected, given = segment.module(example.clone()), folded(example.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return given.shape == expected.shape and bool((given - expected).abs().max() <= TOLERANCE * expected.abs().max())

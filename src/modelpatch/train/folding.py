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
from modelpatch.backbone.trace import trace_calls
from modelpatch.errors import UntraceableBackboneError

TOLERANCE = 1e-3  # of the largest output


@torch.no_grad()
def fold_segment(segment: Segment) -> nn.Module:
    """A frozen copy of the segment's module with its BatchNorm layers folded where they follow a convolution.

    A plain clone where there is nothing to fold, or where the folded one would not compute the same.
    """
    folded = copy.deepcopy(segment.module).requires_grad_(False).eval()
    pairs = _pairs(folded)
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        if type(conv) is nn.Conv2d and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            folded.set_submodule(norm_name, nn.Sequential(*norm.children()))  # timm's layers hold an activation as well
    return folded if pairs and _same(segment, folded) else clone_module(segment.module)


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """The names of modules that run one right after the other and of which nothing else reads the first."""
    pairs = []
    try:
        for node in trace_calls(module).nodes:
            before = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(before, torch.fx.Node) and before.op == "call_module" and len(before.users) == 1:
                pairs.append((str(before.target), str(node.target)))
    except UntraceableBackboneError:
        pairs = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Sequential):
            names = [f"{name}.{index}".lstrip(".") for index, _ in child.named_children()]
            pairs += itertools.pairwise(names)
    found = [(a, b) for a, b in dict.fromkeys(pairs) if isinstance(module.get_submodule(b), _BatchNorm)]
    return [(a, b) for a, b in found if type(module.get_submodule(a)) is nn.Conv2d]


def _same(segment: Segment, folded: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    device = next(folded.parameters()).device
    example = torch.randn(1, *segment.input_shape, generator=generator).to(device)
    try:
        expected, given = segment.module(example.clone()), folded(example.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return given.shape == expected.shape and bool((given - expected).abs().max() <= TOLERANCE * expected.abs().max())

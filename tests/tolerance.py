"""Equality of results that two products of different widths, batches or paths give: within rounding.

The last bits of a sum depend on the processor and on the shape of the product. Equal bits are asserted, with `torch.equal`,
only for stored tensors and for the same call on the same tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 256  # of the largest value; a few hundred sums lie between an image and a logit


def close(found: Tensor, expected: Tensor) -> bool:
    """Return True if shapes are equal and values differ by at most `ROUNDINGS` units of the largest value's last place."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.numel():
        return True
    largest = float(expected.detach().abs().max())
    return float((found - expected).detach().abs().max()) <= ROUNDINGS * torch.finfo(expected.dtype).eps * largest

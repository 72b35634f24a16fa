"""A linear head on features that are computed already: the closed vocabulary's answer to a head made of class names.

    min_W  mean cross entropy(f Wᵀ + b) + strength / 2 |W|²        features divided by their root mean square

Convex, so that full-batch L-BFGS finds the one answer: no seed, no learning rate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.heads.linear import LinearHead

STRENGTH = 1e-3


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, strength: float = STRENGTH, steps: int = 100
) -> LinearHead:
    """The head (D, K) for features (N, D) and classes (N,) int64; in eval mode, requires no gradients."""
    features, labels = features.float().flatten(1), labels.to(features.device)
    scale = features.square().mean().sqrt().clamp(min=1e-12)
    scaled = features / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(scaled, weight, bias), labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    head = LinearHead(features.shape[1], classes).to(features.device)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias)
    return head.eval().requires_grad_(False)

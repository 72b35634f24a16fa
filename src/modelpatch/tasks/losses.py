"""Losses of single outputs, and their spelling: `focal`, `focal(gamma=3)`.

y in [0, 1], p = sigmoid(x)

    bce          -y log p - (1 - y) log(1 - p)
    focal        -α_t (1 - p_t)^γ log p_t, p_t = p where y = 1, else 1 - p       Lin et al., *Focal Loss*, 2017, equation 5
    asymmetric   -y (1 - p)^γ₊ log p - (1 - y) p_m^γ₋ log(1 - p_m),              Ridnik et al., *Asymmetric Loss*, 2021,
                 p_m = max(p - m, 0)                                             equations 4 to 7
    l1, l2       |x - y|, (x - y)²
    huber        (x - y)² / 2 up to |x - y| = δ, δ (|x - y| - δ / 2) beyond      Huber, 1964
"""

import inspect
import re
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.errors import TrainingError
from modelpatch.tasks.kind import ElementLoss

SPELLING = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\((.*)\))?\s*")
SMALLEST = 1e-8  # base of a power: the gradient of 0 ** γ is infinite for γ < 1


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of logits."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


def focal(outputs: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = -1.0) -> Tensor:
    """The focal loss of logits. `alpha` in [0, 1] is the weight of positives against negatives, -1 for none."""
    shares = outputs.sigmoid()
    missed = (shares + targets - 2 * shares * targets).clamp(min=SMALLEST)  # 1 - p_t
    losses = missed**gamma * bce(outputs, targets)
    return losses if alpha < 0 else losses * (alpha * targets + (1 - alpha) * (1 - targets))


def asymmetric(
    outputs: Tensor, targets: Tensor, positive: float = 0.0, negative: float = 4.0, margin: float = 0.05
) -> Tensor:
    """The asymmetric loss of logits: γ₊, γ₋ and m of the paper's section 4.1."""
    shares = outputs.sigmoid()
    shifted = (shares - margin).clamp(min=0)
    found = (1 - shares).clamp(min=SMALLEST) ** positive * F.logsigmoid(outputs)
    missed = shifted.clamp(min=SMALLEST) ** negative * torch.log((1 - shifted).clamp(min=SMALLEST))
    return -(targets * found + (1 - targets) * missed)


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """The absolute error."""
    return F.l1_loss(outputs, targets, reduction="none")


def l2(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error."""
    return F.mse_loss(outputs, targets, reduction="none")


def huber(outputs: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """The Huber loss."""
    return F.huber_loss(outputs, targets, reduction="none", delta=delta)


RANGES = {"alpha": (-1.0, 1.0), "margin": (0.0, 0.999), "delta": (1e-6, float("inf"))}


def find_loss(spelled: str, known: Mapping[str, ElementLoss], kind: str) -> ElementLoss:
    """The loss of `known` that is spelled `NAME` or `NAME(KEY=VALUE, ...)`, the first for `auto`.

    Raises `TrainingError` for another name, an unknown hyperparameter and a value that makes no sense.
    """
    match = SPELLING.fullmatch(spelled)
    name = "" if match is None else match[1]
    if name == "auto" and match is not None and match[2] is None:
        return next(iter(known.values()))
    if match is None or name not in known:
        raise TrainingError(f"loss={spelled!r} is none for {kind}. Expected one of: {', '.join(known)}.")
    takes = [key for key in inspect.signature(known[name]).parameters if key not in ("outputs", "targets")]
    given: dict[str, float] = {}
    for part in filter(None, map(str.strip, (match[2] or "").split(","))):
        key, _, text = (one.strip() for one in part.partition("="))
        low, high = RANGES.get(key, (0.0, float("inf")))
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if key not in takes:
            raise TrainingError(f"loss={spelled!r}: {name} has no {key!r}. It has: {', '.join(takes) or 'none'}.")
        if key in given:
            raise TrainingError(f"loss={spelled!r}: {key} is given twice. Give it once.")
        if not low <= value <= high or value == float("inf"):
            raise TrainingError(f"loss={spelled!r}: {key}={text!r}; expected a number from {low:g} to {high:g}.")
        given[key] = value
    if -1 < given.get("alpha", 0) < 0:
        raise TrainingError(f"loss={spelled!r}: alpha lies in [0, 1], or is -1 for none.")
    return partial(known[name], **given) if given else known[name]

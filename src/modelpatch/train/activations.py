"""Gradient checkpointing: activations of segments are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from modelpatch.errors import TrainingError
from modelpatch.patch.model import PatchedModel


def checkpoint_parts(model: nn.Module) -> None:
    """Compute the activations of a patched model's segments again in the backward pass, from the first one that trains on.

    Segments that learn batch statistics are run as they are: a second pass would count a batch twice. Raises `TrainingError`
    for another model.
    """
    if not isinstance(model, PatchedModel):
        raise TrainingError(
            f"checkpoint_activations takes the segments of a PatchedModel; the model is a {type(model).__name__}. Leave it "
            "out and use torch.utils.checkpoint in the model."
        )
    for start, part in zip(model.starts, model.parts, strict=True):
        if start >= model.first:
            part.forward = partial(_checkpointed, part, part.forward)


def _checkpointed(part: nn.Module, forward: Any, x: Tensor) -> Any:
    learning = any(isinstance(module, _BatchNorm) and module.training for module in part.modules())
    return forward(x) if learning or not torch.is_grad_enabled() else checkpoint(forward, x, use_reentrant=False)

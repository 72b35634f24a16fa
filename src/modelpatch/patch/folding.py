"""Added modules that are plain layers again once they are trained.

backbone.patched(patch)  ──fold──>  the same logits from layers of the backbone's own kinds, at the backbone's cost
"""

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelpatch.backbone.clone import clone_module

M = TypeVar("M", bound=nn.Module)


class Foldable(nn.Module, ABC):
    """A module around a frozen layer that computes what one layer with other numbers computes."""

    @abstractmethod
    def fold(self) -> nn.Module:
        """The layer that computes the same, with weights of its own; the module itself where no layer does."""


@torch.no_grad()
def fold(model: M) -> M:
    """The model with every `Foldable` in it replaced, in place, by the layer it is equal to. It can no longer be trained.

    >>> plain = fold(backbone.patched(patch))
    """
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Foldable):
                setattr(owner, name, child.fold())
    return model


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A layer like `layer` with this weight and this bias, both frozen copies."""
    clone: Any = clone_module(layer)
    clone.weight, clone.bias = (nn.Parameter(one.detach().clone(), requires_grad=False) for one in (weight, bias))
    return clone

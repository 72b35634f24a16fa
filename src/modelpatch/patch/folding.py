"""Added modules that are plain layers again once they are trained.

backbone.patched(patch)  ──fold──>  the same logits from layers of the backbone's own kinds, at the backbone's cost
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from modelpatch.backbone.clone import clone_module

M = TypeVar("M", bound=nn.Module)


class Wrapper(nn.Module):
    """A module around another, its child named `wrapped`, whose attributes it has too: some networks read them.

    Modules are not among these. Of a tensor it has the shape, dtype and device, with NaN in it: a network that computes with
    the weight of a wrapped layer passes by what the wrapper adds, and shall not do so unnoticed.
    """

    wrapped: ClassVar[str] = "module"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner: Any = self
            while isinstance(inner, Wrapper):
                inner = inner.__dict__.get("_modules", {}).get(inner.wrapped)
            value = None if name.startswith("__") else getattr(inner, name, None)
            if value is None or isinstance(value, nn.Module):
                raise
            if isinstance(value, Tensor):
                return torch.full_like(value, math.nan if value.is_floating_point() else 0, requires_grad=False)
            return value


class Foldable(Wrapper, ABC):
    """A module around a frozen layer that computes what one layer with other numbers computes."""

    wrapped = "layer"

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

"""Layers of a segment beside or around which a patch can add modules, found by their types and by running the segment."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, TimmLinear)
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv2d, Conv2dSame)


def find_layers(
    backbone: Backbone,
    segment: Segment,
    kinds: tuple[type[nn.Module], ...],
    fits: Callable[[Any], bool] = lambda layer: True,
) -> list[str]:
    """Names, within the segment, of the layers of exactly the given types that `fits` takes and that can be wrapped.

    Left out are layers whose weight is used in several places or read without calling the layer.
    """
    modules = backbone.module.named_modules(remove_duplicate=False)
    places = Counter(id(layer.weight) for _, layer in modules if type(layer) in LINEAR + CONVOLUTIONS)
    found = [(name, layer) for name, layer in segment.module.named_modules() if type(layer) in kinds and fits(layer)]
    layers = [name for name, layer in found if places[id(layer.weight)] == 1]
    called = called_layers(segment, layers) if layers else set()
    return [name for name in layers if name in called and is_owner(backbone, segment, name)]


def is_dense(layer: Any) -> bool:
    """True for a layer that joins all its channels, without holes or padding but zeros: two such layers make one."""
    return type(layer) in LINEAR or (layer.groups, set(layer.dilation), layer.padding_mode) == (1, {1}, "zeros")


def is_owner(backbone: Backbone, segment: Segment, name: str) -> bool:
    """True if no other segment runs the layer."""
    try:
        return backbone.chain.segment_of(weight_name(segment, name)).index == segment.index
    except KeyError:
        return False


def weight_name(segment: Segment, name: str) -> str:
    """The backbone's name of the weight of the segment's layer `name`."""
    return segment.tensor_names[f"{name}.weight".lstrip(".")]


def called_layers(segment: Segment, names: Iterable[str]) -> set[str]:
    """Those of the named layers that the segment calls with one tensor, found by running a clone of it on zeros.

    Attention and fused kernels read a layer's weight themselves; an update beside such a layer would do nothing.
    """
    clone, called = clone_module(segment.module), set[str]()

    def run(name: str, forward: Callable[..., Tensor], /, *inputs: Any, **named: Any) -> Tensor:
        if len(inputs) == 1 and not named:
            called.add(name)
        return forward(*inputs, **named)

    for name in names:  # not hooks: PyTorch gives up its fused kernels where it sees some
        layer = clone.get_submodule(name)
        layer.forward = partial(run, name, layer.forward)
    device = next(segment.module.parameters()).device
    with torch.no_grad():
        clone(torch.zeros(1, *segment.input_shape, device=device))
    return called


def wrap_modules(variant: nn.Module, names: Iterable[str], wrap: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """`variant` with each named module (the empty name is the variant itself) replaced by what `wrap` makes of it."""
    for name in names:
        wrapped = wrap(name, variant.get_submodule(name))
        if not name:
            return wrapped
        owner, _, leaf = name.rpartition(".")
        setattr(variant.get_submodule(owner), leaf, wrapped)
    return variant

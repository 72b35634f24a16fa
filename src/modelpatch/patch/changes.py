"""Weights that a patch makes from the frozen ones: masks, differences, and any change at a lower strength.

    replace/W    W' = W + strength (replace - W)
    mask/W       W' = W * mask + delta        the mask binary or ternary; it has no strength between 0 and 1
    delta/W      W' = W + strength delta
    left/W       W' = W + strength (left right)    of low rank; kernels as matrices, output channels first
    right/W

`Reweighting` makes such a weight in training, `resolve` when a patch is bound, `StoredWeight` at every call.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain
from modelpatch.errors import ForeignTensorError, PatchError
from modelpatch.patch.codec import is_sparse

MADE = ("mask/", "delta/", "left/", "right/")


class Reweighting(nn.Module, ABC):
    """A module between a weight of the backbone and the layer that reads it while a patch is trained.

    `idle` counts elements of its parameters that are never trained; one that `follows` moves with the weight it is given;
    `trains` is what its parameters train, a mask or a difference.
    """

    idle: int = 0
    trains: str = "mask"
    follows: bool = True

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weight, of the same shape; gradients reach this module's parameters, and `weight` if it is trained."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors that the patch stores: `mask` (bool or int8) and `delta`, or the latter as `left` and `right`."""


def resolve(tensors: Mapping[str, Tensor], chain: Chain, strength: float) -> dict[str, Tensor]:
    """A patch's tensors with every changed weight as a `replace/` tensor in float32.

    Raises `ForeignTensorError` for weights the chain does not have, for shapes that differ and for weights that are both
    masked and replaced; `PatchError` for masks at a strength other than 1.
    """
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("replace/"):
            start = _frozen(chain, name.removeprefix("replace/"), tensor).cpu()
            values[name] = tensor if strength == 1 else torch.lerp(start, tensor.float(), strength)
    for base in made_weights(tensors):
        weight, mask, delta = _parts(tensors, chain, base, strength)
        made = weight.cpu() if mask is None else weight.cpu() * mask
        values[f"replace/{base}"] = made if delta is None else made + delta
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("replace/", *MADE))}
    return values | own


def made_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """The backbone's names of the weights that are masked or have a difference added."""
    return sorted({name.partition("/")[2] for name in tensors if name.startswith(MADE)})


def _parts(
    tensors: Mapping[str, Tensor], chain: Chain, name: str, strength: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The frozen weight, its mask and the difference at this strength, checked."""
    mask, delta = tensors.get(f"mask/{name}"), tensors.get(f"delta/{name}")
    if f"left/{name}" in tensors or f"right/{name}" in tensors:
        if delta is not None:
            raise ForeignTensorError(f"the patch holds a difference of {name} and factors of one.")
        delta = _product(tensors.get(f"left/{name}"), tensors.get(f"right/{name}"), chain, name)
    if f"replace/{name}" in tensors:
        raise ForeignTensorError(f"the patch both replaces {name} and makes it from a mask or difference.")
    if mask is not None and strength != 1:
        raise PatchError(f"masks do not interpolate: the patch cannot be used at strength {strength}, only at 1.")
    if mask is not None and mask.dtype not in (torch.bool, torch.int8):
        raise ForeignTensorError(f"mask/{name} has dtype {mask.dtype}; expected bool, or int8 for a ternary mask.")
    weights = [_frozen(chain, name, tensor) for tensor in (mask, delta) if tensor is not None]
    return weights[0], mask, None if delta is None else delta.float() * strength


def _product(left: Tensor | None, right: Tensor | None, chain: Chain, name: str) -> Tensor:
    """left (C, r) times right (r, N) in the shape of the weight, (C, ...) with N numbers a channel, float32."""
    if left is None or right is None:
        raise ForeignTensorError(f"the patch holds one of the factors left/{name} and right/{name} without the other.")
    weight = _frozen(chain, name)
    shape = (len(weight), max(weight[:1].numel(), 1)) if weight.ndim else (1, 1)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or (len(left), right.shape[1]) != shape:
        raise ForeignTensorError(
            f"the factors of {name} have shapes {tuple(left.shape)} and {tuple(right.shape)}; the backbone expects "
            f"({shape[0]}, r) and (r, {shape[1]})."
        )
    return (left.float() @ right.float()).view(weight.shape)


def set_strength(model: nn.Module, strength: float) -> None:
    """Set the share of their effect of modules that a patch adds."""
    for module in model.modules():
        if isinstance(getattr(module, "strength", None), float):
            module.strength = float(strength)  # type: ignore[assignment]


def _frozen(chain: Chain, name: str, like: Tensor | None = None) -> Tensor:
    """The backbone's tensor. Raises `ForeignTensorError` if there is none of that name and shape."""
    try:
        weight = chain.tensor(name)
    except KeyError:
        raise ForeignTensorError(f"the patch changes {name!r}, which no segment of the backbone holds.") from None
    if like is not None and weight.shape != like.shape:
        given, expected = tuple(like.shape), tuple(weight.shape)
        raise ForeignTensorError(f"the patch's tensor for {name} has shape {given}; the backbone expects {expected}.")
    return weight.detach()


@dataclass(frozen=True)
class StoredWeight:
    """A masked weight at the cost of its bits: `make()` gives W * mask + delta.

    `planes` holds packed bits (uint8), the first weight in the lowest one: one plane for a binary mask and two for a ternary
    one, not zero and negative. `places` and `values` are the difference.
    """

    weight: Tensor
    planes: tuple[Tensor, ...]
    places: Tensor | None
    values: Tensor | None

    @classmethod
    def collect(cls, tensors: Mapping[str, Tensor], backbone: Backbone, strength: float) -> dict[str, Self]:
        """The masked weights of a patch and those with a sparse difference, by the backbone's names. Raises as `resolve`."""
        stored = {}
        for name in made_weights(tensors):
            given = tensors.get(f"delta/{name}")
            if f"mask/{name}" not in tensors and (given is None or not is_sparse(given)):
                continue
            weight, mask, delta = _parts(tensors, backbone.chain, name, strength)
            planes = () if mask is None else (mask,) if mask.dtype == torch.bool else (mask != 0, mask < 0)
            packed = (np.packbits(plane.flatten().cpu().numpy(), bitorder="little") for plane in planes)
            places = values = None
            if delta is not None:
                places = delta.flatten().nonzero()[:, 0].to(weight.device)
                values = delta.flatten()[delta.flatten() != 0].to(weight.device)
            stored[name] = cls(weight, tuple(torch.from_numpy(p).to(weight.device) for p in packed), places, values)
        return stored

    @property
    def nbytes(self) -> int:
        """Bytes besides the frozen weight's."""
        return sum(tensor.nbytes for tensor in (*self.planes, self.places, self.values) if tensor is not None)

    def make(self) -> Tensor:
        """The weight for one call, float32."""
        made = self.weight
        if self.planes:
            masks = [_unpack_bits(plane, self.weight.numel()).view_as(self.weight) for plane in self.planes]
            made = made * (masks[0] if len(masks) == 1 else masks[0] - 2 * masks[1])
        if self.places is not None and self.values is not None:
            made = made.flatten().index_add(0, self.places, self.values.float()).view_as(self.weight)
        return made


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits as 0 and 1 (float32). Bytes are looked up: one read and one write a weight."""
    return _bytes_as_bits(packed.device).index_select(0, packed.int()).flatten()[:count]


@cache
def _bytes_as_bits(device: torch.device) -> Tensor:
    values = torch.arange(256, dtype=torch.uint8, device=device)
    return ((values[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1).float()

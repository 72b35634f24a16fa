"""Probes: a network's features for a generated picture, by which networks with the same tensors are told apart.

    picture(C, n)  values in [-2, 2) made by integer arithmetic alone: coarse squares and noise, the same on every machine
    features       computed in float64 on the CPU, whatever the network's own type and device
    values         S f / sqrt(D): 64 sums of the D features with fixed signs S, or the features where there are at most 64
    error          the largest |float32 - float64| of these values: the rounding of the network itself
    lifted         the same with numbers added to all gains, biases and layer scales, which the content hash vouches for:
                   branches that the base multiplies by (nearly) zero, and that a patch may open, are seen as well
    loud           the same for the picture times 64: activations reach bounds (ReLU6 against ReLU) that no quiet picture meets

In float64 one computation agrees with itself to some 1e-14 whatever the processor, the kernels or the order of sums, so that
what differs by more than float32's own rounding is another computation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from modelpatch.backbone.chain import Chain
from modelpatch.errors import BackboneError

WIDTH = 64  # values of a probe, at most
SQUARE = 16  # pixels a side of a coarse square
LOUD = 64  # times the picture
FACTOR = 2.0  # of the network's rounding: the tolerance
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double})
PLAIN = frozenset({int, float, bool, str, type(None)})
UNIT = 2.0**-23  # the relative rounding of values that are stored as float32
REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, LookupError, AttributeError, BackboneError)
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Probe:
    """Values of a network's features for the picture of `pixels` a side, and the rounding `error` of the network."""

    pixels: int
    values: Values
    error: float
    lifted: bool = False
    loud: bool = False

    @property
    def tolerance(self) -> float:
        """The largest difference of values that rounding explains."""
        return max(FACTOR * self.error, UNIT * self.largest)

    @property
    def largest(self) -> float:
        """The largest value."""
        return float(np.abs(self.values).max(initial=0.0))

    def distance(self, other: "Probe") -> float:
        """The largest difference of values; infinity for probes of networks with another number of features."""
        if self.values.shape != other.values.shape:
            return math.inf
        return float(np.abs(self.values - other.values).max(initial=0.0))

    @classmethod
    def take(cls, chain: Chain, channels: int, pixels: int, lifted: bool = False, loud: bool = False) -> "Probe":
        """Run a chain on the picture. Raises one of `REFUSALS` where it takes no such pictures, or answers not finite."""
        single, x = Reference(torch.float32, lifted), picture(channels, pixels) * (LOUD if loud else 1)
        chain.prepare(x)
        modules = [segment.in_eval_mode().module for segment in chain]  # in train mode statistics would move
        rounded = _features(modules, x, single)
        try:
            values = _features(modules, x, Reference(torch.float64, lifted))
        except REFUSALS:  # an operation without float64: every one of them adds a rounding to first order
            return cls(pixels, rounded, single.calls * UNIT * float(np.abs(rounded).max(initial=0.0)), lifted, loud)
        return cls(pixels, values, float(np.abs(values - rounded).max(initial=0.0)), lifted, loud)


class Reference(TorchFunctionMode):
    """A context in which torch computes with one floating type on the CPU; tensors from elsewhere are read as copies.

    `lifted` adds numbers in [1/4, 1/2) to every parameter that is a vector.
    """

    def __init__(self, dtype: torch.dtype, lifted: bool = False) -> None:
        super().__init__()
        self.dtype, self.lifted, self.calls = dtype, lifted, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        given, named = self._turn(args), self._turn(kwargs or {})
        if func in CASTS:
            return given[0] if given[0].is_floating_point() else given[0].to(self.dtype)
        return self._turn(func(*given, **named))

    def _turn(self, value: Any) -> Any:
        kind = type(value)
        if kind is tuple or kind is list:  # most of what functions are given, sooner than by `tree_map`
            return kind(map(self._turn, value))
        if kind is dict:
            return {name: self._turn(one) for name, one in value.items()}
        if kind is Tensor or kind is nn.Parameter:
            return self._turn_leaf(value)
        return value if kind in PLAIN else tree_map(self._turn_leaf, value)

    def _turn_leaf(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = self.dtype if value.dtype in FLOATS else value.dtype
            turned = value if value.dtype is dtype and value.is_cpu else value.to("cpu", dtype)
            vector = self.lifted and isinstance(value, nn.Parameter) and max(value.shape, default=1) == value.numel()
            return turned + _lift(value.numel()).to(self.dtype).view(value.shape) if vector else turned
        if isinstance(value, torch.dtype):
            return self.dtype if value in FLOATS else value
        return torch.device("cpu") if isinstance(value, torch.device) else value


@torch.no_grad()
def _features(modules: Sequence[nn.Module], images: Tensor, reference: Reference) -> Values:
    with reference:
        features = reduce(lambda made, module: module(made), modules, images.to(reference.dtype))
    values = features.detach().double().reshape(-1).numpy()
    if not np.isfinite(values).all():
        raise ValueError("the features are not finite")
    return values if len(values) <= WIDTH else _signs(len(values)) @ values / math.sqrt(len(values))


def picture(channels: int, pixels: int) -> Tensor:
    """A picture (1, C, n, n) float32 of multiples of 1/128 in [-2, 2)."""
    c, y, x = np.indices((channels, pixels, pixels), dtype=np.uint32)
    levels = _scatter(c, y // SQUARE, x // SQUARE) + _scatter(c + np.uint32(channels), y, x)
    return torch.from_numpy(((levels.astype(np.float32) - 256) / 128)[None])


def _lift(count: int) -> Tensor:
    place = np.arange(count, dtype=np.uint32)
    return torch.from_numpy(_scatter(np.full_like(place, 3), place, place).astype(np.float32) / 1024 + 0.25)


def _signs(features: int) -> Values:
    rows, columns = np.indices((WIDTH, features), dtype=np.uint32)
    return np.where(_scatter(np.full_like(rows, 7), rows, columns) < 128, -1.0, 1.0)


def _scatter(*places: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A number in [0, 256) for every place: multiplications and shifts of 32-bit integers."""
    mixed = np.zeros_like(places[0])
    for place, factor in zip(places, (73856093, 19349663, 83492791), strict=True):
        mixed = mixed ^ (place * np.uint32(factor))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return mixed >> np.uint32(24)

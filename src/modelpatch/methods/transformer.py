"""The attention and the MLP of a transformer block, found by what they compute, whatever their names are.

    block(x) = y + mlp(norm(y)),   y = x + attention(norm(x))

An MLP maps every token by itself; attention mixes them. Both keep the shape of what they read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment, channels_first
from modelpatch.backbone.clone import clone_module
from modelpatch.methods.layers import LINEAR

TOLERANCE = 1e-4


@dataclass(frozen=True)
class BlockPart:
    """The attention or MLP `name` of a segment, its number of `channels`, and the linear layers that read its input."""

    name: str
    channels: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class TransformerParts:
    """The parts of one segment; both are empty for a segment that is no transformer block."""

    attention: tuple[BlockPart, ...] = ()
    mlp: tuple[BlockPart, ...] = ()


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it was given and, of several outputs the first, what it gave.

    `whole` says that these are what the segment is given and gives, `single` that it gives nothing else.
    """

    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    x: Tensor
    y: Tensor
    single: bool
    whole: bool = False

    def mixes_tokens(self) -> bool:
        """True if other tokens change the output for the first one, or for one in the middle: a window may hold one alone."""
        count = self.x.numel() // self.x.shape[-1]
        return any(map(self._is_changed_by_others, (0, count // 2)))

    def _is_changed_by_others(self, token: int) -> bool:
        other = self.x.clone()
        tokens = other.view(-1, other.shape[-1])
        kept = tokens[token].clone()
        tokens[:] = tokens.roll(1, -1)  # not a shift or a factor, which a normalisation layer would undo
        tokens[token] = kept

        def changed(value: Any) -> Any:
            same = isinstance(value, Tensor) and value.shape == self.x.shape and torch.equal(value, self.x)
            return other if same else value

        y = _first(self.run(*map(changed, self.inputs), **{name: changed(value) for name, value in self.named.items()}))
        difference = (y - self.y).reshape(-1, y.shape[-1])[token].abs().max()
        return bool(difference > TOLERANCE * self.y.abs().max())


def find_parts(backbone: Backbone, segment: Segment) -> TransformerParts:
    """The attention and MLP modules of a segment that reads and gives tokens or channels-last maps.

    An MLP is the smallest module of at least two linear layers that maps tokens one by one; attention the largest that mixes
    them and holds no MLP. There are none in what runs as one fused kernel (`nn.TransformerEncoderLayer`), in modules that run
    several times, and in those that read a single token, where the two cannot be told apart.
    """
    shape = segment.input_shape
    tokens = len(shape) == 2 or (len(shape) == 3 and not channels_first(shape, backbone.input_size))
    if not tokens or shape != segment.output_shape or not segment.parameters:
        return TransformerParts()
    calls = _calls(segment)
    weighted = {name for name in calls if any(_is_linear(one) for one in segment.module.get_submodule(name).modules())}
    kept = [name for name in calls if name in weighted and calls[name].x.shape == calls[name].y.shape]
    mixing = [name for name in kept if calls[name].mixes_tokens()]
    whole = [name for name in mixing if calls[name].whole and any(one.startswith(f"{name}.") for one in mixing)]
    mixing = [name for name in mixing if name not in whole]
    others = [name for name in kept if calls[name].single and name not in (*mixing, *whole)]
    maps = [name for name in others if _count_linear(segment.module.get_submodule(name)) >= 2]
    mlps = [name for name in maps if not any(other.startswith(f"{name}.") for other in maps)]
    holders = [name for name in mixing if not any(mlp.startswith(f"{name}.") for mlp in mlps)]
    attention = [name for name in holders if not any(name.startswith(f"{other}.") for other in holders)]
    outside = [name for name in mlps if not any(name.startswith(f"{other}.") for other in attention)]
    make = partial(_part, segment, calls)
    return TransformerParts(tuple(map(make, attention)), tuple(map(make, outside)))


def _part(segment: Segment, calls: dict[str, _Call], name: str) -> BlockPart:
    x = calls[name].x
    linear = [other for other, module in segment.module.named_modules() if type(module) in LINEAR and other in calls]
    inner = [other for other in linear if other.startswith(f"{name}.")]
    readers = [other for other in inner if calls[other].x.shape == x.shape and torch.equal(calls[other].x, x)]
    return BlockPart(name, x.shape[-1], tuple(readers))


@torch.no_grad()
def find_stream(segment: Segment, mlp: str) -> str | None:
    """The module that alone reads the stream to which the MLP's output is added; None where there is none.

    It is the norm before the MLP, or the MLP itself. Without the MLP a block gives the stream.
    """
    calls, clone = _calls(segment), clone_module(segment.module)
    if mlp not in calls:
        return None
    clone.get_submodule(mlp).forward = lambda *inputs, **named: torch.zeros_like(calls[mlp].y)
    stream = _first(clone(_random_input(segment)))
    reading = [name for name, call in calls.items() if _equal(call.x, stream)]
    outer = [name for name in reading if not any(name.startswith(f"{other}.") for other in reading)]
    return outer[0] if len(outer) == 1 else None


def _equal(x: Tensor, y: Tensor) -> bool:
    """True for the same numbers, the tokens in rows or as a map."""
    return x.numel() == y.numel() and x.shape[-1] == y.shape[-1] and torch.allclose(x.flatten(), y.flatten())


def _random_input(segment: Segment) -> Tensor:
    device = next(segment.module.parameters()).device
    return torch.randn(1, *segment.input_shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def _calls(segment: Segment) -> dict[str, _Call]:
    """By name, the call of every inner module that the segment calls once, with several tokens (..., N, C) of its input."""
    clone, calls, several, fixed = clone_module(segment.module), dict[str, _Call](), set[str](), set[str]()
    first, repeated = _random_input(segment), False

    def run(name: str, forward: Callable[..., Any], /, *inputs: Any, **named: Any) -> Any:
        given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
        x = given[0].detach().clone(memory_format=torch.contiguous_format) if given else None
        if repeated:
            fixed.update([name] if x is None or (name in calls and torch.equal(x, calls[name].x)) else [])
            return forward(*inputs, **named)
        result = forward(*inputs, **named)
        y = _first(result)
        if name in calls:
            several.add(name)
        elif x is not None and x.ndim >= 3 and x.numel() > x.shape[-1] and isinstance(y, Tensor):
            calls[name] = _Call(forward, inputs, named, x, y.detach().clone(), y is result)
        return result

    for name, module in list(clone.named_modules()):
        if name:
            module.forward = partial(run, name, module.forward)
    last, repeated = _first(clone(first)), True
    clone(first.flip(-1))  # tables of places are made of no input
    found = {
        name: replace(call, whole=_equal(call.x, first) and _equal(call.y, last))
        for name, call in calls.items()
        if name not in several | fixed
    }
    for name, module in clone.named_modules():
        vars(module).pop("forward", None) if name else None
    return found


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple | list) and result else result


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (*LINEAR, nn.MultiheadAttention))


def _count_linear(module: nn.Module) -> int:
    return sum(type(one) in LINEAR for one in module.modules())

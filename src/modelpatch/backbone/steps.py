"""Segments of several calls, or of one with more than its input: recorded calls as a module.

What such a segment needs beside its input does not depend on the image's content: position tables, masks, sizes. It is
computed once for each size of images and handed to its calls, but for what is made of the network's parameters and read by
one segment alone, which the segment computes itself, so that it can be trained.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from modelpatch.backbone.record import Call, Count, Frame, Named, Recording, Stored, Value, leaves
from modelpatch.errors import BackboneError

KEPT = 8  # batch sizes for which tensors that follow the batch size are kept


class Shared:
    """The tensors that a recording's calls make whatever the image: computed once and kept for each device and precision."""

    def __init__(self, module: nn.Module, recording: Recording) -> None:
        self.module, self.dtype = module, recording.values[0].dtype
        fixed = [call for call in recording.calls if not call.streams]
        self.makers = {number: call for call in fixed for number in call.makes}
        self._calls = recording.calls
        self._begin()

    def _begin(self) -> None:
        self._place = {id(call): place for place, call in enumerate(self._calls)}
        self._kept: dict[Any, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """All that other processes can use: no lock, and nothing that is found by where it lies in memory."""
        return {name: one for name, one in vars(self).items() if name not in ("_place", "_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def like(self) -> Tensor:
        """A tensor of one row with the network's device and the images' precision."""
        device = next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))
        return torch.empty(1, 0, dtype=self.dtype, device=device)

    def needs(self, calls: Iterable[Call]) -> list[Call]:
        """The calls without image that make what `calls` read, in their order."""
        found, waiting = dict[int, Call](), list(calls)
        while waiting:
            call = waiting.pop()
            read = (slot.number for slot in call.slots if isinstance(slot, Value))
            makers = [self.makers[number] for number in read if number in self.makers]
            for maker in (*makers, *(self._calls[place] for place in call.after if not self._calls[place].streams)):
                if maker is not call and id(maker) not in found:
                    found[id(maker)] = maker
                    waiting.append(maker)
        return sorted(found.values(), key=self.order)

    def order(self, call: Call) -> int:
        return self._place[id(call)]

    def get(self, number: int, x: Tensor) -> Tensor:
        """The tensor `number` for the batch size, device and precision of `x`."""
        rows = x.shape[0] if number in self._follows_batch else 0
        key = (number, rows, x.device, x.dtype)
        if (made := self._kept.get(key)) is None:  # read once: another thread may drop it meanwhile
            with self._lock:
                while rows and len(self._kept) > KEPT * len(self.makers):
                    del self._kept[next(iter(self._kept))]
                made = self._kept[key] = self._compute(number, x)
        return made

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, number: int, x: Tensor) -> Tensor:
        frame = Frame(self.module, self.like.expand(x.shape[0], 0), {})
        maker = self.makers[number]
        for call in (*self.needs([maker]), maker):
            frame.run(call)
        made = frame.values[number].to(x.device)
        return made.to(x.dtype) if made.dtype == self.dtype and x.is_floating_point() else made

    @cached_property
    def _follows_batch(self) -> frozenset[int]:
        following = []
        for number, maker in self.makers.items():
            if any(isinstance(slot, Count) for call in (maker, *self.needs([maker])) for slot in call.slots):
                following.append(number)
        return frozenset(following)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


@dataclass(frozen=True, eq=False)
class SegmentProgram:
    """The calls of a segment for one size of images, from the streams `sources` to the streams `results`."""

    calls: tuple[Call, ...]
    constants: tuple[int, ...]
    sources: "Bundle"
    results: "Bundle"
    shared: Shared

    @cached_property
    def sizeless(self) -> bool:
        """True if nothing in the calls says of what size the images are."""
        slots = (slot for call in self.calls for slot in call.slots)
        return not self.constants and not any(isinstance(slot, Stored) or type(slot) is int for slot in slots)

    def agrees(self, other: Self) -> bool:
        """True if another program makes the same of the same input, whatever numbers its recording gave to tensors."""
        theirs = dict(zip(self.sources.shapes, other.sources.shapes, strict=False))  # by this program's numbers
        bundles = zip((self.sources, self.results), (other.sources, other.results), strict=True)
        if any([*a.shapes.values()] != [*b.shapes.values()] for a, b in bundles) or len(self.calls) != len(other.calls):
            return False

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, Value) and isinstance(b, Value):
                if a.number not in theirs and a.number in self.constants and b.number in other.constants:
                    made, its = (one.shared.get(slot.number, one.shared.like) for one, slot in ((self, a), (other, b)))
                    return made.shape == its.shape and torch.equal(made, its)
                return theirs.get(a.number) == b.number
            if isinstance(a, Stored) and isinstance(b, Stored):
                return torch.equal(a.tensor, b.tensor)
            return bool(a == b)

        for call, its in zip(self.calls, other.calls, strict=True):
            slots, others = (leaves((one.arguments, [slot for slot, _ in one.rewrites])) for one in (call, its))
            if call.target != its.target or len(slots) != len(others) or not all(map(same, slots, others)):
                return False
            theirs |= zip(call.numbers, its.numbers, strict=True)
        return [theirs.get(number) for number in self.results.shapes] == [*other.results.shapes]

    def run(self, holder: nn.Module, x: Tensor) -> Tensor:
        frame = Frame(holder, x, self.sources.open(x))
        like = x if isinstance(x, Tensor) else self.shared.like  # not of a proxy of torch.fx
        for number in self.constants:
            frame.values[number] = self.shared.get(number, like)
        for call in self.calls:
            frame.run(call)
        return self.results.close(frame.values, x.shape[0])


@dataclass(frozen=True)
class Bundle:
    """Streams (B k, ...) as one tensor between two segments: one as it is, several side by side as (B, n).

    `shapes` are (k, *shape without batch axis) by number.
    """

    shapes: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, numbers: Iterable[int], values: Mapping[int, Tensor], rows: int) -> Self:
        return cls({number: (len(values[number]) // rows, *values[number].shape[1:]) for number in sorted(numbers)})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor without its batch axis."""
        first, *more = self.shapes.values()
        return (sum(map(math.prod, self.shapes.values())),) if more else first[1:]

    def open(self, x: Tensor) -> dict[int, Tensor]:
        if len(self.shapes) == 1:
            return dict.fromkeys(self.shapes, x)
        parts = x.split([math.prod(shape) for shape in self.shapes.values()], 1)
        rows = x.shape[0]
        return {
            number: part.reshape(rows * shape[0], *shape[1:])
            for (number, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def close(self, values: Mapping[int, Tensor], rows: int) -> Tensor:
        if len(self.shapes) == 1:
            return values[next(iter(self.shapes))]
        return torch.cat([values[number].reshape(rows, -1) for number in self.shapes], 1)


class Steps(nn.Module):
    """A segment that runs recorded calls: one tensor in, one tensor out.

    It holds the modules and tensors that the calls name, under the network's names. `programs` hold the calls by the shape of
    the input without its batch axis; clones share them.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.programs = Programs()
        for name in sorted(names, key=lambda name: name.count(".")):
            attach(self, name, network)

    @property
    def sizeless(self) -> bool:
        """True if its calls are the same for images of any size."""
        return all(program.sizeless for program in list(self.programs.values()))

    @property
    def bundles(self) -> bool:
        """True if the output is several streams side by side."""
        return any(len(program.results.shapes) > 1 for program in list(self.programs.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.programs.find(x).run(self, x)


class Programs(dict[tuple[int, ...], SegmentProgram]):
    """Programs by the shape of their input."""

    def takes(self, program: SegmentProgram) -> bool:
        """True unless inputs of its shape are already those of another program, from which they cannot be told."""
        known = self.get(program.sources.shape)
        return known is None or known.agrees(program)

    def find(self, x: Tensor) -> SegmentProgram:
        """The program for `x`. Raises `BackboneError` for a size of images that the chain was not prepared for."""
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            return next(iter(self.values()))
        program = self.get(tuple(map(int, x.shape[1:])))
        if program is None and len(self) == 1:
            (known,) = self.values()
            program = known if known.sizeless else None
        if program is None:
            raise BackboneError(
                f"a segment reads inputs of shape (B, {', '.join(map(str, x.shape[1:]))}), of images of a size that its chain "
                "has not run. Run backbone.chain(images) or backbone.check_image_size(pixels) once for it."
            )
        return program

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def attach(holder: nn.Module, name: str, network: nn.Module) -> None:
    """Hold the module, parameter or buffer `name` of a network under the same name."""
    *path, leaf = name.split(".")
    source = network
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder, source = holder.get_submodule(part), source.get_submodule(part)
    if holder is source:
        return
    if leaf in source._parameters:
        holder.register_parameter(leaf, source._parameters[leaf])
    elif leaf in source._buffers:
        holder.register_buffer(leaf, source._buffers[leaf])
    else:
        holder.add_module(leaf, source._modules[leaf])


def names_of(calls: Sequence[Call]) -> list[str]:
    """The modules and tensors that calls name."""
    targets = [call.target for call in calls if isinstance(call.target, str)]
    return list(
        dict.fromkeys((*targets, *(slot.name for call in calls for slot in call.slots if isinstance(slot, Named))))
    )

"""A recording of one call of a network on real images: the calls that it made, in their order.

    x0 ─ patch_embed ─ x1 ─ blocks.0(x1, rope=r) ─ x2 ─ ...         streams: computed from the image's content
    rope((14, 14)) ─ r                                              and what is not: tables, masks, sizes

The network runs as it always does while a `TorchFunctionMode` and hooks note which call consumed which tensor, so that the
recording is right whatever its Python does. Whether a module is one call or *opened*, its own calls noted instead, is said by
the caller. A network is recorded on two batches of different images and sizes: numbers that differ follow the batch size,
tensors that no recorded call made are constants where both have the same.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modelpatch.errors import UntraceableBackboneError

LOCK = threading.Lock()  # hooks are put on the network while it is recorded: one recording at a time
READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}  # content that leaves the tensors
READS |= {f"__{kind}__" for kind in ("bool", "int", "float", "complex", "index", "array", "contains", "nonzero")}
ROWS = (2, 3)  # images of the two recordings


class Slot(ABC):
    """A placeholder in a recorded call for something that differs from run to run."""

    @abstractmethod
    def read(self, frame: "Frame") -> Any:
        """The value in a run."""


@dataclass(eq=False)
class Frame:
    """A run of recorded calls on `x`: the module that holds what they name, and the tensors made so far by number."""

    holder: nn.Module
    x: Tensor
    values: dict[int, Tensor]

    def run(self, call: "Call") -> None:
        """Run a call and keep what it makes."""
        args, kwargs = (
            transform(call.arguments, self._fill) if call.nested else ([*map(self._fill, call.arguments[0])], {})
        )
        rewritten = [(slot.read(self), number) for slot, number in call.rewrites]
        target = _getter(call.target)(self.holder) if isinstance(call.target, str) else call.target
        result = target(*args, **kwargs)
        made = [result] if call.bare else [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        self.values.update(zip(call.outputs, made, strict=True))
        self.values.update((number, tensor) for tensor, number in rewritten)

    def _fill(self, slot: Any) -> Any:
        return slot.read(self) if isinstance(slot, Slot) else slot


@dataclass(frozen=True)
class Value(Slot):
    """A tensor that a recorded call made; number 0 is the image."""

    number: int

    def read(self, frame: Frame) -> Tensor:
        return frame.values[self.number]


@dataclass(frozen=True)
class Named(Slot):
    """A parameter or buffer of the network."""

    name: str

    def read(self, frame: Frame) -> Tensor:
        return _getter(self.name)(frame.holder)


@dataclass(frozen=True)
class Count(Slot):
    """A number that follows the batch size: `at` + `slope` * rows."""

    at: int
    slope: int

    def read(self, frame: Frame) -> int:
        return self.at + self.slope * frame.x.shape[0]


@dataclass(frozen=True)
class Like(Slot):
    """The device or the dtype of the input."""

    what: str

    def read(self, frame: Frame) -> Any:
        return getattr(frame.x, self.what)


@dataclass(eq=False)
class Stored(Slot):
    """A tensor that belongs to no module and that no call made."""

    tensor: Tensor

    def read(self, frame: Frame) -> Tensor:
        tensor = self.tensor  # read once: a thread on another device may move it meanwhile
        if isinstance(frame.x, Tensor) and tensor.device != frame.x.device:  # not a proxy of torch.fx
            self.tensor = tensor = tensor.to(frame.x.device)
        return tensor


_getter = lru_cache(maxsize=None)(attrgetter)


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call: of the module of this name or of a function.

    `arguments` (args, kwargs) hold slots (`Value`, `Named`, ...) in place of tensors. `outputs` numbers the tensors of the
    result in the order of `leaves`, `rewrites` those that it wrote in place, by their slots. `streams` are the numbers of
    its inputs that depend on the image; a call without any gives the same for every image. `after` are earlier calls that
    wrote what it reads in place.
    """

    target: str | Callable[..., Any]
    arguments: Any
    outputs: tuple[int, ...]
    rewrites: tuple[tuple[Any, int], ...]
    streams: frozenset[int]
    after: frozenset[int]
    scopes: tuple[type[nn.Module], ...]
    bare: bool  # it gives one tensor, in no tuple

    @property
    def name(self) -> str:
        """The name of the module, or of the function."""
        if isinstance(self.target, str):
            return self.target
        return str(getattr(self.target, "__name__", self.target)).strip("_")

    @cached_property
    def nested(self) -> bool:
        """True if arguments hold others."""
        args, kwargs = self.arguments
        return bool(kwargs) or any(isinstance(one, tuple | list | dict | slice) or is_tree(one) for one in args)

    @property
    def slots(self) -> list[Any]:
        return leaves(self.arguments)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the tensors that it makes or changes, in their order."""
        return (*self.outputs, *(number for _, number in self.rewrites))

    @property
    def makes(self) -> frozenset[int]:
        """The same numbers as a set."""
        return frozenset(self.numbers)


@dataclass
class Scope:
    """An opened module: its calls that depend on the image are those between `first` and `last` of all such calls."""

    kind: type[nn.Module]
    first: int
    last: int = -1
    calls: int = 0  # of its children, a plain container's members standing for the container


@dataclass
class Recording:
    """The calls of a network on images of one size, its opened modules, and the tensors that its calls made of each batch.

    `result` is what the network returned, with slots. `written` are the numbers of tensors that were written in place later.
    """

    calls: list[Call]
    scopes: list[Scope]
    values: dict[int, Tensor]
    others: dict[int, Tensor]
    written: frozenset[int]
    result: Any

    def rows_of(self, number: int) -> int:
        """The rows that a tensor has for each image, one image after another; 0 for one that is not made of such rows."""
        value, other = self.values[number], self.others[number]
        rows, rest = divmod(value.shape[0] if value.ndim > 1 else 0, ROWS[0])
        if rest or rows == 0 or other.shape != (rows * ROWS[1], *value.shape[1:]):
            return 0
        # the first image of both batches is the same
        alike = rows == 1 or torch.allclose(value[:rows], other[:rows], rtol=1e-3, atol=1e-4 * float(value.abs().max()))
        return rows if alike else 0


def record(
    module: nn.Module,
    forward: Callable[[Tensor], Any],
    images: Sequence[Tensor],
    is_leaf: Callable[[nn.Module, str], bool],
) -> Recording:
    """Record `forward`, which runs `module`, on two batches of `ROWS` images that share the first.

    Raises `UntraceableBackboneError`, whose `scopes` are the opened modules in which it happened, outermost first.
    """
    recorders = [_run(module, forward, batch, is_leaf) for batch in images]
    first, second = recorders
    if len(first.calls) != len(second.calls):  # one that keeps what it computed makes fewer calls the second time
        pairs = zip(first.calls, second.calls, strict=False)
        at = next((call.scopes for call, other in pairs if call.target != other.target), ())
        raise _untraceable(module, "its calls are others for another batch", at)
    calls = [_merge(module, a, b) for a, b in zip(first.calls, second.calls, strict=True)]
    written = frozenset(number for number, value in first.values.items() if value._version != first.versions[number])
    return Recording(calls, first.scopes, first.values, second.values, written, first.result)


def _run(
    module: nn.Module, forward: Callable[[Tensor], Any], images: Tensor, is_leaf: Callable[[nn.Module, str], bool]
) -> "_Recorder":
    recorder = _Recorder(module, images, is_leaf)
    try:
        with LOCK, torch.inference_mode(False), torch.no_grad():
            recorder.run(forward)
    except UntraceableBackboneError:
        raise
    except Exception as error:  # whatever a network's Python does, on images or with a mode
        raise _untraceable(module, str(error), recorder.kinds) from error
    return recorder


class _Recorder(TorchFunctionMode):
    """Notes the calls of one run."""

    def __init__(self, module: nn.Module, image: Tensor, is_leaf: Callable[[nn.Module, str], bool]) -> None:
        super().__init__()
        self.module, self.image, self.is_leaf = module, image, is_leaf
        named = (*module.named_buffers(), *module.named_parameters())
        self.named = {id(tensor): Named(name) for name, tensor in named}
        self.held: list[Any] = []  # whatever an id stands for stays alive
        self.numbers = {id(image): 0}
        self.values, self.versions = {0: image}, {0: image._version}
        self.content = {0}
        self.writers: dict[int, list[int]] = {}  # storage -> calls that wrote it in place
        self.calls: list[Call] = []
        self.streams = 0  # calls so far that depend on the image
        self.stack: list[Scope] = []
        self.scopes: list[Scope] = []
        self.leaf: tuple[nn.Module, Any, list[int], list[Tensor]] | None = None
        self.depth = 0
        self.thread = threading.get_ident()
        self.result: Any = None

    def run(self, forward: Callable[[Tensor], Any]) -> None:
        handles = []
        for name, child in self.module.named_modules():
            if not isinstance(child, torch.jit.ScriptModule) and child is not self.module:
                before, after = self._enter(name), self._leave(name)
                handles.append(child.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                handles.append(child.register_forward_hook(after, with_kwargs=True))
        try:
            with self:
                result = forward(self.image)
            self.result = transform(result, self._slot)
        finally:
            for handle in handles:
                handle.remove()

    # modules

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            if self.leaf is not None:
                self.depth += 1
            elif self.is_leaf(module, name):
                tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                versions = [tensor._version for tensor in tensors]
                self.leaf = (module, transform((args, kwargs), self._slot), versions, tensors)
            else:
                self.stack.append(Scope(type(module), first=self.streams))

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            if self.depth:
                self.depth -= 1
                return
            calls = 1
            if self.leaf is not None:
                _, arguments, versions, tensors = self.leaf
                self.leaf = None
                calls = int(self._note(name, arguments, tensors, versions, result))
            else:
                scope = self.stack.pop()
                scope.last = self.streams
                self.scopes.append(scope)
                calls = min(scope.calls, 1) if closable(scope.kind) else scope.calls
            if self.stack:
                self.stack[-1].calls += calls

        return leave

    # functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf is not None:
            return func(*args, **kwargs)
        arguments = transform((args, kwargs), self._slot)  # before an in-place function gives its input another number
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        makes = any(isinstance(leaf, Tensor) for leaf in leaves(result))
        changes = any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True))
        if makes or changes:
            self._note(func, arguments, tensors, versions, result)
        elif getattr(func, "__name__", "") in READS and self._streams(arguments):
            raise _untraceable(
                self.module, f"its Python reads numbers of the image's content ({func.__name__})", self.kinds
            )
        return result

    def _slot(self, leaf: Any) -> Any:
        """The placeholder of a leaf of a call's arguments, or the leaf."""
        if isinstance(leaf, Tensor):
            number = self.numbers.get(id(leaf))
            if number is not None:
                return Value(number)
            if id(leaf) not in self.named:
                self.held.append(leaf)
            return self.named.get(id(leaf), leaf)
        if isinstance(leaf, torch.device) and leaf == self.image.device:
            return Like("device")
        if isinstance(leaf, torch.dtype) and leaf == self.image.dtype:
            return Like("dtype")
        return leaf

    def _streams(self, arguments: Any) -> frozenset[int]:
        numbers = {slot.number for slot in leaves(arguments) if isinstance(slot, Value)}
        return frozenset(numbers & self.content)

    @property
    def kinds(self) -> tuple[type[nn.Module], ...]:
        return tuple(scope.kind for scope in self.stack)

    def _note(self, target: Any, arguments: Any, tensors: list[Tensor], versions: list[int], result: Any) -> bool:
        """Add a call. Returns True if it depends on the image's content."""
        place = len(self.calls)
        fixed = [tensor for tensor in tensors if self.numbers.get(id(tensor)) not in self.content]
        after = frozenset(call for tensor in fixed for call in self.writers.get(_storage(tensor), ()))
        streams = self._streams(arguments)
        for call in after:  # what was written into a table, maybe through a view of it, may come from the image
            streams |= self.calls[call].makes & self.content
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        written = [tensor for tensor, version in zip(tensors, versions, strict=True) if tensor._version != version]
        changed = {id(tensor): tensor for tensor in written if all(tensor is not leaf for leaf in made)}
        rewrites = tuple((self._slot(tensor), self._number(tensor)) for tensor in changed.values())
        outputs = tuple(self._number(tensor) for tensor in made)
        for tensor in written:
            self.writers.setdefault(_storage(tensor), []).append(place)
        self.streams += bool(streams)
        self.calls.append(
            Call(target, arguments, outputs, rewrites, streams, after, self.kinds, isinstance(result, Tensor))
        )
        self.content |= self.calls[-1].makes if streams else set()
        return bool(streams)

    def _number(self, tensor: Tensor) -> int:
        number = self.numbers[id(tensor)] = len(self.values)
        self.values[number], self.versions[number] = tensor, tensor._version
        return number


def _merge(module: nn.Module, first: Call, second: Call) -> Call:
    """The call as it is at any batch size, from those of two."""
    same = first.target == second.target and first.outputs == second.outputs and first.streams == second.streams
    a, b = first.slots, second.slots
    if not same or len(a) != len(b):
        raise _untraceable(module, f"{first.name} is called in another way for another batch", first.scopes)
    merged = iter([_merge_slot(module, first, x, y) for x, y in zip(a, b, strict=True)])
    return replace(first, arguments=transform(first.arguments, lambda _: next(merged)))


def _merge_slot(module: nn.Module, call: Call, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
        if same and not any(map(closable, call.scopes)):  # else a module's own, maybe made of its parameters
            return Stored(a)
        raise _untraceable(module, f"{call.name} reads a tensor that came from nowhere", call.scopes)
    if type(a) is int and type(b) is int and a != b:
        slope, odd = divmod(b - a, ROWS[1] - ROWS[0])
        if not odd:
            return Count(a - slope * ROWS[0], slope)
    if isinstance(a, Slot | int | float | complex | str) and a != b:
        raise _untraceable(module, f"{call.name} is called in another way for another batch", call.scopes)
    return a


def closable(kind: type[nn.Module]) -> bool:
    return kind not in (nn.Sequential, nn.ModuleList)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of a tensor without bytes of its own
        return id(tensor)


def _untraceable(module: nn.Module, reason: str, scopes: tuple[type[nn.Module], ...]) -> UntraceableBackboneError:
    error = UntraceableBackboneError(
        f"{type(module).__name__} cannot be cut: {reason.splitlines()[0] if reason else 'it fails'}"
    )
    error.scopes = scopes  # type: ignore[attr-defined]
    return error


# trees of arguments and results


def transform(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists, dicts, slices and dataclasses with each leaf changed."""
    if isinstance(tree, slice):
        return slice(*(transform(part, change) for part in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, tuple):
        parts = [transform(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if type(tree) is list:
        return [transform(part, change) for part in tree]
    if type(tree) is dict:
        return {key: transform(part, change) for key, part in tree.items()}
    if is_tree(tree):
        return type(tree)(**{one.name: transform(getattr(tree, one.name), change) for one in fields(tree) if one.init})
    return change(tree)


def is_tree(value: Any) -> bool:
    """True for a dataclass with arguments or results in its fields."""
    return is_dataclass(value) and not isinstance(value, type | Slot)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree in the order of `transform`."""
    return list(_leaves(tree))


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, slice):
        yield from (tree.start, tree.stop, tree.step)
    elif isinstance(tree, tuple) or type(tree) is list:
        for part in tree:
            yield from _leaves(part)
    elif type(tree) is dict:
        for part in tree.values():
            yield from _leaves(part)
    elif is_tree(tree):
        for one in fields(tree):
            if one.init:
                yield from _leaves(getattr(tree, one.name))
    else:
        yield tree

"""Cut a recorded network into runs of calls, after every call that leaves one tensor of the image alive.

Blocks that read and give several tensors at once (HRNet's modules, CrossViT's branches, a query beside the image's tokens) are
cut apart as well: those tensors travel side by side as one.

A module is *opened*, its calls recorded instead of it, when it is a `Sequential` or `ModuleList`, owns one whose members have
children of their own (a stage), or has only children of one composite class (RegNet's stages, which name their blocks as
attributes). A class that was opened but whose children turn out not to run strictly one after another (a residual block that
wraps its branch in a `Sequential`), or that cannot be recorded, is closed and the network recorded again, so that a block is
never split in half.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelpatch.backbone.record import Call, Recording, Value, closable, leaves, record
from modelpatch.errors import UntraceableBackboneError

CONTAINERS = (nn.Sequential, nn.ModuleList)
Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Run:
    """Calls that depend on the image, from the streams `sources` to the streams `results`, by number."""

    calls: tuple[Call, ...]
    sources: frozenset[int]
    results: frozenset[int]


def has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def find_repeated(module: nn.Module) -> list[str]:
    """The names of members of containers that have children and siblings of their own class: repeated blocks."""
    found = []
    for name, container in module.named_modules():
        if isinstance(container, CONTAINERS):
            kinds = Counter(type(member) for member in container if has_children(member))
            found += [
                f"{name}.{place}".lstrip(".") for place, member in container.named_children() if kinds[type(member)] > 1
            ]
    return found


def find_wrappers(module: nn.Module) -> set[str]:
    """The names of modules around the repeated blocks that hold over half of all parameters, as transformers' models have."""
    blocks, sizes = find_repeated(module), {name: count_parameters(one) for name, one in module.named_modules()}
    members = tuple(f"{name}." for name in blocks)
    return {
        name
        for name, size in sizes.items()
        if 2 * size > sizes[""] and name not in blocks and not name.startswith(members)
        if any(block.startswith(f"{name}.") for block in blocks)
    }


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def opens(module: nn.Module) -> bool:
    """True if calls inside a module of this structure are recorded (see the module docstring)."""
    if isinstance(module, CONTAINERS):
        return True
    if type(module).__module__.startswith("torch.nn."):
        return False
    children = list(module.children())
    containers = [child for child in children if isinstance(child, CONTAINERS)]
    if any(has_children(member) for container in containers for member in container):
        return True
    return len({type(child) for child in children}) == 1 and has_children(children[0])


class Cutter:
    """Cuts a network, always in the same way: `opened` modules by name and `closed` classes are found the first time.

    `forward` gives what is to be run of a network, or of a clone of it; `last` names the module whose input ends the runs.
    """

    def __init__(self, module: nn.Module, forward: Callable[[nn.Module], Forward], last: str | None) -> None:
        self.module, self.forward, self.last = module, forward, last
        self.opened = {last[:place] for place, letter in enumerate(last) if letter == "."} if last else set[str]()
        self.opened |= set(getattr(module, "opened", ()))  # a network may name them itself
        self.closed: set[type[nn.Module]] = set()
        self.wrappers = find_wrappers(module)

    def cut(self, module: nn.Module, images: Sequence[Tensor]) -> tuple[Recording, list[Run], Run | None]:
        """The recording of the network or of a clone, its runs before the last module, and the rest.

        Raises `UntraceableBackboneError`.
        """
        while True:
            recording = self._record(module, images)
            calls = [call for call in recording.calls if call.streams]
            alive = find_alive(recording, calls)
            cuts = [
                place
                for place, call in enumerate(calls)
                if _ends_alone(recording, call, alive[place])
                or self._parts_members(recording, [call, *calls[place + 1 : place + 2]], alive[place])
            ]
            broken = {
                scope.kind
                for scope in recording.scopes
                if closable(scope.kind) and sum(scope.first <= cut < scope.last - 1 for cut in cuts) < scope.calls - 1
            }
            if broken <= self.closed:
                break
            self.closed |= broken
        end = len(calls)
        if self.last is not None:
            ends = [place for place, call in enumerate(calls) if call.target == self.last and place - 1 in cuts]
            if not ends:
                raise UntraceableBackboneError(
                    f"the classifier {self.last!r} does not end a chain with one tensor alive"
                )
            end = ends[0]
        kept = (cut for cut in cuts if cut < end and not alive[cut] & recording.written)
        bounds = [-1, *kept, *([end - 1] if end else [])]
        runs = [
            Run(tuple(calls[a + 1 : b + 1]), alive[a] if a >= 0 else frozenset({0}), alive[b])
            for a, b in itertools.pairwise(bounds)
            if b > a
        ]
        results = frozenset(slot.number for slot in leaves(recording.result) if isinstance(slot, Value))
        rest = Run(tuple(calls[end:]), runs[-1].results, results) if end < len(calls) and runs else None
        return recording, runs, rest

    def _record(self, module: nn.Module, images: Sequence[Tensor]) -> Recording:
        while True:
            try:
                return record(module, self.forward(module), images, self._is_leaf)
            except UntraceableBackboneError as error:
                culprits = [kind for kind in getattr(error, "scopes", ()) if closable(kind)]
                if not culprits or culprits[-1] in self.closed or culprits[-1] is type(self.module):
                    raise error.__cause__ or error from None
                self.closed.add(culprits[-1])

    def _parts_members(self, recording: Recording, calls: Sequence[Call], alive: frozenset[int]) -> bool:
        """True after a member of a container that makes all that is alive, and before one that reads it."""
        if len(alive) < 2 or len({recording.values[number].dtype for number in alive}) > 1:
            return False
        first, *rest = calls
        made = alive <= first.makes and self._container_of(first) is not None
        read = any(alive <= call.streams and self._container_of(call) in CONTAINERS for call in rest)
        return (made or read) and all(map(recording.rows_of, alive))

    def _container_of(self, call: Call) -> type[nn.Module] | None:
        """The class of the container that holds the composite module that is called."""
        if not isinstance(call.target, str) or not has_children(self.module.get_submodule(call.target)):
            return None
        container = self.module.get_submodule(call.target.rpartition(".")[0])
        return type(container) if isinstance(container, CONTAINERS) else None

    def _is_leaf(self, module: nn.Module, name: str) -> bool:
        inside = name in self.wrappers or opens(module)
        return name not in self.opened and (type(module) in self.closed or not inside)


def find_alive(recording: Recording, calls: Sequence[Call]) -> list[frozenset[int]]:
    """The streams that are alive after each call, by number."""
    last_use = {number: place for place, call in enumerate(calls) for number in call.streams}
    last_use |= {slot.number: len(calls) for slot in leaves(recording.result) if isinstance(slot, Value)}
    alive, found = {0}, []
    for place, call in enumerate(calls):
        alive = {number for number in (*alive, *call.makes) if last_use.get(number, -1) > place}
        found.append(frozenset(alive))
    return found


def _ends_alone(recording: Recording, call: Call, alive: frozenset[int]) -> bool:
    """True after a call that makes the one tensor that is alive, with a row for each image."""
    return len(alive) == 1 and alive <= call.makes and recording.rows_of(next(iter(alive))) == 1

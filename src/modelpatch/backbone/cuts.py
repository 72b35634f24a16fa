"""Cut a recorded network into runs of calls, after every call that leaves one tensor of the image alive.

A module is *opened*, its calls recorded instead of it, when it is a `Sequential` or `ModuleList`, owns one whose members have
children of their own (a stage), or has only children of one composite class (RegNet's stages, which name their blocks as
attributes). A class that was opened but whose children turn out not to run strictly one after another (a residual block that
wraps its branch in a `Sequential`), or that cannot be recorded, is closed and the network recorded again, so that a block is
never split in half.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelpatch.backbone.record import Call, Recording, Value, closable, leaves, record
from modelpatch.errors import UntraceableBackboneError

Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Run:
    """Calls that depend on the image, from the streams `sources` to the streams `results`, by number."""

    calls: tuple[Call, ...]
    sources: frozenset[int]
    results: frozenset[int]


def has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def opens(module: nn.Module) -> bool:
    """True if calls inside a module of this structure are recorded (see the module docstring)."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return True
    if type(module).__module__.startswith("torch.nn."):
        return False
    children = list(module.children())
    containers = [child for child in children if isinstance(child, nn.Sequential | nn.ModuleList)]
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

    def cut(self, module: nn.Module, images: Sequence[Tensor]) -> tuple[Recording, list[Run], Run | None]:
        """The recording of the network or of a clone, its runs before the last module, and the rest.

        Raises `UntraceableBackboneError`.
        """
        while True:
            recording = self._record(module, images)
            calls = [call for call in recording.calls if call.streams]
            alive = find_alive(recording, calls)
            cuts = [place for place, numbers in enumerate(alive) if _is_cut(recording, calls[place], numbers)]
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

    def _is_leaf(self, module: nn.Module, name: str) -> bool:
        return name not in self.opened and (type(module) in self.closed or not opens(module))


def find_alive(recording: Recording, calls: Sequence[Call]) -> list[frozenset[int]]:
    """The streams that are alive after each call, by number."""
    last_use = {number: place for place, call in enumerate(calls) for number in call.streams}
    last_use |= {slot.number: len(calls) for slot in leaves(recording.result) if isinstance(slot, Value)}
    alive, found = {0}, []
    for place, call in enumerate(calls):
        alive = {number for number in (*alive, *call.makes) if last_use.get(number, -1) > place}
        found.append(frozenset(alive))
    return found


def _is_cut(recording: Recording, call: Call, alive: Collection[int]) -> bool:
    return len(alive) == 1 and call.makes >= set(alive) and recording.batched >= set(alive)

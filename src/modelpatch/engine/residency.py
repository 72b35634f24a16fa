"""Which variants are modules of their own, under a byte budget.

A variant always works: its patch lends its numbers to a shared module. One that is used often is faster as a module of
its own, with masked weights made once and BatchNorm folded; that costs the bytes of all its weights. Room is given to the
least recently used last, and only to a variant that was used more recently than the one it would displace, so that
many variants taking turns do not throw one another out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from modelpatch.backbone.frozen import Module, casting, freeze, sample
from modelpatch.backbone.tuning import Tuning
from modelpatch.errors import BudgetError
from modelpatch.patch import BoundPart


@dataclass
class _Resident:
    module: Module
    nbytes: int


class Residency:
    """Modules of variants by their keys. `budget` is in bytes. Thread-safe."""

    def __init__(self, budget: int, tuning: Tuning) -> None:
        self.budget, self.tuning = budget, tuning
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # the least recently used first
        self._used: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._refused: set[str] = set()
        self._making: set[str] = set()
        self._clock = 0
        self._lock = threading.Lock()
        self.made = self.evicted = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the modules there are."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(resident.nbytes for resident in self._resident.values())

    def module(self, part: BoundPart) -> Module:
        """What runs the variant now: its own module where there is or should be one, else the part that lends."""
        with self._lock:
            self._clock += 1
            before, self._used[part.key] = self._used.get(part.key, 0), self._clock
            if part.key in self._resident:
                self._resident.move_to_end(part.key)
                return self._resident[part.key].module
            if not self._worth_it(part) or not self._make_room(cost(part, self.tuning), before):
                return casting(part, self.tuning, torch.float32)
            self._making.add(part.key)
        return self._make(part)

    def pin(self, part: BoundPart) -> None:
        """Make the variant's module now and keep it. Raises `BudgetError` where the budget has no room beside other pins."""
        with self._lock:
            needed = cost(part, self.tuning)
            if part.key not in self._resident and not self._make_room(needed, self._clock + 1):
                raise BudgetError(
                    f"{part.name} takes {needed:,} bytes as a module of its own; the budget of {self.budget:,} has "
                    "no room beside what is pinned. Raise budget=..., or unpin another task."
                )
            self._pinned.add(part.key)
            if part.key in self._resident:
                return
        self._make(part)

    def unpin(self, part: BoundPart) -> None:
        """The variant may be evicted again."""
        with self._lock:
            self._pinned.discard(part.key)

    def drop(self, key: str) -> None:
        """Forget a variant that nobody uses any more."""
        with self._lock:
            self._resident.pop(key, None)
            self._used.pop(key, None)
            self._pinned.discard(key)
            self._refused.discard(key)

    def _worth_it(self, part: BoundPart) -> bool:
        waits = part.key in self._refused or part.key in self._making
        return not waits and (self.tuning.fold or bool(part.numbers.made))

    def _make_room(self, needed: int, before: int) -> bool:
        """Evict what was last used before the moment `before` until `needed` bytes are free; nothing if that is too little."""
        free, victims = self.budget - self._bytes(), []
        for key, resident in self._resident.items():
            if free >= needed:
                break
            if key not in self._pinned and self._used.get(key, 0) < before:
                victims.append(key)
                free += resident.nbytes
        if free < needed:
            return False
        for key in victims:
            del self._resident[key]
        self.evicted += len(victims)
        return True

    def _make(self, part: BoundPart) -> Module:
        module = part.make()
        frozen: Module | None = module
        if not self.tuning.plain:
            device = next((t.device for t in module.parameters()), None) or part.numbers.flat.device
            frozen = freeze(module, sample(part.shelf.input_shape, device), self.tuning)
        with self._lock:
            self._making.discard(part.key)
            if frozen is None:
                self._refused.add(part.key)
                return casting(part, self.tuning, torch.float32)
            self._resident[part.key] = _Resident(frozen, cost(part, self.tuning))
            self.made += 1
        return frozen


def cost(part: BoundPart, tuning: Tuning) -> int:
    """Bytes of the variant as a module of its own, beyond what the patch and the backbone hold."""
    if not tuning.plain:
        return part.shelf.nbytes
    return sum(weight.weight.nbytes for weight in part.numbers.made.values())

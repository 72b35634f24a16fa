"""The variants that have modules of their own, under a byte budget.

A variant works without one, its tensors bound to a template. With masked weights made once and BatchNorm folded it is faster,
at the cost of the bytes of all its weights. So a module is made in the background from a variant's `OFTEN`th use on, if the
budget has room beside modules that were used more recently.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from modelpatch.backbone.tuning import Module, Tuning, casting, freeze, sample
from modelpatch.engine.resident import BoundPart
from modelpatch.engine.threads import computing_pool
from modelpatch.errors import BudgetError

OFTEN = 3


@dataclass
class _Variant:
    """The state of one variant: number of tasks that have it, those that pin it, last use, number of uses, module."""

    users: int = 0
    pins: frozenset[str] = frozenset()
    used: int = 0
    uses: int = 0
    module: Module | None = None
    nbytes: int = 0
    making: Future[None] | None = field(default=None, repr=False)
    refused: bool = False


class Residency:
    """Modules of variants by their keys. `budget` is in bytes; modules in the making count, and what lies `beside` them.

    Thread-safe.
    """

    def __init__(self, budget: int, tuning: Tuning, beside: Callable[[], int] = lambda: 0) -> None:
        self.budget, self.tuning, self._beside = budget, tuning, beside
        self._known: dict[str, _Variant] = {}
        self._held: OrderedDict[str, _Variant] = OrderedDict()  # those with bytes, the least recently used first
        self._clock = 0
        self._lock = threading.RLock()
        self._maker = computing_pool(1, "modelpatch-variants")
        self.made = self.evicted = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the modules there are or are being made."""
        with self._lock:
            return sum(variant.nbytes for variant in self._held.values())

    def retain(self, parts: Iterable[BoundPart]) -> None:
        """Count one more task for these variants."""
        with self._lock:
            for part in parts:
                self._known.setdefault(part.key, _Variant()).users += 1

    def release(self, parts: Iterable[BoundPart]) -> set[str]:
        """Count one task fewer for these variants; those without a task are forgotten. Returns their keys."""
        gone = set()
        with self._lock:
            for part in parts:
                variant = self._known[part.key]
                variant.users -= 1
                if not variant.users:
                    del self._known[part.key]
                    self._held.pop(part.key, None)
                    gone.add(part.key)
        return gone

    def module(self, part: BoundPart) -> Module:
        """The module that runs the variant now: its own if there is one, else the part over its template."""
        with self._lock:
            variant = self._known.get(part.key)
            if variant is not None:  # it is None in a call that began before its task was removed
                self._clock += 1
                before, variant.used = variant.used, self._clock
                variant.uses += 1
                if part.key in self._held:
                    self._held.move_to_end(part.key)
                if variant.module is not None:
                    return variant.module
                if variant.uses >= OFTEN:
                    self._begin(part, variant, before)
        return casting(part, self.tuning, torch.float32)

    def make(self, parts: Iterable[BoundPart]) -> None:
        """Make the variants' modules and wait for them, as far as tasks still have them and the budget has room."""
        with self._lock:
            known = [(part, self._known[part.key]) for part in parts if part.key in self._known]
            for part, variant in known:
                self._begin(part, variant, self._clock + 1)
            making = [variant.making for _, variant in known]
        _wait(making)

    def pin(self, task: str, parts: Sequence[BoundPart]) -> None:
        """Keep the modules of a task's variants. Raises `BudgetError`, with nothing pinned, where the budget has no room."""
        with self._lock:
            needed = {part.key: self._cost(part) for part in parts}
            kept = sum(v.nbytes for key, v in self._held.items() if v.pins and key not in needed)
            if kept + sum(needed.values()) > self.budget:
                raise BudgetError(
                    f"as modules of their own these variants take {sum(needed.values()):,} bytes; the budget of "
                    f"{self.budget:,} has no room beside what is pinned, {kept:,}. Raise budget=..., or unpin another task."
                )
            for part in parts:
                variant = self._known[part.key]
                variant.pins |= {task}
                self._begin(part, variant, self._clock + 1)

    def unpin(self, task: str, parts: Iterable[BoundPart]) -> None:
        """The variants may be evicted again, as far as no other task pins them."""
        with self._lock:
            for part in parts:
                self._known[part.key].pins -= {task}

    def settle(self) -> None:
        """Wait for the modules that are being made."""
        with self._lock:
            making = [variant.making for variant in self._known.values()]
        _wait(making)

    def _cost(self, part: BoundPart) -> int:
        """Bytes of the variant as a module of its own, beyond what the patch and the backbone hold."""
        return part.made_bytes if self.tuning.plain else part.template.nbytes

    def _begin(self, part: BoundPart, variant: _Variant, before: int) -> None:
        """Have the variant's module made in the background, if that helps and there is room; see `_make_room`."""
        helps = not self.tuning.plain or part.made_bytes > 0
        idle = variant.module is None and variant.making is None and not variant.refused
        if helps and idle and self._make_room(part, variant, before):
            variant.making = self._maker.submit(self._make, part, variant)

    def _make_room(self, part: BoundPart, variant: _Variant, before: int) -> bool:
        """Reserve the variant's bytes, evicting modules last used before the moment `before`; False if that is too little.

        Modules in the making are evicted as well: they find their reservation gone when they are ready.
        """
        needed = self._cost(part)
        if needed > self.budget:  # asked at every use
            return False
        free, victims = self.budget - self.nbytes - self._beside(), []
        for key, other in self._held.items():
            if free >= needed:
                break
            if not other.pins and other.used < before:
                victims.append(key)
                free += other.nbytes
        if free < needed:
            return False
        for key in victims:
            self._held.pop(key).module = None
        self.evicted += len(victims)
        variant.nbytes = needed
        self._held[part.key] = variant
        return True

    def _make(self, part: BoundPart, variant: _Variant) -> None:
        module: Module | None = None
        try:
            made = part.copy()
            images = sample(part.template.input_shape, part.flat.device)
            module = made if self.tuning.plain else freeze(made, images, self.tuning)
        finally:
            with self._lock:
                variant.making, variant.refused = None, module is None
                if self._held.get(part.key) is variant:
                    if module is None:
                        del self._held[part.key]
                    else:
                        variant.module = module
                        self.made += 1


def _wait(futures: Iterable[Future[None] | None]) -> None:
    for future in futures:
        if future is not None:
            future.result()

"""Fair shares between callers: a queue by deficit round robin, places that leave some for others, budgets.

Deficit round robin: M. Shreedhar and G. Varghese, Efficient Fair Queuing Using Deficit Round Robin, 1996,
https://doi.org/10.1109/90.502236. Places: A. Choudhury and E. Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches, 1998, https://doi.org/10.1109/90.664262.
"""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from modelpatch.serve.tenants import Caller, Tenant

T = TypeVar("T")
RECENT = 1.0  # seconds for which a caller counts as one who will ask again


@dataclass
class Flow(Generic[T]):
    """The waiting items of one caller, and the work it may still send in its turn."""

    tenant: Tenant
    deficit: float = 0.0
    open: bool = False  # its turn has begun
    items: deque[tuple[T, float]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Items with their work. Callers take turns; a turn is worth the largest item's work times the caller's weight."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.work = 0.0  # of all that wait
        self._now = now
        self._flows: OrderedDict[str, Flow[T]] = OrderedDict()  # in the order of turns
        self._tenants: Counter[str] = Counter()  # flows of each that wait
        self._turn = 0.0  # work of a turn
        self._seen: OrderedDict[str, float] = OrderedDict()  # callers, the latest last

    def __len__(self) -> int:
        return sum(len(flow.items) for flow in self._flows.values())

    def put(self, caller: Caller, item: T, work: float) -> None:
        """Let an item wait for its caller's turn."""
        self._turn = max(self._turn, work) if self._flows else work
        if caller.name not in self._flows:
            self._tenants[caller.tenant.name] += 1
            self._flows[caller.name] = Flow(caller.tenant)
        self._flows[caller.name].items.append((item, work))
        self.work += work
        self._seen[caller.name] = self._now()
        self._seen.move_to_end(caller.name)

    def take(self, most: int = 1, work: float = float("inf")) -> list[T]:
        """The next items, at most so many and of so much work, but one at least.

        While other callers ask too, nobody gets more than one turn, so that who comes next waits for little.
        """
        while self._seen and next(iter(self._seen.values())) < self._now() - RECENT:
            self._seen.popitem(last=False)
        taken: list[T] = []
        spent, ended, shared = 0.0, set(), len({*self._seen, *self._flows}) > 1
        while self._flows and len(taken) < most:
            name, flow = next(iter(self._flows.items()))
            if shared and taken and name in ended:
                break
            if not flow.open:
                flow.deficit, flow.open = flow.deficit + self._worth(flow), True
            item, price = flow.items[0]
            if flow.deficit >= price:
                if taken and spent + price > work:
                    break
                flow.items.popleft()
                flow.deficit -= price
                spent += price
                taken.append(item)
            if not flow.items:
                self._drop(name)
            elif flow.deficit < flow.items[0][1]:
                flow.open = False
                self._flows.move_to_end(name)
                ended.add(name)
        self.work = max(0.0, self.work - spent) if self._flows else 0.0
        return taken

    def drain(self) -> list[T]:
        """All items, which wait no more."""
        left = [item for flow in self._flows.values() for item, _ in flow.items]
        self._flows.clear()
        self._tenants.clear()
        self.work = 0.0
        return left

    def _worth(self, flow: Flow[T]) -> float:
        """The work of a turn; the callers of one tenant share its weight."""
        return self._turn * flow.tenant.weight / self._tenants[flow.tenant.name]

    def _drop(self, name: str) -> None:
        tenant = self._flows.pop(name).tenant.name
        self._tenants[tenant] -= 1
        self._tenants += Counter()  # forgets zeros


class Places:
    """Places that callers share. One may have as many as it leaves free, so that however many others have, some are left.

    Callers of one tenant share what the tenant may have in the same way.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.of: Counter[tuple[str, ...]] = Counter()  # of tenants and of callers

    def take(self, caller: Caller, count: int = 1) -> bool:
        """Take places; False where the caller may not have so many."""
        if fits := self.fits(caller, count):
            self._add(caller, count)
        return fits

    def fits(self, caller: Caller, count: int = 1) -> bool:
        """Return True if the caller may have so many more."""
        tenant, own = self._keys(caller)
        left = self.most - self.taken
        if tenant[-1] != caller.name:
            if self.of[tenant] + count > left:
                return False
            left -= self.of[tenant]
        return self.of[own] + count <= left

    def give_back(self, caller: Caller, count: int = 1) -> None:
        self._add(caller, -count)

    def _add(self, caller: Caller, count: int) -> None:
        self.taken += count
        for key in self._keys(caller):
            self.of[key] += count
            if not self.of[key]:
                del self.of[key]

    @staticmethod
    def _keys(caller: Caller) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("tenant", caller.tenant.name), ("caller", caller.tenant.name, caller.name)


class Budgets:
    """The work that tenants with a budget have left. One who overdraws it waits until it is positive again."""

    BURST = 5.0  # seconds of work that may be saved up

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._left: dict[str, tuple[float, float]] = {}  # seconds of a tenant's budget, and when that was so

    def wait(self, tenant: Tenant) -> float:
        """Seconds until the tenant has work left; 0 where it has."""
        return max(0.0, -self._seconds(tenant))

    def spend(self, tenant: Tenant, work: float) -> None:
        """Charge a tenant with multiply-adds."""
        if tenant.gmacs is not None:
            self._left[tenant.name] = (self._seconds(tenant) - work / (tenant.gmacs * 1e9), self._now())

    def _seconds(self, tenant: Tenant) -> float:
        left, when = self._left.get(tenant.name, (self.BURST, self._now()))
        return min(self.BURST, left + self._now() - when)


class FairPool:
    """Work for the threads of a pool, which callers use in turns."""

    def __init__(self, pool: Executor, threads: int) -> None:
        self.pool, self._free = pool, threads
        self._queue: FairQueue[tuple[asyncio.Future[Any], Callable[[], Any]]] = FairQueue()

    def submit(self, caller: Caller, size: float, work: Callable[[], T]) -> "asyncio.Future[T]":
        """The result of `work`, which is done in the caller's turn; `size` is what it counts there."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put(caller, (result, work), size)
        self._proceed()
        return result

    def _proceed(self) -> None:
        while self._free and (taken := self._queue.take()):
            ((result, work),) = taken
            if not result.done():
                self._free -= 1
                job = asyncio.get_running_loop().run_in_executor(self.pool, work)
                job.add_done_callback(partial(self._finish, result))

    def _finish(self, result: "asyncio.Future[Any]", job: "asyncio.Future[Any]") -> None:
        self._free += 1
        if job.cancelled():
            result.cancel()
        elif (error := job.exception()) is not None:
            if not result.done():
                result.set_exception(error)
        elif not result.done():
            result.set_result(job.result())
        self._proceed()

"""Room for requests: how many are read and answered at once, of all callers and of one, and the bytes of their bodies.

    arrives ── of its caller at most `per_client` ── body, within `arriving_bytes` of all ── one of `requests` ── answered

A request takes its place among those that are answered when its body is whole, so that slow uploads keep nobody waiting. Of
bytes and places one caller may have as many as it leaves free.
"""

import asyncio
import hmac
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from modelpatch.serve.fair import Budgets, Places
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem
from modelpatch.serve.settings import Settings
from modelpatch.serve.tenants import ADMIN, Caller, address_of


class Arrival:
    """One request of a caller. Its bytes are counted as they arrive and given back when it is answered."""

    def __init__(self, admission: "Admission", caller: Caller) -> None:
        self.admission, self.caller, self.nbytes = admission, caller, 0

    def add(self, nbytes: int) -> None:
        """Count bytes that arrived. Raises `Problem`, 429, where the bodies of all requests have no room for them."""
        bodies = self.admission.bodies
        if not bodies.take(self.caller, nbytes):
            said = f"The requests that arrive have {bodies.taken:,} of {bodies.most:,} bytes, too many of them yours."
            raise Problem("too-busy", said, "Try again soon.", wait=self.admission.seconds)
        self.nbytes += nbytes
        self.admission.tell()

    def close(self) -> None:
        """Forget the bytes."""
        self.admission.bodies.give_back(self.caller, self.nbytes)
        self.nbytes = 0
        self.admission.tell()


class WrongKeys:
    """Seconds that wrong tokens and keys of an address wait for an answer: twice as many each time, until it is forgotten."""

    FIRST, MOST, FORGOTTEN, ADDRESSES = 0.05, 2.0, 600.0, 4096

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seen: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last came

    def delay(self, address: str) -> float:
        """Count a wrong one. Returns the seconds that its answer waits."""
        count, when = self._seen.pop(address, (0, 0.0))
        count = 0 if self._now() - when > self.FORGOTTEN else count
        self._seen[address] = count + 1, self._now()
        while len(self._seen) > self.ADDRESSES:
            self._seen.popitem(last=False)
        return float(min(self.FIRST * 2 ** min(count, 30), self.MOST))


class Admission:
    """The requests of one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.bodies, self.places, self.budgets = Places(settings.arriving_bytes), Places(settings.requests), Budgets()
        self.clients: Counter[str] = Counter()
        self.wrong_keys = WrongKeys()
        self.seconds = 1.0  # that an answer took of late, in the mean

    @property
    def arrived(self) -> int:
        """Bytes of the bodies that are in memory."""
        return self.bodies.taken

    def tell(self) -> None:
        """Show the bytes in the metrics."""
        self.metrics.request_bytes.set(self.arrived)

    def recognise(self, host: str, key: str | None) -> Caller:
        """The caller behind an address and a key. Raises `Problem`, 401 or 403."""
        tenants, address = self.settings.tenants, address_of(host)
        if tenants is None:
            return Caller.alone(address)
        token = self.settings.token
        if (
            key is not None
            and token is not None
            and hmac.compare_digest(key.encode("utf-8", "surrogateescape"), token.encode())
        ):
            return Caller.alone(ADMIN)
        if key is not None:
            if (tenant := tenants.find(key)) is None:
                raise Problem("wrong-key", "No tenant of this server has that key.", "Use the key you were given.")
            return Caller(tenant.name, tenant)
        if tenants.strangers is None:
            raise Problem("no-key", "This server answers tenants alone.", "Send the header Authorization: Bearer KEY.")
        return Caller(address, tenants.strangers)

    @asynccontextmanager
    async def receive(self, caller: Caller) -> AsyncIterator[Arrival]:
        """Let a caller's request arrive and be answered before the deadline. Raises `Problem`, 429 or 503."""
        most = caller.tenant.requests or self.settings.per_client
        name = caller.name
        if self.clients[name] >= most:
            said = f"{most} requests of yours are here already, as many as this server takes of one."
            raise Problem("too-busy", said, "Send fewer at once.", wait=self.seconds)
        if wait := self.budgets.wait(caller.tenant):
            said = f"The budget of {caller.tenant.gmacs:g} billion multiply-adds a second is used up."
            raise Problem("over-budget", said, "Send less.", wait=wait)
        self.clients[name] += 1
        arrival = Arrival(self, caller)
        try:
            async with asyncio.timeout(self.settings.deadline):
                yield arrival
        except TimeoutError:
            said = f"There was no answer within {self.settings.deadline:g} seconds."
            raise Problem("deadline", said, "Try again, or send fewer images at once.", wait=self.seconds) from None
        finally:
            arrival.close()
            self.clients[name] -= 1
            if not self.clients[name]:
                del self.clients[name]

    @asynccontextmanager
    async def answer(self, caller: Caller) -> AsyncIterator[None]:
        """Take a place among the requests that are answered. Raises `Problem`, 429."""
        if not self.places.take(caller):
            said = f"{self.places.taken} of {self.places.most} requests are being answered, too many of them yours."
            raise Problem("too-busy", said, "Try again soon.", wait=self.seconds)
        start = time.monotonic()
        try:
            yield
        finally:
            self.places.give_back(caller)
            self.seconds += (time.monotonic() - start - self.seconds) / 16

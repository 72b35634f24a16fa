"""Room for requests: how many are read and answered at once, of all clients and of one, and the bytes of their bodies.

    arrives ── of its client at most `per_client` ── body, within `arriving_bytes` of all ── one of `requests` ── answered

A request takes its place among those that are answered when its body is whole, so that slow uploads keep nobody waiting.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem
from modelpatch.serve.settings import Settings


class Arrival:
    """One request's bytes, counted as they arrive and given back when it is answered."""

    def __init__(self, admission: "Admission") -> None:
        self.admission, self.nbytes = admission, 0

    def add(self, nbytes: int) -> None:
        """Count bytes that arrived. Raises `Problem`, 429, where the bodies of all requests have no room for them."""
        most = self.admission.settings.arriving_bytes
        if self.admission.arrived + nbytes > most:
            raise Problem("too-busy", f"The requests that arrive have more than {most:,} bytes.", "Try again soon.")
        self.admission.count(nbytes)
        self.nbytes += nbytes


class Admission:
    """The requests of one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.running, self.arrived = 0, 0
        self.clients: Counter[str] = Counter()

    def count(self, nbytes: int) -> None:
        """Count bytes of bodies that are in memory."""
        self.arrived += nbytes
        self.metrics.request_bytes.set(self.arrived)

    @asynccontextmanager
    async def receive(self, client: str) -> AsyncIterator[Arrival]:
        """Let a client's request arrive and be answered before the deadline. Raises `Problem`, 429 or 503."""
        most = self.settings.per_client
        if self.clients[client] >= most:
            said = f"{most} requests of your address are here already, as many as this server takes of one."
            raise Problem("too-busy", said, "Send fewer at once.")
        self.clients[client] += 1
        arrival = Arrival(self)
        try:
            async with asyncio.timeout(self.settings.deadline):
                yield arrival
        except TimeoutError:
            said = f"There was no answer within {self.settings.deadline:g} seconds."
            raise Problem("deadline", said, "Try again, or send fewer images at once.") from None
        finally:
            self.count(-arrival.nbytes)
            self.clients[client] -= 1
            if not self.clients[client]:
                del self.clients[client]

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[None]:
        """Take a place among the requests that are answered. Raises `Problem`, 429."""
        if self.running >= self.settings.requests:
            said = f"{self.running} requests are being answered; this server takes that many."
            raise Problem("too-busy", said, "Try again soon.")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

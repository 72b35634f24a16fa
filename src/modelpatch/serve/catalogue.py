"""References to versions as the store has them, remembered for a moment: requests come by the thousand, a store may be far."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from modelpatch.engine.threads import computing_pool
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.store.store import Store
from modelpatch.store.version import LATEST, Version

T = TypeVar("T")
MOST = 4096  # references that are remembered
THREADS = 4


@dataclass(frozen=True)
class ServedTask:
    """A task that a request names."""

    name: str  # the request's
    key: str  # the engine's
    identity: str  # the hash that answers report
    version: Version | None = None  # the store's; None for tasks of the server's own: the backbone and cascades


class Catalogue:
    """The tasks that requests may name: the server's `own` and the store's, at most `refresh` seconds old.

    For one event loop. Threads of its own read the store, so that slow loads do not block lookups; equal
    lookups at the same time wait for one answer. Its own changes are seen at once.
    """

    def __init__(self, store: Store, refresh: float, own: Mapping[str, ServedTask]) -> None:
        self.store, self.refresh, self.own = store, refresh, own
        self._known: OrderedDict[str, tuple[float, asyncio.Future[Any]]] = OrderedDict()
        self._threads = computing_pool(1, "modelpatch-store", THREADS)
        self._was_there = False

    async def is_lost(self) -> bool:
        """Return True if the store was there once and is gone, or cannot be reached."""
        try:
            there = await self._ask("?", self.store.exists)
        except Problem:
            return True
        self._was_there |= there
        return self._was_there and not there

    async def find(self, names: Sequence[str]) -> tuple[list[ServedTask], dict[str, Problem]]:
        """The targets of names, each once, and by name the problem of those that have none."""

        async def one(name: str) -> ServedTask | Problem:
            if name in self.own:
                return self.own[name]
            try:
                version = await self.resolve(name)
            except Problem as problem:
                return problem
            return ServedTask(name, version.hash, version.hash, version)

        names = list(dict.fromkeys(names))
        results = await asyncio.gather(*map(one, names))
        found = [result for result in results if isinstance(result, ServedTask)]
        refused = {name: result for name, result in zip(names, results, strict=True) if isinstance(result, Problem)}
        return found, refused

    async def resolve(self, reference: str) -> Version:
        """The version a reference names now. Raises `Problem`, 404 where there is none."""
        return await self._ask(reference, lambda: self.store.resolve(reference), patch=reference)

    async def list(self) -> Sequence[Version]:
        """All patches in the order of names: of each the version tagged latest, else the youngest."""

        def find() -> Sequence[Version]:
            chosen: dict[str, Version] = {}
            for version in self.store.list():
                if version.name not in chosen or LATEST not in chosen[version.name].tags:
                    chosen[version.name] = version
            return list(chosen.values())

        return await self._ask("", find)

    async def latest(self) -> Sequence[Version]:
        """The patches that a request without names is answered by: those with a version tagged latest."""
        return [version for version in await self.list() if LATEST in version.tags]

    async def versions(self, name: str) -> Sequence[Version]:
        """All versions of one name. Raises `Problem`, 404 where there are none."""
        return await self._ask(f"{name}@*", lambda: self.store.versions(name), patch=name)

    async def change(self, work: Callable[[], T], **facts: Any) -> T:
        """Write to the store, and forget what was remembered. Raises `Problem`, also where the store is gone."""
        self._known.pop("?", None)
        if await self.is_lost():
            said = f"The store at {self.store.url} is gone."
            raise Problem("store-unreachable", said, "Bring it back; the server makes no new one in its place.")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except Exception as error:
            raise problem_of(error, **facts) from error
        finally:
            self._known.clear()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, key: str, work: Callable[[], T], **facts: Any) -> T:
        until, answer = self._known.get(key, (0.0, None))
        if answer is None or (until < time.monotonic() and answer.done()):
            answer = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._threads, work))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # mark an exception as seen
            self._known[key] = (time.monotonic() + self.refresh, answer)
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        try:
            return await asyncio.shield(answer)
        except Exception as error:
            raise problem_of(error, **facts) from error

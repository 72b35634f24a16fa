"""What a store says, remembered for a moment: requests come by the thousand, and a store may be far away."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from modelpatch.engine.threads import computing_pool
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.store.store import Store
from modelpatch.store.version import LATEST, Version

T = TypeVar("T")
MOST = 4096  # references that are remembered
THREADS = 4


class Catalogue:
    """References to versions as the store has them, at most `refresh` seconds old. For one event loop.

    Threads of its own read the store, so that slow loads keep nobody from asking; those who ask the same at once wait for one
    answer. Its own changes are seen at once, other writers' within `refresh`.
    """

    def __init__(self, store: Store, refresh: float) -> None:
        self.store, self.refresh = store, refresh
        self._known: OrderedDict[str, tuple[float, asyncio.Future[Any]]] = OrderedDict()
        self._threads = computing_pool(1, "modelpatch-store", THREADS)

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
            return sorted(chosen.values(), key=lambda version: version.name)

        return await self._ask("", find)

    async def versions(self, name: str) -> Sequence[Version]:
        """All versions of one name. Raises `Problem`, 404 where there are none."""
        return await self._ask(f"{name}@*", lambda: self.store.versions(name), patch=name)

    def read(self, version: Version) -> bytes:
        """The bytes of a version, from any thread. Raises `FileNotFoundError` if it is gone, else `Problem`."""
        try:
            return self.store.read(version)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._problem(error) from error

    async def change(self, work: Callable[[], T], **facts: Any) -> T:
        """Write to the store, and forget what was remembered. Raises `Problem`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except Exception as error:
            raise self._problem(error, **facts) from error
        finally:
            self._known.clear()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, key: str, work: Callable[[], T], **facts: Any) -> T:
        until, answer = self._known.get(key, (0.0, None))
        if answer is None or (until < time.monotonic() and answer.done()):
            answer = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._threads, work))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, whoever still waits
            self._known[key] = (time.monotonic() + self.refresh, answer)
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        try:
            return await asyncio.shield(answer)
        except Exception as error:
            raise self._problem(error, **facts) from error

    def _problem(self, error: Exception, **facts: Any) -> Problem:
        """The error as a problem that does not tell strangers where the store is."""
        problem = problem_of(error, **facts)
        problem.detail = problem.detail.replace(self.store.url, "the store")
        return problem

"""The patches in memory: loaded when a request asks for them, within a budget of bytes.

    ask ── resident? ── yes ───────────────────────────────────────────────────────┐
             no                                                                    │
             └─ load, once for all who ask:  read ─ validate ─ bind ─ try ─ enter ─┴─ hold ─ answer ─ let go
                                               any failure: remembered, and nothing else changes

A patch is evicted only once another has been loaded and tried in its place, and never while a request holds it. A request
first claims the bytes of all patches it needs, in the order of arrival, and only then waits for loads, so that requests cannot
block each other. A patch is known by the hash of its file. One file may be in the store under several names: bytes that cannot
be read are a fault of that name's copy, everything else is a fault of the bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

import torch

from modelpatch.backbone.tuning import sample
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch
from modelpatch.engine.template import Templates
from modelpatch.engine.threads import computing_pool
from modelpatch.errors import InvalidPatchError
from modelpatch.patch.contents import decode_patch
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.store.version import Version

LOG = logging.getLogger("modelpatch.serve")
PASSING = ("store-unreachable", "failed")  # another try may do better, so these are remembered for a moment only
MOMENT = 1.0
MOST = 65_536  # failures and sizes that are remembered


def load(templates: Templates, data: bytes) -> BoundPatch:
    """Bind a patch file's bytes and try the patch on an image.

    Raises the errors of reading and binding, and `InvalidPatchError` for values that are not finite.
    """
    backbone = templates.backbone
    most = 2 * sum(parameter.numel() for parameter in backbone.module.parameters())  # a mask and a difference of each
    bound = BoundPatch(backbone, decode_patch(data, "the patch", most=most), templates)
    for part in bound.parts:
        _ = part.key  # hashed here, not in the event loop
    size = bound.preprocessing.input_size
    with torch.inference_mode():
        logits = bound(sample(size, backbone.device)[:1])
    if not logits.isfinite().all():
        raise InvalidPatchError("The patch answers a trial image with values that are not finite. Train it again.")
    return bound


class PatchCache:
    """The patches that an engine has, named there by the hashes of their files. For one event loop.

    `read` gives the bytes of a version and raises `Problem`; it is called in threads. Problems are `about` a hash.
    """

    def __init__(self, engine: Engine, read: Callable[[Version], bytes], settings: Settings, metrics: Metrics) -> None:
        self.engine, self.read, self.settings, self.metrics = engine, read, settings, metrics
        self.sizes: OrderedDict[str, int] = OrderedDict()  # resident bytes by hash, the least recently used first
        self._learned: dict[str, int] = {}  # of every patch that was ever bound
        self._claims: Counter[str] = Counter()
        self._queue: deque[tuple[Sequence[Version], asyncio.Future[None]]] = deque()
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}  # by hash and name
        self._failed: OrderedDict[tuple[str, str | None], tuple[float, Problem]] = OrderedDict()  # None: by any name
        self._freed = asyncio.Condition()
        self._threads = computing_pool(1, "modelpatch-load", settings.loaders)

    @property
    def nbytes(self) -> int:
        """Bytes of the resident patches, never more than the budget."""
        return sum(self.sizes.values())

    def failure(self, version: Version) -> Problem | None:
        """The problem for which a version is refused, while that is remembered."""
        for name in (None, version.name):
            until, problem = self._failed.get((version.hash, name), (0.0, None))
            if problem is not None and until > time.monotonic():
                return problem
        return None

    def size(self, version: Version) -> int:
        """Bytes a version takes: those of its file, and once it was bound those of its tensors if they are more."""
        return self._learned.get(version.hash, version.nbytes)

    @asynccontextmanager
    async def hold(self, versions: Sequence[Version]) -> AsyncIterator[None]:
        """Keep the versions resident inside. Raises `Problem` where one cannot be, before anything is loaded if known."""
        copies: dict[str, list[Version]] = {}
        for version in versions:
            copies.setdefault(version.hash, []).append(version)
        for same in copies.values():
            if same[0].hash not in self.sizes and all(problems := [self.failure(version) for version in same]):
                raise next(problem for problem in problems if problem is not None)
        versions = [same[0] for same in copies.values()]
        await self._claim(versions)
        try:
            missing = [version for version in versions if version.hash not in self.sizes]
            self.metrics.hits.inc(len(versions) - len(missing))
            self.metrics.misses.inc(len(missing))
            if missing:
                await asyncio.gather(*(self._load_any(copies[version.hash]) for version in missing))
            for version in versions:
                self.sizes.move_to_end(version.hash)
            yield
        finally:
            self._release(versions)
            async with self._freed:
                self._freed.notify_all()

    async def enter(self, version: Version, bound: BoundPatch) -> None:
        """Make a patch that was loaded already resident if there is room beside those in use."""
        size = self._learn(version, bound)
        self._forget(version)
        if version.hash not in self.sizes and self._make_room(size):
            self._put(version.hash, bound)

    def drop(self, versions: Sequence[Version], kept: Collection[str]) -> None:
        """Evict patches that were removed from the store, but for those that requests hold; they leave when others need room.

        So do those whose hashes are `kept`, as other names have the same bytes.
        """
        for version in versions:
            self._forget(version)
            if version.hash in self.sizes and version.hash not in kept and not self._claims[version.hash]:
                self._evict(version.hash)

    def _forget(self, version: Version) -> None:
        for name in (None, version.name):
            self._failed.pop((version.hash, name), None)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _learn(self, version: Version, bound: BoundPatch) -> int:
        size = self._learned[version.hash] = max(version.nbytes, bound.nbytes)
        return size

    def _fits(self, versions: Sequence[Version]) -> bool:
        """Return True if all fit beside the claimed patches; those claimed already cost nothing."""
        new = [version for version in versions if not self._claims[version.hash]]
        claimed = sum(self._learned.get(key, 0) for key in self._claims)
        return not new or claimed + sum(map(self.size, new)) <= self.settings.cache_bytes

    async def _claim(self, versions: Sequence[Version]) -> None:
        for version in versions:
            self._check_size(version)
        needed = sum(map(self.size, versions))
        if needed > self.settings.cache_bytes:
            said = f"The patches asked for take {needed:,} bytes; this server keeps {self.settings.cache_bytes:,}."
            raise Problem("too-large", said, "Ask for fewer tasks at once, or start the server with a larger --cache.")
        known = all(self._claims[version.hash] for version in versions)
        if not known and (self._queue or not self._fits(versions)):
            turn = asyncio.get_running_loop().create_future()
            self._queue.append((versions, turn))
            try:
                await turn  # `_release` claims
            except asyncio.CancelledError:
                self._queue = deque(entry for entry in self._queue if entry[1] is not turn)
                self._release(versions if turn.done() and not turn.cancelled() else ())
                raise
        else:
            self._take(versions)

    def _check_size(self, version: Version) -> None:
        if (size := self.size(version)) > self.settings.cache_bytes:
            said = f"The patch takes {size:,} bytes; this server keeps {self.settings.cache_bytes:,}."
            raise Problem("too-large", said, "Start the server with a larger --cache.", about=version.hash)

    def _take(self, versions: Sequence[Version]) -> None:
        for version in versions:
            self._learned.setdefault(version.hash, version.nbytes)
            self._claims[version.hash] += 1
        while len(self._learned) > MOST:
            del self._learned[next(key for key in self._learned if not self._claims[key])]

    def _release(self, versions: Sequence[Version]) -> None:
        """Claim no longer, and claim for requests that wait, in their order, as far as there is room."""
        self._claims.subtract([version.hash for version in versions])
        self._claims += Counter()
        while self._queue and (self._queue[0][1].done() or self._fits(self._queue[0][0])):
            versions, turn = self._queue.popleft()
            if not turn.done():
                self._take(versions)
                turn.set_result(None)

    async def _load_any(self, same: Sequence[Version]) -> None:
        """Load the bytes that several names have from the first whose copy can be read."""
        for version in same:
            try:
                if problem := self.failure(version):
                    raise problem
                await asyncio.shield(self._load(version))
                return
            except Problem:
                if version is same[-1]:
                    raise

    def _load(self, version: Version) -> asyncio.Task[None]:
        """The one load of a version that is under way, or a new one."""
        key = (version.hash, version.name)
        if key not in self._loading:
            task = self._loading[key] = asyncio.get_running_loop().create_task(self._load_now(version))
            task.add_done_callback(lambda done: (self._loading.pop(key, None), done.cancelled() or done.exception()))
        return self._loading[key]

    async def _load_now(self, version: Version) -> None:
        key = version.hash
        start = time.perf_counter()
        try:
            bound = await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: load(self.engine.templates, self.read(version))
            )
        except Exception as error:
            unread = isinstance(error, Problem)  # this copy of the bytes is at fault, not the bytes
            problem = problem_of(error, about=key)
            if problem.kind == "failed":
                LOG.exception("loading %s failed", version)
            lasting = MOMENT if problem.kind in PASSING else self.settings.remember
            self._failed[key, version.name if unread else None] = (time.monotonic() + lasting, problem)
            while len(self._failed) > MOST:
                self._failed.popitem(last=False)
            self.metrics.loads.labels(problem.kind).inc()
            raise problem from error
        self.metrics.loads.labels("loaded").inc()
        self.metrics.load_seconds.observe(time.perf_counter() - start)
        size = self._learn(version, bound)
        self._check_size(version)
        while not self._make_room(size):  # it turned out larger than its file, and requests hold all others
            if not self._claims[key]:
                return
            await self._wait()
        self._put(key, bound)

    async def _wait(self) -> None:
        async with self._freed:
            try:
                await asyncio.wait_for(self._freed.wait(), self.settings.deadline)
            except TimeoutError:
                said = "Running requests use all patches that are resident."
                raise Problem("no-room", said, "Try again.", retry_after=1) from None

    def _make_room(self, needed: int) -> bool:
        """Evict the least recently used that no request holds; False, and nothing evicted, if that is too little."""
        free, victims = self.settings.cache_bytes - self.nbytes, []
        for key, size in self.sizes.items():
            if free >= needed:
                break
            if not self._claims[key]:
                victims.append(key)
                free += size
        if free < needed:
            return False
        for key in victims:
            self._evict(key)
            self.metrics.evictions.inc()
        return True

    def _put(self, key: str, bound: BoundPatch) -> None:
        if key in self.sizes:  # another name had the same bytes
            return
        self.engine.add(key, bound)
        self.sizes[key] = self._learned[key]
        self._count()

    def _evict(self, key: str) -> None:
        self.engine.remove(key)
        del self.sizes[key]
        self._count()

    def _count(self) -> None:
        self.metrics.resident.set(len(self.sizes))
        self.metrics.resident_bytes.set(self.nbytes)

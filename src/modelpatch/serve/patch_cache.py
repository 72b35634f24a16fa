"""The patches in memory: loaded when a request asks for them, within a budget of bytes.

A patch is evicted only once another has been loaded and tried in its place, and never while a request holds it. A request
first claims the bytes of all patches it needs, in the order of arrival, and only then waits for loads, so that requests cannot
block each other. One file may be in the store under several names, and of those copies each can fail for itself.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial

import torch

from modelpatch.backbone.tuning import sample
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch, Templates
from modelpatch.engine.threads import computing_pool
from modelpatch.errors import InvalidPatchError
from modelpatch.patch.contents import decode_patch
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.store.version import Version

PASSING = ("store-unreachable", "failed")  # another try may do better, so these are remembered for a moment only
MOMENT = 1.0
MOST = 65_536  # failures and sizes that are remembered


def load(templates: Templates, data: bytes) -> BoundPatch:
    """Bind a patch file's bytes and try the patch on an image. Raises a `PatchError`."""
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
    """The patches that an engine has, named there by the hashes of their files. For one event loop; threads call `read`."""

    def __init__(self, engine: Engine, read: Callable[[Version], bytes], settings: Settings, metrics: Metrics) -> None:
        self.engine, self.read, self.settings, self.metrics = engine, read, settings, metrics
        self.sizes: OrderedDict[str, int] = OrderedDict()  # resident bytes by hash, the least recently used first
        self._learned: dict[str, int] = {}  # of every patch that was ever bound
        self._claims: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # the first of the requests that wait for room has it
        self._freed = asyncio.Condition()
        self._loading: dict[tuple[str, str], asyncio.Task[Problem | None]] = {}  # by hash and name
        self._failed: OrderedDict[tuple[str, str], tuple[float, Problem]] = OrderedDict()  # and until when
        self._threads = computing_pool(1, "modelpatch-load", settings.loaders)

    @property
    def nbytes(self) -> int:
        """Bytes of the resident patches, never more than the budget."""
        return sum(self.sizes.values())

    def failure(self, version: Version) -> Problem | None:
        """The problem for which a version is refused, while that is remembered."""
        until, problem = self._failed.get((version.hash, version.name), (0.0, None))
        return problem if until > time.monotonic() else None

    def size(self, version: Version) -> int:
        """Bytes a version takes: those of its file, and once it was bound those of its tensors if they are more."""
        return self._learned.get(version.hash, version.nbytes)

    @asynccontextmanager
    async def hold(self, versions: Sequence[Version]) -> AsyncIterator[None]:
        """Keep the versions resident inside. Raises `Problem` where one cannot be, before anything is loaded if known."""
        copies: dict[str, list[Version]] = {}
        for version in versions:
            copies.setdefault(version.hash, []).append(version)
        for key, same in copies.items():
            problems = [problem for version in same if (problem := self.failure(version))]
            if key not in self.sizes and len(problems) == len(same):
                raise problems[0]
        await self._claim([same[0] for same in copies.values()])
        try:
            missing = [key for key in copies if key not in self.sizes]
            self.metrics.hits.inc(len(copies) - len(missing))
            self.metrics.misses.inc(len(missing))
            await asyncio.gather(*(self._load_any(copies[key]) for key in missing))
            for key in copies:
                self.sizes.move_to_end(key)
            yield
        finally:
            self._claims -= Counter(copies.keys())
            async with self._freed:
                self._freed.notify_all()

    async def enter(self, version: Version, bound: BoundPatch) -> None:
        """Make a patch that was loaded already resident if there is room beside those in use."""
        self._failed.pop((version.hash, version.name), None)
        self._learned[version.hash] = max(version.nbytes, bound.nbytes)
        self._put(version.hash, bound)

    def drop(self, versions: Sequence[Version], kept: Collection[str]) -> None:
        """Evict patches that were removed from the store, but for `kept` hashes and those that requests hold."""
        for version in versions:
            self._failed.pop((version.hash, version.name), None)
            if version.hash in self.sizes and version.hash not in kept and not self._claims[version.hash]:
                self._evict(version.hash)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _claim(self, versions: Sequence[Version]) -> None:
        """Claim the bytes of versions as soon as there is room, in the order of arrival."""
        for version in versions:
            if problem := self._too_large(version):
                raise problem
        if (needed := sum(map(self.size, versions))) > self.settings.cache_bytes:
            said = f"The patches asked for take {needed:,} bytes; this server keeps {self.settings.cache_bytes:,}."
            raise Problem("too-large", said, "Ask for fewer tasks at once, or start the server with a larger --cache.")
        if not all(self._claims[version.hash] for version in versions):
            async with self._turn, self._freed:
                await self._freed.wait_for(partial(self._fits, versions))
        for version in versions:  # nothing else has run since
            self._learned.setdefault(version.hash, version.nbytes)
            self._claims[version.hash] += 1
        while len(self._learned) > MOST:
            del self._learned[next(key for key in self._learned if not self._claims[key])]

    def _fits(self, versions: Sequence[Version]) -> bool:
        """Return True if all fit beside the claimed patches; those claimed already cost nothing."""
        new = [version for version in versions if not self._claims[version.hash]]
        claimed = sum(self._learned.get(key, 0) for key in self._claims)
        return not new or claimed + sum(map(self.size, new)) <= self.settings.cache_bytes

    def _too_large(self, version: Version) -> Problem | None:
        if (size := self.size(version)) <= self.settings.cache_bytes:
            return None
        said = f"The patch takes {size:,} bytes; this server keeps {self.settings.cache_bytes:,}."
        return Problem("too-large", said, "Start the server with a larger --cache.", about=version.hash)

    async def _load_any(self, same: Sequence[Version]) -> None:
        """Load the bytes that several names have from the first whose copy can be read, once for all who wait for it."""
        problems = []
        for version in same:
            key = (version.hash, version.name)
            if (problem := self.failure(version)) is None:
                if key not in self._loading:
                    self._loading[key] = task = asyncio.create_task(self._load(version))
                    task.add_done_callback(lambda _, key=key: self._loading.pop(key))  # type: ignore[misc]
                problem = await asyncio.shield(self._loading[key])
            if problem is None:
                return
            problems.append(problem)
        raise problems[-1]

    async def _load(self, version: Version) -> Problem | None:
        """Load a version and make it resident. Returns why that is not possible."""
        key = version.hash
        start = time.perf_counter()
        try:
            bound = await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: load(self.engine.templates, self.read(version))
            )
        except Exception as error:
            problem = problem_of(error, about=key)
            lasting = MOMENT if problem.kind in PASSING else self.settings.remember
            self._failed[key, version.name] = (time.monotonic() + lasting, problem)
            while len(self._failed) > MOST:
                self._failed.popitem(last=False)
            self.metrics.loads.labels(problem.kind).inc()
            return problem
        self.metrics.loads.labels("loaded").inc()
        self.metrics.load_seconds.observe(time.perf_counter() - start)
        self._learned[key] = max(version.nbytes, bound.nbytes)
        if too_large := self._too_large(version):
            return too_large
        try:
            async with asyncio.timeout(self.settings.deadline), self._freed:
                # if it turned out larger than its file, requests may hold all others
                await self._freed.wait_for(lambda: self._put(key, bound) or not self._claims[key])
        except TimeoutError:
            return Problem("no-room", "Running requests use all patches that are resident.", "Try again.")
        return None

    def _put(self, key: str, bound: BoundPatch) -> bool:
        """Make a patch resident in the place of those least recently used that no request holds. False if there is no room."""
        if key in self.sizes:  # another name had the same bytes
            return True
        needed, free, victims = self._learned[key], self.settings.cache_bytes - self.nbytes, []
        for other, size in self.sizes.items():
            if free >= needed:
                break
            if not self._claims[other]:
                victims.append(other)
                free += size
        if free < needed:
            return False
        for victim in victims:
            self._evict(victim)
        self.metrics.evictions.inc(len(victims))
        self.engine.add(key, bound)
        self.sizes[key] = needed
        self._count()
        return True

    def _evict(self, key: str) -> None:
        self.engine.remove(key)
        del self.sizes[key]
        self._count()

    def _count(self) -> None:
        self.metrics.resident.set(len(self.sizes))
        self.metrics.resident_bytes.set(self.nbytes)

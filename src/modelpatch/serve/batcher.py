"""Images of many requests through the engine together.

No image waits for others: a free engine takes those that are there, at most `batch` and as much work as so many passes of
the backbone; the next batch gathers while it computes. Callers take turns, in multiply-adds.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.engine import BASE, Engine
from modelpatch.engine.threads import computing_pool
from modelpatch.serve.fair import Budgets, FairQueue, Places
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.serve.tenants import Caller
from modelpatch.tasks.kind import kind_of

PRICES = 4096  # compositions of tasks whose work is remembered
ANYBODY = Caller.alone("")
Said = Any  # what the task's kind reduces an answer to


@dataclass(eq=False)
class QueuedImage:
    """One image: its crops by preprocessing, the engine's tasks it asks for, and how many answers of each."""

    crops: Mapping[Preprocessing, Tensor]
    tasks: tuple[str, ...]
    top: int
    caller: Caller = ANYBODY
    since: float = field(default_factory=time.perf_counter)
    answer: Future[dict[str, Said]] = field(default_factory=Future)


class Batcher:
    """The queue before an engine, and the one thread that calls it, which computes with `threads`."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        threads: int | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.budgets = budgets or Budgets()
        self._queue: FairQueue[QueuedImage] = FairQueue()
        self._places = Places(settings.queue)
        self._prices: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._rate = 0.0  # images a second of late
        self._arrived = asyncio.Event()
        self._thread = computing_pool(threads or torch.get_num_threads(), "modelpatch-engine")
        self._work = asyncio.get_running_loop().create_task(self._run())

    async def warm_up(self, image: Tensor) -> None:
        """Run the backbone once."""
        await asyncio.get_running_loop().run_in_executor(self._thread, partial(self.engine, image, only=[BASE]))

    @contextmanager
    def hold(self, caller: Caller, images: int) -> Iterator[None]:
        """Hold places for the images of a request before any work is done for them. Raises `Problem`, 429."""
        if not self._places.take(caller, images):
            raise self._full()
        self.metrics.waiting.set(self._places.taken)
        try:
            yield
        finally:
            self._places.give_back(caller, images)
            self.metrics.waiting.set(self._places.taken)

    def check(self, caller: Caller) -> None:
        """Check that there is a place for an image of the caller. Raises `Problem`, 429."""
        if not self._places.fits(caller):
            raise self._full()

    def _full(self) -> Problem:
        waiting, most = self._places.taken, self._places.most
        said = f"{waiting} images wait already, too many of them yours; this server queues {most}."
        wait = waiting / self._rate if self._rate else None
        return Problem("too-busy", said, "Try again then, or send fewer at once.", wait=wait)

    async def answer(self, rows: Sequence[QueuedImage]) -> list[dict[str, Said]]:
        """The answers of every image of one caller by task. Raises `Problem`."""
        if not rows:
            return []
        caller, prices = rows[0].caller, {tasks: await self._price(tasks) for tasks in {row.tasks for row in rows}}
        for row in rows:
            self._queue.put(caller, row, prices[row.tasks])
        work = sum(prices[row.tasks] for row in rows)
        self.budgets.spend(caller.tenant, work)
        self.metrics.macs.labels(caller.tenant.name if self.settings.tenants else "").inc(work)
        self._arrived.set()
        return await asyncio.gather(*(asyncio.wrap_future(row.answer) for row in rows))

    async def stop(self) -> None:
        """End the thread; images that still wait get a problem."""
        self._work.cancel()
        for row in self._queue.drain():
            if row.answer.set_running_or_notify_cancel():
                row.answer.set_exception(Problem("stopping", "The server is stopping."))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _price(self, tasks: tuple[str, ...]) -> int:
        """The multiply-adds of an image that is asked about by these tasks, which are in the engine; heads are left out."""
        if tasks not in self._prices:
            try:
                plan = await asyncio.to_thread(self.engine.plan_for, 1, tasks)
            except Exception as error:
                raise problem_of(error) from error
            self._prices[tasks] = max(1, plan.flops // 2)
            while len(self._prices) > PRICES:
                self._prices.popitem(last=False)
        return self._prices[tasks]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        most = self.settings.batch * await self._price((BASE,))
        while True:
            await self._arrived.wait()
            taken = self._queue.take(self.settings.batch, most)
            batch = [row for row in taken if row.answer.set_running_or_notify_cancel()]
            if not self._queue:
                self._arrived.clear()
            if not batch:
                continue
            now = time.perf_counter()
            for row in batch:
                self.metrics.queue_seconds.observe(now - row.since)
            await loop.run_in_executor(self._thread, self._answer, batch)
            rate = len(batch) / max(time.perf_counter() - now, 1e-6)
            self._rate = rate if not self._rate else self._rate + (rate - self._rate) / 8

    def _answer(self, batch: list[QueuedImage]) -> None:
        """In the engine's thread. A batch that fails is tried image by image, so that no row spoils another's."""
        try:
            self._compute(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(problem_of(error))
            else:
                for row in batch:
                    self._answer([row])

    @torch.inference_mode()
    def _compute(self, batch: list[QueuedImage]) -> None:
        rows = sorted(batch, key=lambda row: row.tasks)  # so that batches of one composition share one plan
        wanted: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            for task in row.tasks:
                wanted.setdefault(task, []).append(place)
        self.metrics.batch_images.observe(len(rows))
        self.metrics.shared.observe(self.engine.plan_for(wanted).shared)
        images = {}
        for seen in dict.fromkeys(seen for row in rows for seen in row.crops):
            unread = torch.zeros((), dtype=torch.uint8).expand(seen.input_size)  # for those that no task sees that way
            images[seen] = seen.normalize(torch.stack([row.crops.get(seen, unread) for row in rows]))
        logits = self.engine.answer(images, wanted)
        answers: list[dict[str, Said]] = [{} for _ in rows]
        for task, places in wanted.items():
            own = logits[task].float()
            if not own.isfinite().all():
                raise Problem("damaged-patch", "The patch answers with values that are not finite.", about=task)
            reduced = kind_of(self.engine.kind(task)).reduce(own, max(rows[place].top for place in places))
            for place, one in zip(places, reduced, strict=True):
                answers[place][task] = one
        for row, answer in zip(rows, answers, strict=True):
            row.answer.set_result(answer)

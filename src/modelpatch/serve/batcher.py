"""Images of many requests through the engine together.

No image waits for others: a free engine takes all that are there, at most `batch`; the next batch gathers while it computes.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.engine import BASE, Engine
from modelpatch.engine.threads import computing_pool
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.tasks.kind import kind_of

Said = Any  # what the task's kind reduces an answer to


@dataclass(eq=False)
class QueuedImage:
    """One image: its crops by preprocessing, the engine's tasks it asks for, and how many answers of each."""

    crops: Mapping[Preprocessing, Tensor]
    tasks: tuple[str, ...]
    top: int
    since: float = field(default_factory=time.perf_counter)
    answer: Future[dict[str, Said]] = field(default_factory=Future)


class Batcher:
    """The queue before an engine, and the one thread that calls it, which computes with `threads`."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, threads: int | None = None) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._waiting: list[QueuedImage] = []
        self._arrived = asyncio.Event()
        self._thread = computing_pool(threads or torch.get_num_threads(), "modelpatch-engine")
        self._work = asyncio.get_running_loop().create_task(self._run())

    async def warm_up(self, image: Tensor) -> None:
        """Run the backbone once."""
        await asyncio.get_running_loop().run_in_executor(self._thread, partial(self.engine, image, only=[BASE]))

    async def answer(self, rows: Sequence[QueuedImage]) -> list[dict[str, Said]]:
        """The answers of every image by task. Raises `Problem`, 429 if the queue is full."""
        if len(self._waiting) + len(rows) > self.settings.queue:
            said = f"{len(self._waiting)} images wait already; this server queues {self.settings.queue}."
            raise Problem("too-busy", said, "Try again soon, or send fewer at once.")
        self._waiting += rows
        self.metrics.waiting.set(len(self._waiting))
        self._arrived.set()
        return await asyncio.gather(*(asyncio.wrap_future(row.answer) for row in rows))

    async def stop(self) -> None:
        """End the thread; images that still wait get a problem."""
        self._work.cancel()
        for row in self._waiting:
            if row.answer.set_running_or_notify_cancel():
                row.answer.set_exception(Problem("stopping", "The server is stopping."))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = [row for row in self._waiting[: self.settings.batch] if row.answer.set_running_or_notify_cancel()]
            del self._waiting[: self.settings.batch]
            self.metrics.waiting.set(len(self._waiting))
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            now = time.perf_counter()
            for row in batch:
                self.metrics.queue_seconds.observe(now - row.since)
            await loop.run_in_executor(self._thread, self._answer, batch)

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

"""Images of many requests through the engine together.

    request 1: image, {flowers, birds} ─┐
    request 2: image, {signs}           ├─ queue ─ [as many as are there, at most `batch`] ─ engine.answer ─ each its own
    request 3: image, {flowers, birds} ─┘

No image waits for others: a free engine takes all that are there, and the next batch gathers while it computes. Images are
ordered by their tasks, so that batches of one composition share one plan.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
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

LOG = logging.getLogger("modelpatch.serve")
Said = Any  # what the task's kind reduces an answer to


@dataclass(eq=False)
class QueuedImage:
    """One image: its crops by preprocessing, the engine's tasks it asks for, and how many answers of each."""

    crops: Mapping[Preprocessing, Tensor]
    tasks: tuple[str, ...]
    top: int
    since: float = field(default_factory=time.perf_counter)
    answer: asyncio.Future[dict[str, Said]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """The queue before an engine, and the one thread that calls it, which computes with `threads`."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, threads: int | None = None) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._waiting: list[QueuedImage] = []
        self._arrived = asyncio.Event()
        self._thread = computing_pool(threads or torch.get_num_threads(), "modelpatch-engine")
        self._shares: dict[tuple[tuple[tuple[str, ...], int], ...], float] = {}
        self._work = asyncio.get_running_loop().create_task(self._run())

    async def warm_up(self, image: Tensor) -> None:
        """Run the backbone once."""
        await asyncio.get_running_loop().run_in_executor(self._thread, partial(self.engine, image, only=[BASE]))

    async def answer(self, rows: Sequence[QueuedImage]) -> list[dict[str, Said]]:
        """The answers of every image by task. Raises `Problem`, 429 if the queue is full."""
        if len(self._waiting) + len(rows) > self.settings.queue:
            said = f"{len(self._waiting)} images wait already; this server queues {self.settings.queue}."
            raise Problem("too-busy", said, "Try again soon, or send fewer at once.", retry_after=1)
        self._waiting += rows
        self.metrics.waiting.set(len(self._waiting))
        self._arrived.set()
        return await asyncio.gather(*(row.answer for row in rows))

    async def stop(self) -> None:
        """End the thread; images that still wait get a problem."""
        self._work.cancel()
        for row in self._waiting:
            if not row.answer.done():
                row.answer.set_exception(Problem("stopping", "The server is stopping.", retry_after=1))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = [row for row in self._waiting[: self.settings.batch] if not row.answer.done()]
            del self._waiting[: self.settings.batch]
            self.metrics.waiting.set(len(self._waiting))
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            now = time.perf_counter()
            for row in batch:
                self.metrics.queue_seconds.observe(now - row.since)
            for row, result in zip(batch, await loop.run_in_executor(self._thread, self._answers, batch), strict=True):
                if row.answer.done():  # its request gave up meanwhile
                    continue
                if isinstance(result, BaseException):
                    row.answer.set_exception(result)
                else:
                    row.answer.set_result(result)

    def _answers(self, batch: list[QueuedImage]) -> list[dict[str, Said] | Problem]:
        """In the engine's thread. A batch that fails is tried image by image, so that no row spoils another's."""
        try:
            return list(self._compute(batch))
        except Exception as error:
            if len(batch) == 1:
                if not isinstance(error, Problem):
                    LOG.exception("the engine failed on an image for %s", ", ".join(batch[0].tasks))
                return [problem_of(error)]
        return [self._answers([row])[0] for row in batch]

    @torch.inference_mode()
    def _compute(self, batch: list[QueuedImage]) -> list[dict[str, Said]]:
        order = sorted(range(len(batch)), key=lambda place: batch[place].tasks)
        rows = [batch[place] for place in order]
        wanted: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            for task in row.tasks:
                wanted.setdefault(task, []).append(place)
        self._measure(rows, wanted)
        logits = self.engine.answer(_stack(rows), wanted)
        answers: list[dict[str, Said]] = [{} for _ in rows]
        for task, places in wanted.items():
            own = logits[task].float()
            if not own.isfinite().all():
                raise Problem("damaged-patch", "The patch answers with values that are not finite.", about=task)
            reduced = kind_of(self.engine.kind(task)).reduce(own, max(rows[place].top for place in places))
            for place, one in zip(places, reduced, strict=True):
                answers[order[place]][task] = one
        return answers

    def _measure(self, rows: Sequence[QueuedImage], wanted: Mapping[str, Sequence[int]]) -> None:
        key = tuple(sorted(Counter(row.tasks for row in rows).items()))
        if key not in self._shares:
            if len(self._shares) >= 1024:
                self._shares.clear()
            self._shares[key] = self.engine.plan_for(wanted).shared
        self.metrics.batch_images.observe(len(rows))
        self.metrics.shared.observe(self._shares[key])


def _stack(rows: Sequence[QueuedImage]) -> dict[Preprocessing, Tensor]:
    """Normalised batches (B, 3, S, S) by preprocessing; images that no task sees that way are zeros, which are not read."""
    batches = {}
    for kind in dict.fromkeys(kind for row in rows for kind in row.crops):
        unseen = torch.zeros((), dtype=torch.uint8).expand(kind.input_size)
        batches[kind] = kind.normalize(torch.stack([row.crops.get(kind, unseen) for row in rows]))
    return batches

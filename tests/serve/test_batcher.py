"""The queue before the engine: rows of many requests in one batch, each with its own answer and its own fate."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from conftest import draft_patch, make_tiny
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.serve.batcher import ANYBODY, Batcher, QueuedImage
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem
from modelpatch.serve.settings import Settings

BACKBONE = make_tiny()
PATCHES = {
    name: draft_patch(BACKBONE, method, classes=4, seed=seed)
    for seed, (name, method) in enumerate({"a": ScaleBias(), "b": Subset(), "c": LinearProbe()}.items())
}
KIND = BACKBONE.preprocessing
CROPS = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def with_batcher(
    work: Callable[[Batcher], Coroutine[Any, Any, None]], engine: Engine | None = None, **settings: Any
) -> None:
    async def main() -> None:
        batcher = Batcher(engine or Engine(BACKBONE, PATCHES, tuning=Tuning()), Settings(**settings), Metrics())
        try:
            await work(batcher)
        finally:
            await batcher.stop()

    asyncio.run(main())


def row(place: int, *tasks: str, top: int = 4) -> QueuedImage:
    return QueuedImage({KIND: CROPS[place]}, tuple(sorted(tasks)), top)


def test_rows_of_different_requests_get_their_own_answers_from_few_batches() -> None:
    asked = [("a",), ("b", "c"), ("base",), ("a", "b"), ("c",), ("a",), ("b", "c"), ("a", "base")]
    calls = []
    engine = Engine(BACKBONE, PATCHES, tuning=Tuning())
    whole = engine.answer
    engine.answer = lambda images, rows: (calls.append(rows), time.sleep(0.05), whole(images, rows))[-1]  # type: ignore

    async def work(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(batcher.answer([row(place, *tasks)]) for place, tasks in enumerate(asked)))
        assert len(calls) <= 2
        for place, tasks in enumerate(asked):
            (found,) = answers[place]
            assert found.keys() == set(tasks)
            images = KIND.normalize(CROPS[place : place + 1])
            for task in tasks:
                model = BACKBONE if task == "base" else BACKBONE.patched(PATCHES[task])
                best = model(images).softmax(1)[0].topk(4)
                assert [index for index, _ in found[task]] == best.indices.tolist()
                assert torch.allclose(torch.tensor([value for _, value in found[task]]), best.values, atol=1e-5)

    with_batcher(work, engine)


def test_a_batch_keeps_as_many_answers_as_its_images_ask_for() -> None:
    async def work(batcher: Batcher) -> None:
        answers = await asyncio.gather(batcher.answer([row(0, "a", top=1)]), batcher.answer([row(1, "a", top=9)]))
        first, second = (len(found["a"]) for (found,) in answers)
        assert first >= 1
        assert second == 4

    with_batcher(work)


def test_a_row_that_fails_does_not_spoil_its_neighbours() -> None:
    async def work(batcher: Batcher) -> None:
        rows = [row(0, "a"), row(1, "gone"), row(2, "b")]
        results = await asyncio.gather(*(batcher.answer([one]) for one in rows), return_exceptions=True)
        assert isinstance(results[1], Problem)
        assert [type(result) for result in (results[0], results[2])] == [list, list]

    with_batcher(work)


def test_a_full_queue_is_too_busy() -> None:
    engine = Engine(BACKBONE, PATCHES, tuning=Tuning())
    whole = engine.answer
    begun, over = threading.Event(), threading.Event()
    engine.answer = lambda images, rows: (begun.set(), over.wait(300), whole(images, rows))[-1]  # type: ignore

    async def work(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.answer([row(0, "a")]))
        await asyncio.to_thread(begun.wait, 300)
        waiting = asyncio.create_task(batcher.answer([row(1, "a"), row(2, "a")]))
        await asyncio.sleep(0)
        with batcher.hold(ANYBODY, 2):
            with pytest.raises(Problem) as refusal:
                batcher.check(ANYBODY)
            with pytest.raises(Problem), batcher.hold(ANYBODY, 1):
                pass
        assert refusal.value.status == 429
        assert refusal.value.headers["Retry-After"] == "1"
        batcher.check(ANYBODY)
        over.set()
        assert len(await running) + len(await waiting) == 3

    with_batcher(work, engine, queue=2, images=2)


def test_a_row_whose_request_gave_up_is_not_computed() -> None:
    calls = []
    engine = Engine(BACKBONE, PATCHES, tuning=Tuning())
    whole = engine.answer
    begun, over = threading.Event(), threading.Event()
    engine.answer = lambda images, rows: (calls.append(rows), begun.set(), over.wait(300), whole(images, rows))[-1]  # type: ignore

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.answer([row(0, "a")]))
        await asyncio.to_thread(begun.wait, 300)
        second = asyncio.create_task(batcher.answer([row(1, "b")]))
        await asyncio.sleep(0)
        second.cancel()
        over.set()
        await first
        await batcher.answer([row(2, "c")])
        assert [set(rows) for rows in calls] == [{"a"}, {"c"}]

    with_batcher(work, engine)

"""Residency: one load for all who ask, several at once, nothing healthy lost to what fails, never more than the budget."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import draft_patch, make_tiny
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch, Templates
from modelpatch.errors import DamagedPatchError, InvalidPatchError, UnknownPatchError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch, encode_patch
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.patch_cache import PatchCache, load
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.store.version import Version


class Reader:
    """A store's `read` that counts and can be slow."""

    def __init__(self, seconds: float = 0.0, together: int = 0) -> None:
        self.files: dict[str, bytes | Exception] = {}
        self.reads: Counter[str] = Counter()
        self.seconds = seconds
        self.barrier = threading.Barrier(together, timeout=300) if together else None  # reads that wait for one another

    def add(self, name: str, patch: Patch, data: bytes | Exception | None = None) -> Version:
        whole = encode_patch(patch)
        version = Version.of(name, whole, patch)
        self.files[version.hash] = whole if data is None else data
        return version

    def __call__(self, version: Version) -> bytes:
        self.reads[version.hash] += 1
        if self.barrier is not None:
            self.barrier.wait()
        time.sleep(self.seconds)
        found = self.files[version.hash]
        if isinstance(found, Exception):
            raise problem_of(found)
        return found


BACKBONE = make_tiny()


def drafts(count: int) -> list[Patch]:
    return [draft_patch(BACKBONE, ScaleBias(), seed=seed) for seed in range(count)]


def with_cache(reader: Reader, work: Callable[[PatchCache], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        cache = PatchCache(Engine(BACKBONE, tuning=Tuning()), reader, Settings(**settings), Metrics())
        await work(cache)
        cache.close()

    asyncio.run(main())


def bytes_of(patch: Patch) -> int:
    """What a patch costs on the cache: its file or its numbers, whichever is more."""
    return max(len(encode_patch(patch)), BoundPatch(BACKBONE, patch).nbytes)


def test_a_hundred_requests_for_a_cold_patch_are_one_load() -> None:
    reader = Reader(0.1)
    version = reader.add("flowers", drafts(1)[0])

    async def work(cache: PatchCache) -> None:
        async def one() -> None:
            async with cache.hold([version]):
                assert version.hash in cache.engine

        await asyncio.gather(*(one() for _ in range(100)))
        assert reader.reads[version.hash] == 1

    with_cache(reader, work)


def test_cold_patches_do_not_wait_for_one_another() -> None:
    reader = Reader(together=4)  # which ends only if all four are being read at the same time
    versions = [reader.add(f"task{number}", patch) for number, patch in enumerate(drafts(4))]

    async def work(cache: PatchCache) -> None:
        async def one(version: Version) -> None:
            async with cache.hold([version]):
                assert version.hash in cache.engine

        await asyncio.gather(*map(one, versions))
        assert all(reader.reads[version.hash] == 1 for version in versions)

    with_cache(reader, work)


@pytest.mark.parametrize("fault", ["missing", "damaged", "backbone", "shapes", "store"])
def test_what_cannot_be_loaded_takes_nothing_with_it_and_is_remembered(fault: str) -> None:
    reader = Reader()
    good, other = drafts(2)
    healthy = reader.add("healthy", good)
    stranger = draft_patch(make_tiny(seed=1), LinearProbe())
    whole = encode_patch(other)
    wrong = {
        "missing": UnknownPatchError("bad is gone from the store"),
        "damaged": whole[:-1] + bytes([whole[-1] ^ 1]),
        "backbone": encode_patch(stranger),
        "shapes": DamagedPatchError("its bytes are not those that were published"),
        "store": OSError("the network is down"),
    }[fault]
    bad = reader.add("bad", other, wrong)
    status = {"missing": 404, "damaged": 422, "backbone": 409, "shapes": 422, "store": 503}[fault]

    async def work(cache: PatchCache) -> None:
        async with cache.hold([healthy]):
            pass
        for _ in range(5):
            with pytest.raises(Problem) as refusal:
                async with cache.hold([bad]):
                    pass
            assert refusal.value.status == status
            assert refusal.value.about == bad.hash
        assert reader.reads[bad.hash] == 1
        assert list(cache.sizes) == [healthy.hash]

    with_cache(reader, work, cache_bytes=bytes_of(good))


def test_a_patch_that_failed_is_tried_again_after_a_while() -> None:
    reader = Reader()
    version = reader.add("late", drafts(1)[0], UnknownPatchError("gone"))

    async def work(cache: PatchCache) -> None:
        with pytest.raises(Problem, match="gone"):
            async with cache.hold([version]):
                pass
        reader.add("late", drafts(1)[0])
        await asyncio.sleep(0.15)
        async with cache.hold([version]):
            assert version.hash in cache.engine

    with_cache(reader, work, remember=0.1)


def test_the_least_recently_used_leaves_and_never_what_is_on_lease() -> None:
    reader = Reader()
    patches = drafts(4)
    versions = [reader.add(f"task{number}", patch) for number, patch in enumerate(patches)]

    async def work(cache: PatchCache) -> None:
        async with cache.hold([versions[0]]):
            for version in versions[1:]:
                async with cache.hold([version]):
                    assert cache.nbytes <= cache.settings.cache_bytes
                    assert versions[0].hash in cache.engine
        assert list(cache.sizes) == [versions[0].hash, versions[3].hash]

    with_cache(reader, work, cache_bytes=2 * bytes_of(patches[0]))


def test_requests_for_several_patches_never_block_each_other() -> None:
    reader = Reader()
    patches = drafts(6)
    versions = [reader.add(f"task{number}", patch) for number, patch in enumerate(patches)]

    async def work(cache: PatchCache) -> None:
        async def one(number: int) -> None:
            async with cache.hold([versions[number % 6], versions[(number * 5 + 1) % 6], versions[(number + 2) % 6]]):
                assert cache.nbytes <= cache.settings.cache_bytes
                await asyncio.sleep(0.001)

        await asyncio.wait_for(asyncio.gather(*map(one, range(60))), 30)

    with_cache(reader, work, cache_bytes=3 * bytes_of(patches[0]))


def test_one_that_gives_up_while_it_waits_leaves_its_place_to_others() -> None:
    reader = Reader()
    patches = drafts(3)
    versions = [reader.add(f"task{number}", patch) for number, patch in enumerate(patches)]

    async def work(cache: PatchCache) -> None:
        async def ask(version: Version) -> None:
            async with cache.hold([version]):
                pass

        async with cache.hold([versions[0]]):
            waiting = [asyncio.create_task(ask(version)) for version in versions[1:]]
            await asyncio.sleep(0.01)
            waiting[0].cancel()
        await asyncio.wait_for(waiting[1], 10)
        assert versions[2].hash in cache.engine
        assert not cache._claims
        assert not cache._turn.locked()

    with_cache(reader, work, cache_bytes=bytes_of(patches[0]))


def test_more_than_fits_at_all_is_refused_before_anything_is_loaded() -> None:
    reader = Reader()
    versions = [reader.add(f"task{number}", patch) for number, patch in enumerate(drafts(3))]

    async def work(cache: PatchCache) -> None:
        with pytest.raises(Problem) as refusal:
            async with cache.hold(versions):
                pass
        assert refusal.value.status == 413
        assert not reader.reads

    with_cache(reader, work, cache_bytes=versions[0].nbytes)


def test_a_patch_that_answers_nonsense_is_refused() -> None:
    reader = Reader()
    patch = draft_patch(BACKBONE, ScaleBias(statistics="recomputed"))
    tensors = {name: -abs(t) - 1 if "running_var" in name else t for name, t in patch.tensors.items()}
    assert any(not torch.equal(tensors[name], t) for name, t in patch.tensors.items())
    version = reader.add("nan", replace(patch, tensors=tensors))

    async def work(cache: PatchCache) -> None:
        with pytest.raises(Problem, match="not finite"):
            async with cache.hold([version]):
                pass

    with_cache(reader, work)


def sparse(patch: Patch) -> Patch:
    """The patch with a difference in one of many places of every masked weight, as training leaves PackNet's."""
    tensors = dict(patch.tensors)
    for name, mask in patch.tensors.items():
        if name.startswith("mask/"):
            delta = torch.zeros(mask.shape)
            delta.view(-1)[0] = 0.5
            tensors[name.replace("mask/", "delta/", 1)] = delta
    return replace(patch, tensors=tensors)


def test_a_mask_and_a_difference_of_every_weight_are_loaded_and_masks_of_more_are_refused() -> None:
    backbone = make_tiny()
    patch = sparse(draft_patch(backbone, PackNet()))
    assert {name.partition("/")[0] for name in patch.tensors} >= {"mask", "delta"}
    assert load(Templates(backbone), encode_patch(patch)).nbytes > 0
    many = draft_patch(backbone, Piggyback())
    bomb = {f"mask/layer{number}.weight": torch.ones(64, 64, dtype=torch.bool) for number in range(9)}
    with pytest.raises(InvalidPatchError, match="packed numbers; at most"):
        load(Templates(backbone), encode_patch(replace(many, tensors={**many.tensors, **bomb})))

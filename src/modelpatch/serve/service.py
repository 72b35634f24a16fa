"""A server without HTTP: a store, an engine, the cache of patches and the queue, put together."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any, TypeVar

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning, sample
from modelpatch.engine.cascade import Cascade
from modelpatch.engine.engine import BASE, Engine
from modelpatch.engine.plan import Plan
from modelpatch.engine.threads import computing_pool
from modelpatch.patch.envelope import short
from modelpatch.serve.admission import Admission
from modelpatch.serve.batcher import ANYBODY, Batcher, QueuedImage, Said
from modelpatch.serve.catalogue import Catalogue, ServedTask
from modelpatch.serve.fair import FairPool
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.patch_cache import PatchCache, load
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.question import Decoded, decode
from modelpatch.serve.schemas import PredictRequest
from modelpatch.serve.settings import Settings
from modelpatch.serve.tenants import Caller
from modelpatch.store.store import Store
from modelpatch.store.version import Version
from modelpatch.tasks.kind import kind_of

T = TypeVar("T")
Answer = dict[str, Any]  # of one task for one image, as JSON


class Service:
    """Answers for images with the patches of a store. `start` and `stop` belong to the event loop that calls it.

    `cascades` are tasks of the server's own, by name; they are always resident. `threads` compute each batch (PyTorch's
    number by default). Raises `Problem` for requests that cannot be answered.
    """

    def __init__(
        self,
        store: Store,
        backbone: Backbone,
        settings: Settings,
        tuning: Tuning | None = None,
        cascades: Mapping[str, Cascade] | None = None,
        threads: int | None = None,
    ) -> None:
        self.store, self.backbone, self.settings, self.threads = store, backbone, settings, threads
        self.own, given = {BASE: ServedTask(BASE, BASE, backbone.fingerprint)}, {}
        for name, cascade in (cascades or {}).items():
            self.own[name] = ServedTask(name, f"cascade {name}", cascade.content_hash)
            given[self.own[name].key] = cascade
        self.engine = Engine(backbone, given, tuning=tuning, backend=settings.backend)
        self.metrics = Metrics()
        self.ready = False
        self.admission = Admission(settings, self.metrics)

    async def start(self) -> None:
        """Read the store once and run the engine once, so that the first request finds everything warm."""
        self.catalogue = Catalogue(self.store, self.settings.refresh, self.own)
        self.cache = PatchCache(self.engine, self.store.read, self.settings, self.metrics)
        self.batcher = Batcher(self.engine, self.settings, self.metrics, self.threads, self.admission.budgets)
        self._decoders = computing_pool(1, "modelpatch-decode", self.settings.decoders)
        self._turns = FairPool(self._decoders, self.settings.decoders)
        await self.batcher.warm_up(sample(self.backbone.input_size, self.backbone.device)[:1])
        await self.catalogue.is_lost()
        await self.catalogue.list()
        self.ready = True

    async def stop(self) -> None:
        """End the threads; requests that still wait get 503."""
        self.ready = False
        await self.batcher.stop()
        self.cache.close()
        self.catalogue.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def predict(self, images: Sequence[bytes], asked: PredictRequest, caller: Caller = ANYBODY) -> dict[str, Any]:
        """The best classes of every image: for tasks or for one task an image; without either for all there are."""
        self._check(images, asked)
        names, work = asked.per_image or asked.tasks, partial(self._answer, images, asked, caller)
        with self.batcher.hold(caller, len(images)):
            passes, refused = await self._work(names, work, self._groups)
        return {"images": [{"answers": reduce(or_, parts)} for parts in zip(*passes, strict=True)], "refused": refused}

    def _check(self, images: Sequence[bytes], asked: PredictRequest) -> None:
        if asked.tasks is not None and asked.per_image is not None:
            raise Problem("invalid-request", "Both tasks and per_image are given.", "Give one of them.")
        if not 0 < len(images) <= self.settings.images:
            raise Problem(
                "too-large" if images else "invalid-request",
                f"The request has {len(images)} images; expected 1 to {self.settings.images}.",
                "Send several requests." if images else "Send the images in the field `images`.",
            )
        if asked.per_image is not None and len(asked.per_image) != len(images):
            said = f"per_image names {len(asked.per_image)} tasks for {len(images)} images."
            raise Problem("invalid-request", said, "Name one task for every image.")

    def _groups(self, targets: list[ServedTask]) -> list[list[ServedTask]]:
        """The targets in as few passes as their number and the bytes that stay resident allow."""
        groups: list[list[ServedTask]] = []
        held: dict[str, int] = {}
        for target in targets:
            size = 0 if target.version is None else self.cache.size(target.version)
            room = self.settings.cache_bytes - sum(held.values())
            if not groups or len(groups[-1]) >= self.settings.tasks or (target.key not in held and size > room):
                groups.append([])
                held = {}
            held[target.key] = size
            groups[-1].append(target)
        return groups

    async def _work(
        self,
        names: Sequence[str] | None,
        work: Callable[[list[ServedTask]], Awaitable[T]],
        split: Callable[[list[ServedTask]], list[list[ServedTask]]],
    ) -> tuple[list[T], dict[str, Any]]:
        """The results of `work` on the targets of names, as they are `split`, while the engine has them; and what was refused.

        None names all tasks. Work is done again without those that a problem is about; if none is left, raises the first.
        """
        if names is None:
            names = [*self.own, *(version.name for version in await self.catalogue.latest())]
        elif not names:
            raise Problem("invalid-request", "No task is named.", "Name tasks, or leave the field out for all of them.")
        elif (count := len(set(names))) > self.settings.tasks:
            said = f"The request asks for {count} tasks; this server answers {self.settings.tasks} at once."
            raise Problem("too-large", said, "Name the tasks you need.")
        targets, refused = await self.catalogue.find(names)
        results = []
        for left in split(targets):
            while left:
                try:
                    async with self.cache.hold([target.version for target in left if target.version is not None]):
                        results.append(await work(left))
                        break
                except Problem as problem:
                    hit = [target for target in left if target.key == problem.about]
                    if not hit:
                        raise
                    refused |= {target.name: problem.named(str(target.version or target.name)) for target in hit}
                    left = [target for target in left if target not in hit]
        if not results:
            raise next(iter(refused.values()))
        return results, {name: problem.body() for name, problem in refused.items()}

    async def _answer(
        self, images: Sequence[bytes], asked: PredictRequest, caller: Caller, targets: list[ServedTask]
    ) -> list[dict[str, Answer]]:
        """The answers of every image by name, for all targets or the one it names."""
        names: Sequence[str | None] = asked.per_image or [None] * len(images)
        wanted = [[one for one in targets if name in (None, one.name)] for name in names]
        decoded = await self._decode(images, wanted, caller)
        rows = [
            QueuedImage(crops, tuple(sorted({target.key for target in own})), asked.top, caller)
            for (crops, _), own in zip(decoded, wanted, strict=True)
        ]
        found = iter(await self.batcher.answer([row for row in rows if row.tasks]))
        said = [next(found) if row.tasks else {} for row in rows]

        def tell() -> list[dict[str, Answer]]:
            return [self._tell(*given, asked.top) for given in zip(wanted, decoded, said, strict=True)]

        if not any(kind_of(self.engine.kind(key)).draws for key in {key for row in rows for key in row.tasks}):
            return tell()
        return await asyncio.get_running_loop().run_in_executor(self._decoders, tell)  # pictures take a while

    async def _decode(
        self, images: Sequence[bytes], wanted: Sequence[Sequence[ServedTask]], caller: Caller
    ) -> list[Decoded]:
        """Every image as its targets see it; a damaged one is found even where none of them is asked about it."""
        jobs = []
        for data, own in zip(images, wanted, strict=True):
            kinds = [seen for target in own for seen in self.engine.preprocessings(target.key)]
            work = partial(decode, data, kinds, self.settings.pixels)
            jobs.append(self._turns.submit(caller, len(data), work))
        try:
            return await asyncio.gather(*jobs)
        except Problem as problem:
            problem.facts["image"] = next(n for n, job in enumerate(jobs) if job.done() and job.exception() is problem)
            for job in jobs:
                job.cancel()
            raise

    def _tell(
        self, targets: Sequence[ServedTask], image: Decoded, said: Mapping[str, Said], top: int
    ) -> dict[str, Answer]:
        """The answers of one image as JSON."""
        answers = {}
        for target in targets:
            view = self.engine.view(target.key, size=image[1])
            answer = kind_of(self.engine.kind(target.key)).to_json(said[target.key], view, top)
            answers[target.name] = {"version": target.identity, "top": [], **answer}
        return answers

    async def plan(self, tasks: Sequence[str] | None, images: int) -> dict[str, Any]:
        """Figures and a tree of the work that tasks (None: those resident) share for a batch of images."""
        if not 0 < images <= self.settings.batch:
            raise Problem("invalid-request", f"A plan for {images} images; expected 1 to {self.settings.batch}.")
        if tasks is None:
            here = [version.name for version in await self.catalogue.latest() if version.hash in self.cache.sizes]
            tasks = [BASE, *here][: self.settings.tasks]
        (found,), refused = await self._work(tasks, partial(self._plan, images), lambda targets: [targets])
        return {"backbone": self._backbone(), "images": images, **found, "refused": refused}

    async def _plan(self, images: int, targets: Sequence[ServedTask]) -> dict[str, Any]:
        named: dict[str, list[str]] = {}
        for target in targets:
            named.setdefault(target.key, []).append(target.name)
        work = partial(self.engine.plan_for, images, list(named))
        plan: Plan = await asyncio.get_running_loop().run_in_executor(self._decoders, work)
        for member in plan.members:  # a stage of a cascade has its number behind the name
            key = max((target.key for target in targets if member.name.startswith(target.key)), key=len)
            named.setdefault(member.name, [name + member.name.removeprefix(key) for name in named[key]])
        return {
            "tasks": [target.name for target in targets],
            "flops": plan.flops,
            "separate_flops": plan.separate_flops,
            "shared": round(plan.shared, 6),
            "bytes": plan.bytes,
            "memory": self.engine.memory,
            "tree": [branch.facts(named) for branch in plan.trees()],
        }

    def _backbone(self) -> dict[str, Any]:
        base = self.backbone
        count = sum(tensor.numel() for tensor in base.module.parameters())
        facts = {"spec": base.spec, "fingerprint": base.fingerprint}
        return {**facts, "parameters": count, "classes": len(base.classes)}

    async def patches(self, after: str, limit: int) -> dict[str, Any]:
        """The patches whose names follow `after`, in the order of names."""
        found = [version for version in await self.catalogue.list() if version.name > after]
        page = found[:limit]
        return {
            "patches": [self._describe(version) for version in page],
            "next": page[-1].name if len(found) > len(page) else None,
            "backbone": self._backbone(),
        }

    async def versions(self, name: str) -> dict[str, Any]:
        """Every version of one patch."""
        return {"name": name, "versions": [self._describe(v) for v in await self.catalogue.versions(name)]}

    def _describe(self, version: Version) -> dict[str, Any]:
        failure = self.cache.failure(version)
        shown = ("name", "tags", "nbytes", "created", "method", "task", "metrics")
        required = self.settings.signers
        return {
            **{name: getattr(version, name) for name in shown},
            "signers": list(map(short, version.signers)) if required is None else required.names(version.signers),
            "trusted": None if required is None else any(one.id in version.signers for one in required.known),
            "version": version.hash,
            "resident": version.hash in self.cache.sizes,
            "fits": version.chain == self.backbone.fingerprints.chain,
            "problem": failure.named(str(version)).body() if failure else None,
        }

    async def publish(
        self, name: str, data: bytes, tags: Sequence[str], signature: bytes | None = None
    ) -> dict[str, Any]:
        """Check a patch file and its signature, then publish both; it is resident before a request can ask for it."""
        if name in self.own:
            what = "the backbone's own answer" if name == BASE else "a cascade of this server"
            raise Problem("invalid-request", f"A patch cannot be named {name!r}, which is {what}.")
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._decoders, self.store.check_signature, data, signature, name)
            bound = await loop.run_in_executor(self._decoders, load, self.engine.templates, data)
        except Exception as error:
            raise problem_of(error, patch=name) from error
        # it fits the server's own backbone, which is what counts here
        publish = partial(self.store.publish, other_backbone=True, signature=signature)
        version = await self.catalogue.change(lambda: publish(name, data, tags), patch=name)
        await self.cache.enter(version, bound)
        return self._describe(version)

    async def tag(self, name: str, tag: str, version: str) -> dict[str, Any]:
        """Let a tag of a name point to the version that a hash prefix or another tag names."""
        found = await self.catalogue.resolve(f"{name}@{version}")
        await self.catalogue.change(lambda: self.store.tag(name, tag, found), patch=name)
        return self._describe(await self.catalogue.resolve(f"{name}@{tag}"))

    async def remove(self, reference: str, force: bool) -> None:
        """Remove a patch with all its versions and tags; or one version, with its tags only if `force`."""
        whole = "@" not in reference
        gone = list(await self.catalogue.versions(reference)) if whole else [await self.catalogue.resolve(reference)]
        drop = partial(self.store.remove, force=whole or force)
        await self.catalogue.change(lambda: list(map(drop, gone)), patch=reference)
        self.cache.drop(gone, kept={version.hash for version in await self.catalogue.list()})

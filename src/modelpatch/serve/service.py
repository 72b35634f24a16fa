"""What the server does, without HTTP: a store, an engine, the shelf of resident patches and the queue, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.frozen import sample
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.cascade import Cascade
from modelpatch.engine.describe import tree
from modelpatch.engine.engine import BASE, Engine
from modelpatch.engine.threads import computing_pool
from modelpatch.serve.batcher import Batcher, Row, Said
from modelpatch.serve.catalogue import Catalogue
from modelpatch.serve.images import decode
from modelpatch.serve.metrics import Metrics
from modelpatch.serve.problems import Problem, problem_of
from modelpatch.serve.settings import Settings
from modelpatch.serve.shelf import Shelf, label, stage
from modelpatch.store.store import Store
from modelpatch.store.version import LATEST, Version
from modelpatch.tasks.kind import View, kind_of

Tasks = dict[str, Version | None]  # what was asked for by name; None is the server's own, the backbone or a cascade


class Service:
    """Answers for images with the patches of a store. `start` and `stop` belong to the event loop that calls it.

    `cascades` are tasks of the server's own, by name; they are always resident. `threads` compute each batch (PyTorch's
    number by default); a server gives the engine all it has, and sets PyTorch's number to 1 for what decodes and loads.
    Raises `Problem` for whatever cannot be answered.
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
        cascades = cascades or {}
        self.own = {BASE: BASE} | {name: f"cascade {name}" for name in cascades}  # what the engine calls them
        self._hashes = {BASE: backbone.fingerprint} | {
            self.own[name]: one.content_hash for name, one in cascades.items()
        }
        self.engine = Engine(
            backbone, {self.own[name]: one for name, one in cascades.items()}, tuning=tuning or Tuning()
        )
        self.metrics = Metrics()
        self.ready = False
        self._running = 0

    async def start(self) -> None:
        """Read the store once and run the engine once, so that the first request finds everything warm."""
        self.catalogue = Catalogue(self.store, self.settings.refresh)
        self.shelf = Shelf(self.engine, self.catalogue.read, self.settings, self.metrics)
        self.batcher = Batcher(self.engine, self.settings, self.metrics, self.threads)
        self._decoders = computing_pool(1, "modelpatch-decode", self.settings.decoders)
        await self.batcher.warm_up(sample(self.backbone.input_size, self.backbone.device)[:1])
        await self.catalogue.list()
        self.ready = True

    async def stop(self) -> None:
        """Whoever still waits gets 503; the threads end."""
        self.ready = False
        await self.batcher.stop()
        self.shelf.close()
        self.catalogue.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    # answering ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A place among the requests that are answered at once, until the deadline. Raises `Problem`, 429 or 503."""
        if self._running >= self.settings.requests:
            raise Problem(
                "too-busy",
                f"{self._running} requests are being answered; this server takes that many.",
                "Try again soon.",
                retry_after=1,
            )
        self._running += 1
        try:
            async with asyncio.timeout(self.settings.deadline):
                yield
        except TimeoutError:
            raise Problem(
                "deadline",
                f"There was no answer within {self.settings.deadline:g} seconds.",
                "Try again, or send fewer images at once.",
                retry_after=1,
            ) from None
        finally:
            self._running -= 1

    async def predict(
        self, images: Sequence[bytes], tasks: Sequence[str] | None, per_image: Sequence[str] | None, top: int
    ) -> dict[str, Any]:
        """The best `top` classes of every image: for `tasks` or for one task an image; without either for all there are.

        Tasks that cannot be answered are left out and named in the answer; it is an error if none can be. What does not fit
        into one pass is answered in several.
        """
        if tasks is not None and per_image is not None:
            raise Problem("invalid-request", "Both tasks and per_image are given.", "Give one of them.")
        if not 0 < len(images) <= self.settings.images:
            raise Problem(
                "too-large" if images else "invalid-request",
                f"The request has {len(images)} images; expected 1 to {self.settings.images}.",
                "Send several requests." if images else "Send the images in the field `images`.",
            )
        if per_image is not None and len(per_image) != len(images):
            raise Problem(
                "invalid-request",
                f"per_image names {len(per_image)} tasks for {len(images)} images.",
                "Name one task for every image.",
            )
        versions, refused = await self._resolve(await self._choose(tasks if per_image is None else per_image))
        answers: list[dict[str, Any]] = [{} for _ in images]
        for group in self._groups(versions):
            while group:
                try:
                    found = await self._predict(images, group, per_image, top)
                except Problem as problem:
                    self._leave_out(problem, group, refused)
                    continue
                for answer, more in zip(answers, found, strict=True):
                    answer.update(more)
                break
        names = [name for name in versions if name not in refused]
        self._expect_some(names, refused)
        ordered = [{name: answer[name] for name in names if name in answer} for answer in answers]
        return {"images": [{"answers": answer} for answer in ordered], "refused": _bodies(refused)}

    def _groups(self, versions: Tasks) -> list[Tasks]:
        """The tasks in as few passes as their number and the bytes that stay resident allow."""
        groups: list[Tasks] = []
        room = 0
        seen: set[str] = set()
        for name, version in versions.items():
            size = 0 if version is None or version.hash in seen else self.shelf.size(version)
            if not groups or len(groups[-1]) >= self.settings.tasks or size > room:
                groups.append({})
                room, seen = self.settings.cache_bytes, set()
                size = 0 if version is None else self.shelf.size(version)
            room -= size
            seen |= set() if version is None else {version.hash}
            groups[-1][name] = version
        return groups

    @staticmethod
    def _leave_out(problem: Problem, group: Tasks, refused: dict[str, Problem]) -> None:
        """Take what the problem is about from the group. Raises the problem if it is about none of it."""
        patch = problem.facts.get("patch")
        names = [name for name, version in group.items() if patch == (label(version) if version else name)]
        if not names:
            raise problem
        for name in names:
            refused[name] = problem
            del group[name]

    @staticmethod
    def _expect_some(names: Sequence[str], refused: Mapping[str, Problem]) -> None:
        if not names:
            raise next(iter(refused.values()))

    async def _predict(
        self,
        images: Sequence[bytes],
        versions: Tasks,
        per_image: Sequence[str] | None,
        top: int,
    ) -> list[dict[str, Any]]:
        """The answers of every image for all of `versions`, or for that of `per_image` if it is among them."""
        async with self.shelf.lease([version for version in versions.values() if version is not None]):
            keys = self._keys(versions)
            kinds = {name: self.engine.preprocessings(key) for name, key in keys.items()}
            asked = [list(keys)] * len(images) if per_image is None else [[n] * (n in keys) for n in per_image]
            try:
                rows, sizes = await self._rows(images, asked, keys, kinds, top)
                found = iter(await self.batcher.answer([row for row in rows if row.tasks]))
                answers = [next(found) if row.tasks else {} for row in rows]
            except Problem as problem:
                if (key := problem.facts.get("patch")) is not None:  # the engine knows hashes alone
                    name = next(name for name in keys if keys[name] == key)
                    version = versions[name]
                    problem.facts["patch"] = label(version) if version else name
                raise
            told = partial(self._told, asked, answers, sizes, versions, keys, top)
            if not any(kind_of(self.engine.kind(key)).draws for key in keys.values()):
                return told()
            return await asyncio.get_running_loop().run_in_executor(self._decoders, told)  # pictures take a while

    async def _choose(self, tasks: Sequence[str] | None) -> list[str]:
        """The names asked for, each once; all patches and the base without any."""
        if tasks is None:
            listed = [version.name for version in await self.catalogue.list() if LATEST in version.tags]
            return [*self.own, *(name for name in listed if name not in self.own)]
        names = list(dict.fromkeys(tasks))
        if not names:
            raise Problem("invalid-request", "No task is named.", "Name tasks, or leave the field out for all of them.")
        if len(names) > self.settings.tasks:
            raise Problem(
                "too-large",
                f"The request asks for {len(names)} tasks; this server answers {self.settings.tasks} at once.",
                "Name the tasks you need.",
            )
        return names

    async def _resolve(self, names: Sequence[str]) -> tuple[Tasks, dict[str, Problem]]:
        """What the names stand for, and why others stand for nothing. Raises `Problem` if none stands for anything."""
        asked = [name for name in names if name not in self.own]
        found = await asyncio.gather(*map(self.catalogue.resolve, asked), return_exceptions=True)
        known = dict(zip(asked, found, strict=True))
        for problem in found:
            if isinstance(problem, BaseException) and not isinstance(problem, Problem):
                raise problem
        refused = {name: value for name, value in known.items() if isinstance(value, Problem)}
        versions: Tasks = {
            name: None if name in self.own else value
            for name, value in ((name, known.get(name)) for name in names if name not in refused)
            if value is None or isinstance(value, Version)
        }
        self._expect_some(list(versions), refused)
        return versions, refused

    async def _rows(
        self,
        images: Sequence[bytes],
        asked: Sequence[Sequence[str]],
        keys: dict[str, str],
        kinds: dict[str, tuple[Preprocessing, ...]],
        top: int,
    ) -> tuple[list[Row], list[tuple[int, int]]]:
        """What the batcher is asked, and every image's own width and height."""
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(
                self._decoders, decode, data, [kind for name in names for kind in kinds[name]], self.settings.pixels
            )
            for data, names in zip(images, asked, strict=True)
        ]  # a damaged image is found even where no task of this pass is asked about it
        try:
            decoded = await asyncio.gather(*jobs)
        except Problem as problem:
            place = next(n for n, job in enumerate(jobs) if job.done() and job.exception() is problem)
            for job in jobs:
                job.cancel()
            problem.facts["image"] = place
            raise
        tasks = [tuple(sorted({keys[name] for name in names})) for names in asked]
        rows = [Row(one.crops, own, top) for one, own in zip(decoded, tasks, strict=True)]
        return rows, [one.size for one in decoded]

    def _told(
        self,
        asked: Sequence[Sequence[str]],
        answers: Sequence[Mapping[str, Said]],
        sizes: Sequence[tuple[int, int]],
        versions: Tasks,
        keys: Mapping[str, str],
        top: int,
    ) -> list[dict[str, Any]]:
        """The answers of every image as JSON."""
        return [
            {name: self._answer(versions[name], keys[name], said[keys[name]], size, top) for name in names}
            for names, said, size in zip(asked, answers, sizes, strict=True)
        ]

    def _answer(self, version: Version | None, key: str, said: Said, size: tuple[int, int], top: int) -> dict[str, Any]:
        view = View(self.engine.classes(key), self.engine.preprocessing(key), known_size=size)
        head = {"version": version.hash if version else self._hashes[key], "top": []}
        return {**head, **kind_of(self.engine.kind(key)).to_json(said, view, top)}

    async def plan(self, tasks: Sequence[str] | None, images: int) -> dict[str, Any]:
        """What a batch of images would share among tasks (None: those resident), as figures, text and a tree."""
        if not 0 < images <= self.settings.batch:
            raise Problem("invalid-request", f"A plan for {images} images; expected 1 to {self.settings.batch}.")
        if tasks is None:
            resident = set(self.shelf.sizes)
            here = (v for v in await self.catalogue.list() if v.hash in resident and LATEST in v.tags)
            tasks = [BASE, *(version.name for version in here)][: self.settings.tasks]
        versions, refused = await self._resolve(await self._choose(tasks))
        while True:
            try:
                return {**await self._plan(versions, images), "refused": _bodies(refused)}
            except Problem as problem:
                self._leave_out(problem, versions, refused)
                self._expect_some(list(versions), refused)

    async def _plan(self, versions: Tasks, images: int) -> dict[str, Any]:
        async with self.shelf.lease([version for version in versions.values() if version is not None]):
            keys = self._keys(versions)
            named: dict[str, list[str]] = {}
            for name, key in keys.items():
                named.setdefault(key, []).append(name)
            work = partial(self.engine.plan_for, images, list(named))
            plan = await asyncio.get_running_loop().run_in_executor(self._decoders, work)
            for member in plan.members:  # a stage of a cascade has its number behind the name
                key = max((key for key in keys.values() if member.name.startswith(key)), key=len)
                named.setdefault(member.name, [name + member.name.removeprefix(key) for name in named[key]])
            return {
                "backbone": self._backbone(),
                "tasks": list(keys),
                "images": images,
                "flops": plan.flops,
                "separate_flops": plan.separate_flops,
                "shared": round(plan.shared, 6),
                "bytes": plan.bytes,
                "memory": self.engine.memory,
                "tree": [_rename(node, named) for node in tree(plan)],
            }

    def _keys(self, versions: Tasks) -> dict[str, str]:
        """What the engine calls the tasks."""
        return {name: version.hash if version else self.own[name] for name, version in versions.items()}

    def _backbone(self) -> dict[str, Any]:
        tensors = self.backbone.module.parameters()
        return {
            "spec": self.backbone.spec,
            "fingerprint": self.backbone.fingerprint,
            "parameters": sum(tensor.numel() for tensor in tensors),
            "classes": len(self.backbone.classes),
        }

    # patches ------------------------------------------------------------------------------------------------

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
        failure = self.shelf.failure(version)
        return {
            "name": version.name,
            "version": version.hash,
            "tags": list(version.tags),
            "nbytes": version.nbytes,
            "created": version.created,
            "method": version.method,
            "task": version.task,
            "metrics": dict(version.metrics),
            "resident": version.hash in self.shelf.sizes,
            "fits": version.chain == self.backbone.fingerprints.chain,
            "problem": failure.body() if failure else None,
        }

    async def publish(self, name: str, data: bytes, tags: Sequence[str]) -> dict[str, Any]:
        """Check a patch file against the backbone, then publish it; it is resident before a request can ask for it."""
        if name in self.own:
            what = "the backbone's own answer" if name == BASE else "a cascade of this server"
            raise Problem("invalid-request", f"A patch cannot be named {name!r}, which is {what}.")
        loop = asyncio.get_running_loop()
        try:
            bound = await loop.run_in_executor(self._decoders, stage, self.engine.templates, data, name)
        except Exception as error:
            raise problem_of(error, patch=name) from error
        version = await self.catalogue.change(lambda: self.store.publish(name, data, tags), patch=name)
        await self.shelf.enter(version, bound)
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

        def work() -> None:
            for version in gone:
                self.store.remove(version, force=whole or force)

        await self.catalogue.change(work, patch=reference)
        self.shelf.drop(gone, kept={version.hash for version in await self.catalogue.list()})


def _bodies(refused: Mapping[str, Problem]) -> dict[str, Any]:
    return {name: problem.body() for name, problem in refused.items()}


def _rename(node: dict[str, Any], named: dict[str, list[str]]) -> dict[str, Any]:
    """A node of the tree with the names that were asked for in the place of hashes."""
    tasks = [name for key in node["tasks"] for name in named[key]]
    return {**node, "tasks": tasks, "children": [_rename(child, named) for child in node["children"]]}

"""Many patches of one backbone on the same images; what they share is computed once.

    engine = Engine(backbone, {"flowers": patch, "birds": "birds.safetensors"})
    engine(images)                                    {"base": (B, K0), "flowers": (B, K1), "birds": (B, K2)}
    engine(images, tasks=["flowers", "birds"])        one patch a row: [(K1,), (K2,)]
    engine.add("signs", [small, large])               patches of one task: engine(images, resolution=96), latency=0.01
    engine.add("fruits", "fruits.json")               a cascade: rows leave it as soon as a stage is sure of them
    print(engine.plan)                                what is shared, forked and merged, and what it costs

Members are added, removed and swapped while other threads call the engine: every call keeps the members it started with.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import NoHead
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.preprocessing import ImageSource, Preprocessing
from modelpatch.backbone.tuning import CACHE, FrozenBackbone, Module, Tuning, sample
from modelpatch.engine.backends.base import choose_backend
from modelpatch.engine.compiled import CompiledRuns, cache_place
from modelpatch.engine.graph import export_graph
from modelpatch.engine.inputs import Answers, Images, Sources, check_names, count_rows, make_batches, read, stream
from modelpatch.engine.measuring import least_seconds
from modelpatch.engine.plan import Batches, Link, Plan, make_plan
from modelpatch.engine.program import JoinedHeads, Program, Timing
from modelpatch.engine.residency import Residency
from modelpatch.engine.resident import BoundPart, NetworkLink, Templates
from modelpatch.engine.task import ANY, EngineTask, Given, Routed, Turn, Wish, bind, cost, reuse, run_rounds
from modelpatch.errors import EngineError, UnknownTaskError
from modelpatch.heads.reading import pooled_axes
from modelpatch.tasks.kind import View

BASE = "base"
COMPILED_BYTES = 512 * 2**20  # the least budget where a backend compiles: whole small networks for several tasks
PROGRAMS = 128


class Engine:
    """Patches of one backbone, run together. Every method may be called from any thread.

    `patches` are patches, bound or not, or paths of their files, by the name of the task; or several of one task in a list,
    of which calls choose by `resolution` or `latency`; or cascades. "base" is the backbone's own answer and is always there.
    `tuning` are settings of the computation, or a file that `modelpatch tune` wrote; by default `Tuning.of(backbone)`, a rule
    by device and architecture. `backend` compiles what runs between two forks and every variant: "onnxruntime", "openvino",
    "inductor", or "eager" for nothing; "auto" is the rule of `choose_backend`, or "eager" where a `tuning` or 16 bits are
    asked for. Compiled files are kept in the folder `cache`. `budget` are the bytes for variants as modules of their own and
    for compiled runs, beyond the patches' tensors and the backbone (by default twice the backbone's bytes; where a backend
    compiles eight times these, and at least 512 MiB); `eager` makes them when a patch is added instead of when it is used.
    `bfloat16` lets the rule choose 16-bit arithmetic, which moves logits by about a hundredth. `preprocessing` is that of the
    base's own answer, by default the backbone's; with that of the patches it shares their pass.

    Raises the errors of `BoundPatch` for patches that do not fit, `EngineError` for names that cannot be used.
    """

    def __init__(
        self,
        backbone: Backbone,
        patches: Mapping[str, Given] | None = None,
        *,
        tuning: Tuning | str | Path | None = None,
        backend: str = "auto",
        cache: str | Path | None = None,
        budget: int | None = None,
        eager: bool = False,
        bfloat16: bool = False,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        pinned = Tuning() if tuning is None else Tuning.load(tuning) if isinstance(tuning, str | Path) else tuning
        for given, kind, name, expected in (
            (backbone, Backbone, "backbone is", "what load_backbone gives"),
            (patches or {}, Mapping, "patches are", "them by name: {'flowers': patch}"),
            (pinned, Tuning, "tuning is", "a Tuning, such as mp.backbone.Tuning(fold=True), or its file"),
        ):
            if not isinstance(given, kind):
                raise EngineError(f"the {name} a {type(given).__name__}; expected {expected}.")
        if budget is not None and (type(budget) is not int or budget < 0):
            raise EngineError(f"the budget is {budget!r}; expected a number of bytes from 0 on.")
        if bfloat16 and tuning is not None:
            raise EngineError("bfloat16=True is for the rule. Give it without a tuning, or Tuning(bfloat16=True).")
        self.backbone = backbone
        self.tuning = Tuning.of(backbone, bfloat16=bfloat16) if tuning is None else pinned
        self._base_bytes = sum(t.nbytes for t in (*backbone.module.parameters(), *backbone.module.buffers()))
        chosen = choose_backend(backend, backbone.device, tuning is not None or self.tuning.bfloat16)
        if chosen.compiles and (self.tuning.bfloat16 or self.tuning.compile):
            raise EngineError(
                f"the backend {backend!r} computes in float32. Leave bfloat16 and compile out of the tuning."
            )
        if budget is None:
            budget = max(8 * self._base_bytes, COMPILED_BYTES) if chosen.compiles else 2 * self._base_bytes
        self.residency = Residency(budget, self.tuning, lambda: self.compiled.nbytes)
        self.compiled = CompiledRuns(
            chosen, lambda: backbone.identity, cache_place(cache), lambda: self.residency.budget - self.residency.nbytes
        )
        self.eager, self.templates = eager, Templates(backbone)
        self._frozen, self._plain = FrozenBackbone(backbone, self.tuning), FrozenBackbone(backbone, Tuning())
        self._joined: WeakValueDictionary[tuple[nn.Module, ...], JoinedHeads] = WeakValueDictionary()
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.RLock()
        self._seconds: WeakKeyDictionary[EngineTask, float] = WeakKeyDictionary()
        head = clone_module(backbone.chain.head)
        path: tuple[Link, ...] = self.templates.segments
        if isinstance(head, NoHead):
            head, path = nn.Identity(), (NetworkLink(backbone),)
        base = EngineTask(BASE, preprocessing or backbone.preprocessing, backbone.classes, head, path)
        self._tasks: dict[str, EngineTask] = {BASE: base}
        for name, patch in (patches or {}).items():
            self.add(name, patch)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names that calls may ask for, "base" first."""
        return tuple(self._tasks)

    def classes(self, task: str) -> tuple[str, ...]:
        """The names of a task's outputs; empty for a base without names."""
        return self._find(task).classes

    def kind(self, task: str) -> str:
        """The kind of a task: `modelpatch.tasks.kind_of` of it tells the meaning of its answers."""
        return self._find(task).kind

    def view(self, task: str, source: ImageSource | None = None, size: tuple[int, int] | None = None) -> View:
        """An image, or its size (width, height), as a task sees it: what its kind needs to tell an answer."""
        found = self._find(task)
        return View(found.classes, found.preprocessing, source, size, found.facts)

    def preprocessing(self, task: str) -> Preprocessing:
        """The preprocessing of a task's images; of several patches or a cascade, that of the last one."""
        return self._find(task).preprocessing

    def preprocessings(self, task: str) -> tuple[Preprocessing, ...]:
        """All preprocessings of a task's images: several for a cascade over several resolutions."""
        return self._find(task).kinds

    def resolutions(self, task: str) -> tuple[int, ...]:
        """The pixels of a task's patches, the cheapest patch first."""
        found = self._find(task)
        return tuple(option.preprocessing.image_size for option in found.options or (found,))

    def latencies(self, task: str) -> tuple[float, ...]:
        """Seconds that each of a task's patches takes for one image here, measured once, in the order of `resolutions`."""
        found = self._find(task)
        return tuple(self._measured(option) for option in found.options or (found,))

    def stage_costs(self, tasks: Sequence[str]) -> list[float]:
        """Multiply-adds an image of tasks of one patch each, one after another: what they share counts once, heads do not."""
        area = self.backbone.preprocessing.image_size**2
        found = [self._find(name) for name in tasks]
        return [cost(task, reuse(found[:number], task)[1]) / area for number, task in enumerate(found)]

    def add(self, name: str, patch: Given) -> None:
        """Add a patch, several of one task, or a cascade. Raises `EngineError` for a name that is taken; see `swap`."""
        self._enter(name, patch, anew=True)

    def swap(self, name: str, patch: Given) -> None:
        """Replace a task's patch at once: calls that are running finish with the old one, later ones get the new one.

        Patches and files are bound first, while calls go on. The new patch is not pinned.
        """
        self._enter(name, patch, anew=False)

    def _enter(self, name: str, patch: Given, *, anew: bool) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            expected = f"expected a name of its own, and {BASE!r} is the backbone"
            raise EngineError(f"a patch cannot be named {name!r}: {expected}.")
        task = bind(self.templates, name, patch)
        with self._lock:
            if anew and name in self._tasks:
                raise EngineError(f"there is a task {name!r} already. swap({name!r}, patch) replaces it.")
            old = [] if anew else self._choose([name])
            self.residency.retain(task.parts)
            self._tasks = {**self._tasks, name: task}
            for one in old:
                self._forget(one)
        if self.eager:
            self._prepare([task])

    def remove(self, name: str) -> None:
        """Remove a task's patch. Raises `UnknownTaskError` for a name that is not there, `EngineError` for "base"."""
        if name == BASE:
            raise EngineError('"base" is the backbone itself and cannot be removed.')
        with self._lock:
            old = self._find(name)
            self._tasks = {other: task for other, task in self._tasks.items() if other != name}
            self._forget(old)

    def pin(self, name: str) -> None:
        """Make a task's variants now and keep them within the budget. Raises `BudgetError` where there is no room."""
        with self._lock:
            task = self._find(name)
            self.residency.pin(name, task.parts)
        self.residency.make(task.parts)

    def unpin(self, name: str) -> None:
        """Allow a task's variants to be evicted again."""
        with self._lock:
            self.residency.unpin(name, self._find(name).parts)

    def settle(self) -> None:
        """Wait for the variants' modules and the compiled runs that are being made in the background."""
        self.residency.settle()
        self.compiled.settle()

    def compile(self, rows: int = 1, only: Iterable[str] | None = None) -> None:
        """Compile what all tasks, or those in `only`, run for `rows` images of their own size, and wait for it.

        Does nothing with the backend "eager". Files of the cache are loaded; `plan` tells what could not be compiled.
        """
        if type(rows) is not int or rows < 1:
            raise EngineError(f"cannot compile for {rows!r} images; expected a whole number from 1 on.")
        if self.compiled.backend.compiles:
            tasks = self._whole(only)
            kinds = {task.preprocessing: task.preprocessing.input_size for task in tasks}
            images: Batches = {
                kind: sample(size, self.backbone.device)[:1].expand(rows, -1, -1, -1) for kind, size in kinds.items()
            }
            self._program([(task, tuple(range(rows))) for task in tasks], images)(images, now=True)
            self.compiled.settle()

    def _prepare(self, tasks: Sequence[EngineTask]) -> None:
        """Make what the tasks' variants run as."""
        if self.compiled.backend.compiles:
            self.compile(only=[task.name for task in tasks])
        else:
            self.residency.make(part for task in tasks for part in task.parts)

    def _forget(self, old: EngineTask) -> None:
        for key, program in [*self._programs.items()]:
            if not old.members.isdisjoint(program.tasks.values()):
                del self._programs[key]
        self.residency.unpin(old.name, old.parts)
        self.compiled.forget(self.residency.release(old.parts))

    def _find(self, name: str) -> EngineTask:
        return self._choose([name])[0]

    @overload
    def __call__(
        self,
        images: Images,
        tasks: None = None,
        *,
        only: Iterable[str] | None = None,
        resolution: int | None = None,
        latency: float | None = None,
    ) -> dict[str, Tensor]: ...

    @overload
    def __call__(
        self, images: Images, tasks: Sequence[str], *, resolution: int | None = None, latency: float | None = None
    ) -> list[Tensor]: ...

    def __call__(
        self,
        images: Images,
        tasks: Sequence[str] | None = None,
        *,
        only: Iterable[str] | None = None,
        resolution: int | None = None,
        latency: float | None = None,
    ) -> dict[str, Tensor] | list[Tensor]:
        """Logits (B, K) by task for all tasks, or for those in `only`; with `tasks`, one a row, a list of (K,). Tasks that are
        no classification answer as `modelpatch.tasks.record` says: logits (B, K, H, W), boxes (B, N, 6).

        `images` are files or pictures, which every task sees through its own preprocessing; or a batch (B, 3, H, W) that is
        normalised already, for tasks that normalise alike; or such batches by preprocessing, as `read` gives them.
        Of tasks with several patches the one of `resolution` pixels answers, or the most costly that takes at most `latency`
        seconds for one image here; the most costly without either.
        Raises `UnknownTaskError`, and `EngineError` for images that the tasks cannot share or patches that are not there.
        """
        wish = Wish(resolution, latency)
        if tasks is None:
            return {name: routed.logits for name, routed in self._route(self._pick(only, wish), images).items()}
        if only is not None:
            raise EngineError("give tasks (one a row) or only (all rows, some tasks), not both.")
        names = check_names(tasks, "tasks") or []
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        routed = self._route(self._pick(rows, wish), images, rows, len(names))
        placed = {row: one for name, own in rows.items() for row, one in zip(own, routed[name].logits, strict=True)}
        return [placed[row] for row in range(len(names))]

    def answer(self, images: Images, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Logits by task, each (len(rows[task]), K) for its own rows of the images: increasing places in the batch.

        Raises `EngineError` for others, and what a call raises.
        """
        return {name: routed.logits for name, routed in self._route(self._pick(rows), images, rows).items()}

    def route(self, images: Images, only: Iterable[str] | None = None) -> dict[str, Routed]:
        """Logits by task as a call gives them, and which stage of a cascade answered each row."""
        return self._route(self._pick(only), images)

    def _route(
        self,
        tasks: Sequence[EngineTask],
        images: Images,
        rows: Mapping[str, Sequence[int]] | None = None,
        expected: int | None = None,
    ) -> dict[str, Routed]:
        """The answers of tasks for all images, which are `expected` ones, or each for its `rows` of them."""
        batches = make_batches(images, {task.name: task.kinds for task in tasks}, self.backbone.device)
        count = count_rows(batches)
        if expected not in (None, count):
            raise EngineError(f"{count} images and {expected} tasks; expected one task an image.")
        for name, own in (rows or {}).items():
            if list(own) != sorted(set(own)) or not all(0 <= row < count for row in own):
                raise EngineError(f"{name} is asked for rows {list(own)[:8]}; expected increasing ones below {count}.")
        turns = [(task, tuple(range(count) if rows is None else rows[task.name])) for task in tasks]
        return run_rounds(turns, batches, self._run)

    def _run(self, turns: Sequence[Turn], batches: Batches) -> dict[str, Tensor]:
        program = self._program(turns, batches)
        try:
            return program(batches)
        except RuntimeError as error:
            size, own = batches[None].shape[2:] if None in batches else (), self.backbone.preprocessing.image_size
            if not size or set(size) == {own}:
                raise
            raise EngineError(
                f"{self.backbone.spec} cannot compute images of {size[0]} x {size[1]}; its own have {own} pixels a side."
            ) from error

    def _pick(self, only: Iterable[str] | None, wish: Wish = ANY) -> list[EngineTask]:
        """The tasks of these names, or all; of every task with several patches the one that is wished for."""
        return wish.pick(self._choose(only), self._measured)

    def _measured(self, task: EngineTask) -> float:
        if task not in self._seconds:
            batches: Batches = {task.preprocessing: sample(task.preprocessing.input_size, self.backbone.device)[:1]}
            self._prepare([task])
            self._seconds[task] = least_seconds(lambda: self._run([(task, (0,))], batches), self.backbone.device)
        return self._seconds[task]

    def read(
        self,
        sources: Sequence[ImageSource],
        only: Iterable[str] | None = None,
        *,
        resolution: int | None = None,
        latency: float | None = None,
    ) -> dict[Preprocessing, Tensor]:
        """Images as every task (or those in `only`) sees them: batches (B, 3, H, W) by preprocessing. Raises `DataError`.

        `resolution` and `latency` choose among several patches of a task as a call does."""
        chosen = self._pick(only, Wish(resolution, latency))
        return read(sources, [kind for task in chosen for kind in task.kinds])

    def stream(
        self, sources: Sources, *, only: Iterable[str] | None = None, batch_size: int = 16, workers: int = 0
    ) -> Iterator[Answers]:
        """Answers for many images in order, `batch_size` at a time, for all tasks or those in `only`. See `Answers`.

        `sources` are files and pictures in a list, a folder (its image files as `find_images` orders them), or a data set
        whose items are pictures, tuples that begin with one, or rows with an "image". `workers` processes decode ahead, or
        this one. A task that is removed meanwhile ends the stream with `UnknownTaskError`. Raises `EngineError`.
        """
        tasks = self._choose(only)
        names, kinds = [task.name for task in tasks], [kind for task in tasks for kind in task.kinds]
        return stream(lambda images: self(images, only=names), kinds, sources, batch_size, workers)

    def export(self, path: str | Path, tasks: Iterable[str] | None = None) -> Path:
        """Write tasks (by default all, the base included) as one graph, in which what they share is computed once.

        An `.onnx` file has an output a task under the task's name, an input for every preprocessing, batches of any size, and
        both in its metadata; a `.pt2` file is a program of `torch.export`. Raises `EngineError` for cascades and tasks of
        several patches, `PatchError` for what cannot be traced, `MissingExtraError` without the `export` extra for ONNX.
        """
        return export_graph(self.backbone, self._choose(tasks), Path(path))

    def explain(self, images: Images, only: Iterable[str] | None = None) -> tuple[Plan, list[Timing]]:
        """The plan for these images and what each of its steps took, after a first run that does not count.

        Of a cascade all stages run: what an image takes that none but the last is sure of."""
        chosen = self._whole(only)
        batches = make_batches(images, {task.name: task.kinds for task in chosen}, self.backbone.device)
        rows = tuple(range(count_rows(batches)))
        program = self._program([(task, rows) for task in chosen], batches)
        program(batches)
        timings: list[Timing] = []
        program(batches, timings)
        return self._told(program), timings

    @property
    def plan(self) -> Plan:
        """The plan for one image and all tasks."""
        return self.plan_for()

    def plan_for(self, rows: int | Mapping[str, Sequence[int]] = 1, only: Iterable[str] | None = None) -> Plan:
        """The plan for `rows` images, seen through the tasks' own preprocessing, for all tasks or those in `only`; or for the
        rows of each task, as `answer` takes them. All stages of a cascade are in it."""
        if isinstance(rows, Mapping):
            turns = [(one, tuple(rows[task.name])) for task in self._choose(rows) for one in task.whole]
        elif type(rows) is not int or rows < 0:
            raise EngineError(f"a plan for {rows!r} images; expected a whole number from 0 on.")
        else:
            turns = [(one, tuple(range(rows))) for one in self._whole(only)]
        return self._told(self._program(turns, None))

    def _told(self, program: Program) -> Plan:
        """The plan of a program, with a note of what its runs are compiled to."""
        told = self.compiled.tell({run.key for run in program.runs})
        return replace(program.plan, notes=tuple(told))

    def _whole(self, only: Iterable[str] | None) -> list[EngineTask]:
        return [one for task in self._pick(only) for one in task.whole]

    def _choose(self, only: Iterable[str] | None) -> list[EngineTask]:
        """The tasks of these names, or all, as they are at this moment. Raises `UnknownTaskError`."""
        now, names = self._tasks, check_names(only, "only")
        if unknown := [name for name in names or () if name not in now]:
            raise UnknownTaskError(f"there is no task {unknown[0]!r}. Known tasks: {', '.join(now)}.")
        return [now[name] for name in (now if names is None else dict.fromkeys(names))]

    def _program(self, turns: Sequence[Turn], batches: Batches | None) -> Program:
        """The program for tasks, each on its rows of the batches; None are images as each task sees them."""
        one = None if batches is None or None not in batches else (batches[None].shape[2], batches[None].shape[3])
        key = (one, tuple(turns))
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
        own = self.backbone.preprocessing.image_size
        tasks = [task for task, _ in turns]
        plan = make_plan([task.planned(one, own) for task in tasks], [rows for _, rows in turns], self._pays)
        axes = partial(pooled_axes, self.backbone.chain)
        prepare, find, compiles = self.backbone.chain.prepare, self.compiled.find, self.compiled.backend.compiles
        program = Program(plan, tasks, self._module, self._join, axes, self.tuning, prepare, find, compiles)
        with self._lock:
            if {member for task in self._tasks.values() for member in task.members}.issuperset(tasks):
                self._programs[key] = program
                while len(self._programs) > PROGRAMS:
                    self._programs.popitem(last=False)
        return program

    def _join(self, heads: tuple[nn.Module, ...]) -> JoinedHeads:
        """Linear heads as one, kept as long as a program needs it and shared by all that do."""
        joined = self._joined.get(heads)
        if joined is None:
            joined = self._joined[heads] = JoinedHeads(heads)
        return joined

    def _module(self, link: Link, waits: bool = False) -> Module:
        """The eager module of a link; one that costs no bytes where it `waits` for a compiled one."""
        if isinstance(link, BoundPart):
            return link if waits else self.residency.module(link)
        if isinstance(link, NetworkLink):
            return link.module
        return (self._plain if waits else self._frozen).module(link.span[0])

    def _pays(self, link: Link, sizes: Sequence[int]) -> bool:
        """Return True if reading the weights once saves more than copying the streams costs: few rows, many weights.

        A compiled run is one call for all streams, which pays as well where they stay in the caches.
        """
        rows = max(sizes)
        cached = self.compiled.backend.compiles and sum(sizes) * link.output_bytes <= 2 * CACHE
        return rows <= self.tuning.merge_rows and (cached or link.nbytes > rows * link.output_bytes)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the backbone and its frozen copies, of all patches' tensors, of the templates that compute with them, of
        variants' own modules, of compiled runs, and of joined heads."""
        bound = [patch for task in self._tasks.values() for patch in task.patches]
        structures = {id(patch.structure): patch.structure for patch in bound}
        with self._lock:
            joined = sum(heads.held for heads in self._joined.values())
        return {
            "backbone": self._base_bytes,
            "frozen": self._frozen.nbytes,
            "patches": sum(patch.nbytes for patch in bound),
            "templates": sum(structure.nbytes for structure in structures.values()),
            "variants": self.residency.nbytes,
            "compiled": self.compiled.nbytes,
            "joined heads": joined,
        }

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __repr__(self) -> str:
        return f"Engine({self.backbone.spec!r}, {len(self._tasks) - 1} patches)"

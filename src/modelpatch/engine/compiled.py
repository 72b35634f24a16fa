"""Runs of modules that a backend compiles: which there are, which are being made, and what each of them came to.

A run is a stretch of the backbone between two forks, or a variant. The first call that meets it looks for its file in the
cache; without one it is compiled once it has computed `ENOUGH` rows. Both happen in a thread of their own, and eager modules
answer meanwhile. What was compiled is compared with them before it answers, and refused, for a reason that is told, where it
computes something else. Where a backend compiles for one number of rows, a call runs in pieces of few such numbers.
"""

import hashlib
import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.places import cache_folder
from modelpatch.engine.backends.base import Backend, Compiled
from modelpatch.engine.plan import Link
from modelpatch.engine.threads import computing_pool
from modelpatch.text import count_of, first_line

ENOUGH = 64  # rows that a run computes in eager modules before it is compiled
PAID = 4096  # rows that a run computes after its eviction before others are evicted for it
MOST_RUNS = 2048  # that are remembered
TOLERANCE = 1e-4  # of the largest number of a run's output
MOST_CACHED = 8 * 2**30  # bytes of the cache on disk
FORMAT = 1  # of the files in the cache


@dataclass(frozen=True)
class LinkRun:
    """Consecutive links of a plan: of the backbone, or variants of a patch and what lies between them."""

    links: tuple[Link, ...]
    name: str
    key: str
    nbytes: int

    @classmethod
    def split(cls, links: Sequence[Link]) -> tuple["LinkRun", ...]:
        """The runs of links that follow one another.

        Variants are one run with the backbone's segments between them unless these are the larger part; those before the
        first variant and after the last one are runs that other patches share.
        """
        own = [place for place, link in enumerate(links) if link.own]
        first, end = (own[0], own[-1] + 1) if own else (0, 0)
        inner = links[first:end]
        if 2 * sum(link.nbytes for link in inner if link.own) >= sum(link.nbytes for link in inner):
            parts = [links[:first], inner, links[end:]]
        else:
            parts = [[*part] for _, part in itertools.groupby(links, lambda link: link.own)]
        return tuple(cls.of(tuple(part)) for part in parts if part)

    @classmethod
    def of(cls, links: tuple[Link, ...]) -> "LinkRun":
        """All of the links as one run."""
        first, last = links[0].name, links[-1].name
        name = first if len(links) == 1 else f"{first} ... {last}"
        return cls(links, name, " ".join(link.key for link in links), sum(link.nbytes for link in links))


@dataclass(eq=False)
class CompiledRun:
    """The state of one run at one shape: `module` answers if it is there, `reason` says why it never will."""

    run: LinkRun
    shape: tuple[int, ...]
    rows: int | None
    met: int = 0  # rows computed, since the last eviction
    used: int = 0
    nbytes: int = 0
    module: Compiled | None = None
    reason: str = ""
    sought: bool = False  # in the cache
    short: bool = False  # of room in the budget
    evicted: bool = False
    making: Future[None] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        size = "x".join(map(str, (self.rows or "any", *self.shape)))
        why = self.reason or ("no room in the budget" if self.short else "")
        state = "compiled" if self.module else f"eager, {why}" if why else "eager so far"
        return f"{self.run.name} ({size}): {state}"

    @property
    def waits(self) -> bool:
        """True if a compiled module may still come."""
        return not self.reason and not self.short


class RunModule(NamedTuple):
    """The compiled module of a run, if it is there; `waits` is True where it is still to come."""

    module: Compiled | None = None
    waits: bool = False


class CompiledRuns:
    """Compiled runs by what they compute, within a budget of bytes. Thread-safe.

    `identity` tells the backbone's tensors and operations, `cache` is the folder of files, `room` gives the bytes that all of
    them may take.
    """

    def __init__(self, backend: Backend, identity: Callable[[], str], cache: Path, room: Callable[[], int]) -> None:
        self.backend, self.cache = backend, cache
        self._identity, self._room = identity, room
        self._entries: dict[tuple[str, tuple[int, ...], int | None], CompiledRun] = {}
        self._held: OrderedDict[int, CompiledRun] = OrderedDict()  # those with bytes, the least recently used first
        self._clock = itertools.count(1)
        self._lock = threading.RLock()
        self._maker = computing_pool(1, "modelpatch-compiler")

    @property
    def nbytes(self) -> int:
        """Bytes of the runs that are compiled or being compiled."""
        with self._lock:
            return sum(entry.nbytes for entry in self._held.values())

    def tell(self, keys: Collection[str] | None = None) -> list[str]:
        """The backend, how many of the runs with these keys, or of all that were met, it compiled, and why not the others."""
        if not self.backend.compiles:
            return []
        with self._lock:
            met = [entry for entry in self._entries.values() if keys is None or entry.run.key in keys]
            compiled = sum(entry.module is not None for entry in met)
            lines = [f"{self.backend.name}: {compiled} of {count_of(len(met), 'run')} compiled"]
            return lines + [f"  {entry}" for entry in met if entry.module is None]

    def find(self, run: LinkRun, x: Tensor, now: bool = False) -> RunModule:
        """The compiled module for a run on `x`, if there is one; `now` has it compiled however few rows it has computed."""
        if not self.backend.compiles or not run.nbytes or not len(x) or x.dtype != torch.float32:
            return RunModule()
        sizes = piece_sizes(len(x), torch.get_num_threads()) if self.backend.fixed_rows else [len(x)]
        with self._lock:
            entries = {rows: self._seek(run, x[:rows], count * rows, now) for rows, count in Counter(sizes).items()}
            modules = {rows: entry.module for rows, entry in entries.items() if entry.module is not None}
            if len(modules) < len(entries):
                return RunModule(None, all(entry.waits for entry in entries.values()))
        return RunModule(modules[len(x)] if len(sizes) == 1 else partial(_run_pieces, modules, sizes))

    def settle(self) -> None:
        """Wait for the runs that are being compiled."""
        with self._lock:
            making = [entry.making for entry in self._entries.values() if entry.making is not None]
        for one in making:
            one.result()

    def forget(self, keys: Collection[str]) -> None:
        """Free the runs of links with these keys."""
        with self._lock:
            for place, entry in [*self._entries.items()]:
                if any(link.key in keys for link in entry.run.links):
                    del self._entries[place]
                    self._held.pop(id(entry), None)

    def _seek(self, run: LinkRun, x: Tensor, met: int, now: bool) -> CompiledRun:
        """The state of a run on inputs like `x`, of which it computes `met` rows now; begin to compile it where it is time."""
        entry = self._entry(run, x)
        before, entry.used = entry.used, next(self._clock)
        entry.met += met
        if id(entry) in self._held:
            self._held.move_to_end(id(entry))
        if entry.module is None and entry.making is None and not entry.reason:
            write = now or entry.met >= ENOUGH
            if write or not entry.sought:
                entry.short = not self._make_room(entry, before if now or not entry.evicted or entry.met >= PAID else 0)
                if not entry.short:
                    threads, held = torch.get_num_threads(), x.detach().clone()
                    entry.making = self._maker.submit(self._make, entry, held, threads, write)
        return entry

    def _entry(self, run: LinkRun, x: Tensor) -> CompiledRun:
        shape, rows = tuple(x.shape[1:]), len(x) if self.backend.fixed_rows else None
        if len(self._entries) >= MOST_RUNS:
            idle = [key for key, one in self._entries.items() if one.module is None and one.making is None]
            for key in sorted(idle, key=lambda key: self._entries[key].used)[: MOST_RUNS // 4]:
                del self._entries[key]
        return self._entries.setdefault((run.key, shape, rows), CompiledRun(run, shape, rows))

    def _make_room(self, entry: CompiledRun, before: int) -> bool:
        """Reserve the bytes of a run, evicting those last used before the moment `before`; False if that is too little."""
        needed = self.backend.copies * entry.run.nbytes
        free, victims = self._room() - self.nbytes, []
        for number, other in self._held.items():
            if free >= needed:
                break
            if other.used < before:
                victims.append(number)
                free += other.nbytes
        if free < needed:
            return False
        for number in victims:
            gone = self._held.pop(number)
            gone.module, gone.nbytes, gone.sought, gone.met, gone.evicted = None, 0, False, 0, True
        entry.nbytes = needed
        self._held[id(entry)] = entry
        return True

    def _make(self, entry: CompiledRun, x: Tensor, threads: int, write: bool) -> None:
        module, reason = None, ""
        try:
            if threading.main_thread().is_alive():  # nothing is begun for a program that ends
                module = self._compile(entry, x, threads, write)
        except Exception as error:  # whatever a compiler raises: eager modules go on answering
            reason = f"{self.backend.name} fails: {first_line(error)[:200]}"
        else:
            if module is not None:
                reason = self._difference(entry, module, x)
        with self._lock:
            entry.making, entry.sought, entry.reason = None, True, reason
            if module is None or reason:
                self._held.pop(id(entry), None)
                entry.nbytes = 0
            elif id(entry) in self._held:
                entry.module = module

    def _compile(self, entry: CompiledRun, x: Tensor, threads: int, write: bool) -> Compiled | None:
        path = self._path(entry)
        if not path.exists():
            if not write:
                return None
            with torch.no_grad():
                data = self.backend.write(eager_module(entry.run), [_noise(2, x)], entry.run.name, threads)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
            prune(path.parent, MOST_CACHED)
        path.touch()  # used last now
        try:
            return self.backend.load(path, [x], threads, entry.rows is not None)
        except Exception:
            path.unlink(missing_ok=True)  # it may be damaged: the next engine compiles anew
            raise

    def _path(self, entry: CompiledRun) -> Path:
        text = f"{FORMAT} {self._identity()} {entry.run.key} {entry.shape} {self.backend.version}"
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()}{self.backend.suffix}"

    @torch.inference_mode()
    def _difference(self, entry: CompiledRun, compiled: Compiled, x: Tensor) -> str:
        """The reason for which a compiled run may not answer, from what it gives for `x` and for noise; empty for none."""
        eager = eager_module(entry.run)
        noise = _noise(len(x), x)
        for given in (x, noise) if entry.rows is not None else (x, noise, noise[:1], torch.cat([noise] * 3)):
            ends = [0, len(given) - 1]  # of a frozen network every row is computed by itself
            expected, found = eager(given[ends]).float(), compiled(given).float()
            if len(found) == len(given):
                found = found[ends]
            if found.shape != expected.shape:
                return (
                    f"{self.backend.name} gives the shape {tuple(found.shape)}, eager modules {tuple(expected.shape)}"
                )
            largest = expected.abs().max().clamp(min=1e-6)
            apart = ((found - expected).abs().max() / largest).item()
            if not apart <= TOLERANCE:  # NaN is not
                return f"{self.backend.name} differs by {apart:.1e} of the largest output, more than {TOLERANCE:.0e}"
        return ""


def piece_sizes(rows: int, threads: int) -> list[int]:
    """The sizes of the pieces in which this number of rows is computed: powers of four, up to twice the threads from 4 on.

    Few sizes have to be compiled, and pieces of 4 rows take two cores no longer a row than larger ones.
    """
    size, sizes = 4, list[int]()
    while 4 * size <= 2 * threads:
        size *= 4
    while size:
        sizes += [size] * (rows // size)
        rows, size = rows % size, size // 4
    return sizes


def _run_pieces(modules: Mapping[int, Compiled], sizes: Sequence[int], x: Tensor) -> Tensor:
    """The outputs of the module of each size for its piece of the rows."""
    return torch.cat([modules[len(piece)](piece) for piece in x.split(list(sizes))])


def eager_module(run: LinkRun) -> nn.Sequential:
    """The modules of a run, one after another, in eval mode."""
    return nn.Sequential(*(link.copy() for link in run.links)).eval()


def cache_place(cache: str | Path | None) -> Path:
    """The folder of compiled files: the given one, or `compiled` in the folder of what this machine remembers."""
    return cache_folder() / "compiled" if cache is None else Path(cache).expanduser()


def prune(folder: Path, most: int) -> None:
    """Delete the files of a folder that were used longest ago until at most `most` bytes are left."""
    facts = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    for path in sorted(facts, key=lambda path: facts[path].st_mtime, reverse=True):
        most -= facts[path].st_size
        if most < 0:
            path.unlink(missing_ok=True)


def _noise(rows: int, x: Tensor) -> Tensor:
    """Noise like `x`, always the same, of this number of rows."""
    noise = torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    return noise.to(x.device)

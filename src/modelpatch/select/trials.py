"""Trials: methods trained on one fold and scored on the images that were held out of it, by several workers.

    bench     the backbone, the folds, the settings, and the activations that all trials share
    trial     a method, a fold, a seed and a number of epochs, and the trial whose patch it starts from, if any
    outcome   its accuracy on the held-out images, and the bytes its patch would have
    journal   outcomes on disk, a line each, so that an interrupted run goes on and a later one starts from what is known
    worker    this process, another on this machine, or an actor on a Ray cluster, with a bench of its own

A trial is an ordinary `fit` whose test images are the held-out ones. A worker that dies is replaced, and its trial is tried
again; outcomes are those of one process with as many threads. An outcome is found by the hash of everything it depends on, so
that one journal may serve many runs.
"""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock, local
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.augmentation import choose_augmentation
from modelpatch.data.splits import Split, drawn, join_splits
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError, DivergedError, ModelpatchError, TrainingError, require
from modelpatch.methods.method import Method
from modelpatch.patch.contents import Patch, encode_patch
from modelpatch.tasks.classification import Classification
from modelpatch.text import digest_of
from modelpatch.train.evaluation import store_as
from modelpatch.train.fitting import Fit
from modelpatch.train.inputs import SharedImages, SharedInputs
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.ray import connected
from modelpatch.train.settings import FitSettings

HELD_OUT = 0.2  # of the training images, where one split is scored on and the source brings none
DISK = 16 * 2**30  # bytes of activations in temporary files
ATTEMPTS = 3  # a trial that kills its worker this often is given up


@dataclass(frozen=True)
class Folds:
    """`images` to train and score on, and for every fold the rows (train, held out), int64."""

    images: Split
    rows: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, data: Task, count: int, seed: int) -> Self:
        """`count` folds of the training images; with one, the source's validation split or a fifth of the images.

        Raises `DataError` where nothing is left to score on, or a class is scored that has no image to train on.
        """
        check_classification(data, "choosing what to patch")
        if count < 1:
            raise DataError(f"the number of folds is {count}; expected at least 1.")
        images, labels = data.train, data.train.labels
        if count > 1:
            scored = stratified_folds(labels, count, seed)
        elif data.validation is not None:
            images = join_splits([data.train, data.validation])
            scored = [np.arange(len(data.train), len(images))]
        else:
            trained = drawn(labels, len(labels) - round(HELD_OUT * len(labels)), seed)  # a class of one image, too
            scored = [np.setdiff1d(np.arange(len(labels)), trained)]
        rows = tuple((np.setdiff1d(np.arange(len(images)), held), held) for held in scored)
        for train, held in rows:
            if not len(held):
                raise DataError(f"{data.task.name} has no images to score candidates on. Use fewer folds.")
            if lost := set(images.labels[held]) - set(images.labels[train]):
                name = data.classes[min(lost)]
                raise DataError(
                    f"the class {name!r} has images to score candidates on, but none to train them on. Add some."
                )
        return cls(images, rows)

    def data(self, data: Task, fold: int) -> Task:
        """The task of one fold: what is held out stands where the test images do."""
        train, held = self.rows[fold]
        return Task(data.task, self.images.take(train), self.images.take(held), facts=dict(data.facts))


def stratified_folds(labels: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Disjoint row indices: an equal share of every class, give or take one, but for single images, always trained on."""
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    dealt = [generator.permutation(rows) for rows in classes if len(rows) > 1]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *dealt])
    return [np.sort(rows[number::count]) for number in range(count)]


@dataclass(frozen=True)
class Trial:
    """One candidate on one fold. With `start`, training begins at what that trial ended with.

    With `dtype` its patch is stored so in place of the study's, and scored as it is stored.
    """

    method: Method
    fold: int
    seed: int
    epochs: int
    start: Self | None = None
    dtype: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        method = {"method": self.method.name, "hyperparameters": self.method.hyperparameters()}
        start = self.start.as_dict() if self.start else None
        stored = {} if self.dtype is None else {"dtype": self.dtype}
        return {**method, "fold": self.fold, "seed": self.seed, "epochs": self.epochs, "start": start, **stored}


@dataclass(frozen=True)
class Outcome:
    """`top1` in [0, 1] on the held-out images, None where training failed, and why.

    `file_bytes` is the size of the trial's patch as a file, `seconds` what the trial took.
    """

    top1: float | None
    file_bytes: int
    seconds: float
    failure: str | None = None


class Bench:
    """Everything the trials of one task share. `run` gives a trial's outcome; the data's test split is never read.

    `settings` hold for all trials, but for the seed and the epochs, which every trial brings. With `same_steps` a trial's
    epochs are those of a fit on all training images, and on a fold it makes as many more as that has fewer images. `memory`
    of the settings and `disk` are the budgets, in bytes, for shared activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        settings: FitSettings,
        *,
        folds: int = 5,
        disk: int = DISK,
        same_steps: bool = False,
    ) -> None:
        if settings.early_stopping or settings.validation:
            raise TrainingError(
                "candidates are scored after their last epoch, on images that are held out for all of them: leave "
                "early_stopping and validation out."
            )
        self.backbone, self.disk = backbone, disk
        self.folds = Folds.of(data, folds, settings.seed)
        augmentation = choose_augmentation(settings.augment, self.folds.images)
        self.settings = replace(settings, augment=augmentation.name)  # type: ignore[arg-type]
        self.data = [self.folds.data(data, fold) for fold in range(len(self.folds.rows))]
        self.more = [len(data.train) / len(rows) if same_steps else 1.0 for rows, _ in self.folds.rows]
        self.bar = quiet_progress()
        self._states: dict[str, dict[str, Tensor]] = {}
        self._again = partial(Bench, backbone, data, folds=folds, same_steps=same_steps)

    def for_workers(self, count: int) -> "Callable[[], Bench]":
        """A function that makes a bench for one of `count` workers, with its share of the memory and the disk."""
        part = replace(self.settings, memory=max(self.settings.memory // count, 1))
        return partial(self._again, part, disk=self.disk // count)

    @cached_property
    def shared(self) -> SharedImages:
        """The decoded images and their activations before every block."""
        return share_images(self.backbone, self.folds.images, self.settings, self.disk, self.bar)

    @cached_property
    def identity(self) -> str:
        """A hash of all that outcomes depend on besides their trial."""
        facts = {
            "backbone": self.backbone.identity,
            "task": self.data[0].task.model_dump(mode="json"),
            "images": self.folds.images.digest,
            "folds": [held.tolist() for _, held in self.folds.rows],
            "more": self.more,
            "settings": {k: v for k, v in asdict(self.settings).items() if k not in ("memory", "dtype")},
        }
        return digest_of(facts)

    def key(self, trial: Trial) -> str:
        """The name of a trial's outcome: 32 hexadecimal digits over the identity, the trial and how patches are stored."""
        return digest_of([self.identity, trial.as_dict(), self.settings.dtype])[:32]

    def run(self, trial: Trial) -> Outcome:
        """Train and score. A loss that is not finite is an outcome, anything else that goes wrong is raised."""
        _ = self.shared.activations  # no trial's own work
        begin = time.perf_counter()
        try:
            patch = self._fit(trial).run(start=self._start(trial))
            if trial.dtype is None:
                patch = patch.astype(self.settings.dtype)
            else:
                patch = store_as(self.backbone, patch, self.data[trial.fold], trial.dtype)
        except DivergedError as error:
            return Outcome(None, 0, time.perf_counter() - begin, str(error))
        return Outcome(patch.metrics["test_top1"], file_bytes(patch), time.perf_counter() - begin)

    def _fit(self, trial: Trial) -> Fit:
        train, held = (torch.from_numpy(part) for part in self.folds.rows[trial.fold])
        settings = replace(self.settings, seed=trial.seed, epochs=round(trial.epochs * self.more[trial.fold]))
        source = SharedInputs(self.shared, {"train": train, "test": held})
        return Fit(self.backbone, self.data[trial.fold], trial.method, settings, source=source)

    def _start(self, trial: Trial) -> Mapping[str, Tensor] | None:
        """The state that the trial's `start` ended with; it is trained again where it was not trained in this process."""
        if trial.start is None:
            return None
        key = self.key(trial.start)
        if key not in self._states:
            fit = self._fit(trial.start)
            fit.run(start=self._start(trial.start))
            self._states[key] = {name: tensor.clone() for name, tensor in fit.model.portable_state().items()}
        return self._states[key]


def file_bytes(patch: Patch) -> int:
    """The exact size of the patch's file."""
    return len(encode_patch(patch))


def share_images(backbone: Backbone, images: Split, settings: FitSettings, disk: int, bar: Progress) -> SharedImages:
    """Images for many fits with these settings, which name an augmentation."""
    preprocessing = settings.seen(backbone.preprocessing, Classification.name)
    backbone.check_image_size(preprocessing.image_size)
    augmentation = choose_augmentation(settings.augment, images)
    return SharedImages(backbone, images, preprocessing, augmentation, settings, disk, bar)


T = TypeVar("T")  # a dataclass of plain values


class Journal(Generic[T]):
    """Outcomes, of type `kind`, in a file of JSON lines; with no path they are kept in memory only."""

    def __init__(self, kind: type[T], path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.outcomes: dict[str, T] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be read: {error.strerror}.") from error
        whole = data[: data.rfind(b"\n") + 1]  # a line that a killed run left unfinished is written anew
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.outcomes[entry["key"]] = kind(**entry["outcome"])
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(
                    f"{self.path}, line {number}: this is no {kind.__name__.lower()}. Name another file, or remove this one."
                ) from error
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def add(self, key: str, what: dict[str, Any], outcome: T) -> None:
        """Keep the outcome of `what`; on disk before this returns."""
        self.outcomes[key] = outcome
        if self.path is None:
            return
        entry: dict[str, Any] = {"key": key, "of": what, "outcome": asdict(outcome)}  # type: ignore[call-overload]
        try:
            with self.path.open("ab") as stream:
                stream.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}.") from error


# workers ----------------------------------------------------------------------------------------------------


# positions and outcomes as trials finish, in any order
Run = Callable[[Sequence[Trial]], Iterator[tuple[int, Outcome]]]


@contextmanager
def open_workers(bench: Bench, workers: int, ray: str | None = None) -> Iterator[Run]:
    """A function that runs trials: in this process, in several, or in actors on the Ray cluster at the address `ray`.

    `local` starts a cluster here, `auto` finds a running one; its machines must read the files of images under the same paths.
    Raises `MissingExtraError` without Ray.
    """
    if workers < 1:
        raise TrainingError(f"the number of workers is {workers}; expected at least 1.")
    if workers == 1 and ray is None:
        yield lambda trials: ((position, bench.run(trial)) for position, trial in enumerate(trials))
        return
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers))
    make = bench.for_workers(workers)
    with ExitStack() as stack:
        start: Callable[[], Worker] = partial(LocalWorker, make, threads)
        if ray is not None:
            library = require("ray", "ray", "--ray")
            stack.enter_context(connected(ray, workers * threads))
            start = partial(RayWorker, library, library.put(make), threads)  # what benches are made of travels once
        yield stack.enter_context(closing(Pool(start, workers))).run


class Worker(Protocol):
    """One process. `run` returns what a trial raised, and raises `EOFError` with the reason if the process ends."""

    def run(self, trial: Trial) -> Outcome | Exception: ...

    def stop(self) -> None: ...


class Pool:
    """At most `count` threads, each with a worker of its own that `start` makes when there is work for it."""

    def __init__(self, start: Callable[[], Worker], count: int) -> None:
        self.start, self.threads, self.own = start, ThreadPoolExecutor(count), local()
        self._workers: list[Worker] = []
        self._lock, self._closed = Lock(), False

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """Raises what a trial raised, and `TrainingError` for a trial that kills its worker again and again."""
        futures = {self.threads.submit(self._try, trial): position for position, trial in enumerate(trials)}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _try(self, trial: Trial) -> Outcome:
        why = ""
        for _ in range(ATTEMPTS):
            with self._lock:
                if self._closed:
                    raise TrainingError("the workers were stopped.")
                if getattr(self.own, "worker", None) is None:
                    self.own.worker = self.start()
                    self._workers.append(self.own.worker)
            try:
                answer = self.own.worker.run(trial)
            except EOFError as error:
                why, self.own.worker = str(error), None
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise TrainingError(
            f"a trial ended its worker {ATTEMPTS} times ({why}). Where memory runs out, give fewer workers or less memory."
        )

    def close(self) -> None:
        """Stop all workers, whatever they do."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.stop()


class Actor:
    """A bench in a process of its own."""

    def __init__(self, make: Callable[[], Bench], threads: int) -> None:
        torch.set_num_threads(threads)
        self.bench = make()

    def run(self, trial: Trial) -> Outcome | Exception:
        """A trial's outcome, or the error it raised, in a form that travels between processes."""
        try:
            return self.bench.run(trial)
        except ModelpatchError as error:
            return error
        except Exception:
            return TrainingError(f"a trial failed in its worker:\n{traceback.format_exc()}")


class LocalWorker:
    """A process on this machine, which reads trials from a pipe."""

    def __init__(self, make: Callable[[], Bench], threads: int) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()  # from a process that imports the library once
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, trial: Trial) -> Outcome | Exception:
        try:
            self.pipe.send(trial)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise EOFError(f"exit status {self.process.exitcode}") from None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, make: Callable[[], Bench], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that stops its workers
    actor = Actor(make, threads)
    with suppress(EOFError):
        while True:
            pipe.send(actor.run(pipe.recv()))


class RayWorker:
    """An actor of the cluster."""

    def __init__(self, ray: Any, stored: Any, threads: int) -> None:
        self.ray, self.actor = ray, ray.remote(num_cpus=threads)(Actor).remote(stored, threads)

    def run(self, trial: Trial) -> Outcome | Exception:
        try:
            return self.ray.get(self.actor.run.remote(trial))
        except self.ray.exceptions.RayActorError as error:
            raise EOFError(str(error).strip().splitlines()[-1]) from None

    def stop(self) -> None:
        self.ray.kill(self.actor)

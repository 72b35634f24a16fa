"""Workers that run trials: in this process, in several, or on a Ray cluster.

Every worker holds the bench and computes its own activations once. A worker that dies, whatever killed it, is replaced,
and its trial is tried again; the outcomes are those of one process with as many threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Protocol, Self

import torch

from modelpatch.errors import ModelpatchError, TrainingError
from modelpatch.select.trials import Bench, Outcome, Trial
from modelpatch.train.ray import connected, require_ray

ATTEMPTS = 3  # a trial that kills its worker this often is given up


class Workers(ExitStack):
    """A context in which trials are run."""

    @abstractmethod
    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """Yield (position, outcome) as trials finish, in any order."""


class InProcess(Workers):
    """Runs one trial after another in this process."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        yield from ((position, self.bench.run(trial)) for position, trial in enumerate(trials))


class Worker(Protocol):
    """One process. `run` returns what a trial raised, and raises `EOFError` with the reason if the process ends."""

    def run(self, trial: Trial) -> Outcome | Exception: ...

    def stop(self) -> None: ...


class Pool(Workers):
    """`count` workers with `threads` threads each, which are started when there is work for them."""

    def __init__(self, bench: Bench, count: int, threads: int) -> None:
        super().__init__()
        self.bench, self.count, self.threads = bench.for_worker(count), count, threads
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []
        self._lock, self._closed = Lock(), False

    def __enter__(self) -> Self:
        self.callback(self._close)
        return self

    @abstractmethod
    def start(self) -> Worker:
        """A new worker."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """Raises what a trial raised, and `TrainingError` for a trial that kills its worker again and again."""
        with ThreadPoolExecutor(self.count) as threads:  # each waits for a worker
            futures = {threads.submit(self._try, trial): position for position, trial in enumerate(trials)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._close()
                raise

    def _try(self, trial: Trial) -> Outcome:
        why = ""
        for _ in range(ATTEMPTS):
            with self._lock:
                if self._closed:
                    raise TrainingError("the workers were stopped.")
                if not self._idle:
                    self._idle.append(self.start())
                    self._workers.append(self._idle[-1])
                worker = self._idle.pop()
            try:
                answer = worker.run(trial)
            except EOFError as error:
                why = str(error)
                continue
            self._idle.append(worker)
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise TrainingError(
            f"a trial ended its worker {ATTEMPTS} times ({why}). Where memory runs out, give fewer workers or less memory."
        )

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.stop()


class Actor:
    """The bench in a process of its own."""

    def __init__(self, bench: Bench, threads: int) -> None:
        torch.set_num_threads(threads)
        self.bench = bench

    def run(self, trial: Trial) -> Outcome | Exception:
        """A trial's outcome, or the error it raised, in a form that travels between processes."""
        try:
            return self.bench.run(trial)
        except ModelpatchError as error:
            return error
        except Exception:
            return TrainingError(f"a trial failed in its worker:\n{traceback.format_exc()}")


class Processes(Pool):
    """Processes on this machine."""

    def start(self) -> Worker:
        return LocalWorker(self.bench, self.threads)


class LocalWorker:
    """A process on this machine, which reads trials from a pipe."""

    def __init__(self, bench: Bench, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, bench, threads), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, trial: Trial) -> Outcome | Exception:
        try:
            self.pipe.send(trial)
            answer: Outcome | Exception = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise EOFError(f"exit status {self.process.exitcode}") from None
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, bench: Bench, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that stops its workers
    actor = Actor(bench, threads)
    with suppress(EOFError):
        while True:
            pipe.send(actor.run(pipe.recv()))


class RayWorkers(Pool):
    """Actors of `threads` CPUs each on the cluster at `address` (`local` starts one here, `auto` finds a running one).

    What trials need travels with them: images lie in files on this machine or, for data from parquet or the hub, in memory.
    On several machines those files must be readable under the same paths. Raises `MissingExtraError` without Ray.
    """

    def __init__(self, bench: Bench, count: int, threads: int, address: str) -> None:
        require_ray("--ray")
        super().__init__(bench, count, threads)
        self.address = address

    def __enter__(self) -> Self:
        import ray

        self.enter_context(connected(self.address, self.count * self.threads))
        self._stored = ray.put(self.bench)
        return super().__enter__()

    def start(self) -> Worker:
        return RayWorker(self._stored, self.threads)


class RayWorker:
    """An actor of the cluster."""

    def __init__(self, stored: Any, threads: int) -> None:
        import ray

        self.ray: Any = ray
        self.actor = self.ray.remote(num_cpus=threads)(Actor).remote(stored, threads)

    def run(self, trial: Trial) -> Outcome | Exception:
        try:
            answer: Outcome | Exception = self.ray.get(self.actor.run.remote(trial))
        except self.ray.exceptions.RayActorError as error:
            raise EOFError(str(error).strip().splitlines()[-1]) from None
        return answer

    def stop(self) -> None:
        self.ray.kill(self.actor)


def make_workers(bench: Bench, workers: int, ray: str | None = None) -> Workers:
    """Workers in this process for one, in processes for more, and on a Ray cluster if its address is given.

    Raises `MissingExtraError` for Ray where it is not installed.
    """
    if workers < 1:
        raise TrainingError(f"the number of workers is {workers}; expected at least 1.")
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers))
    if ray is not None:
        return RayWorkers(bench, workers, threads, ray)
    return InProcess(bench) if workers == 1 else Processes(bench, workers, threads)

"""Workers that run trials: this process, several on this machine, or actors on a Ray cluster.

Every worker makes a bench and computes its own activations once. A worker that dies, whatever killed it, is replaced,
and its trial is tried again; the outcomes are those of one process with as many threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from threading import Lock, local
from typing import Any, Protocol

import torch

from modelpatch.errors import ModelpatchError, TrainingError
from modelpatch.select.trials import Bench, Outcome, Trial
from modelpatch.train.ray import connected, require_ray

ATTEMPTS = 3  # a trial that kills its worker this often is given up
Run = Callable[
    [Sequence[Trial]], Iterator[tuple[int, Outcome]]
]  # positions and outcomes as trials finish, in any order


@contextmanager
def open_workers(bench: Bench, workers: int, ray: str | None = None) -> Iterator[Run]:
    """A function that runs trials: in this process for one worker, in processes for more, and on the Ray cluster at the
    address `ray` (`local` starts one here, `auto` finds a running one) in actors of so many threads.

    What trials need travels with them: images lie in files on this machine or, for data from parquet or the hub, in memory.
    On several machines those files must be readable under the same paths. Raises `MissingExtraError` without Ray.
    """
    if workers < 1:
        raise TrainingError(f"the number of workers is {workers}; expected at least 1.")
    if workers == 1 and ray is None:
        yield lambda trials: ((position, bench.run(trial)) for position, trial in enumerate(trials))
        return
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers))
    with ExitStack() as stack:
        start: Callable[[], Worker] = partial(LocalWorker, bench.for_workers(workers), threads)
        if ray is not None:
            require_ray("--ray")
            stack.enter_context(connected(ray, workers * threads))
            start = RayWorker.starter(bench.for_workers(workers), threads)
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
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads), daemon=True)
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

    @classmethod
    def starter(cls, make: Callable[[], Bench], threads: int) -> Callable[[], Worker]:
        """A function that starts a worker; what they make their benches of lies in the cluster once."""
        import ray

        return partial(cls, ray, ray.put(make), threads)

    def run(self, trial: Trial) -> Outcome | Exception:
        try:
            answer: Outcome | Exception = self.ray.get(self.actor.run.remote(trial))
        except self.ray.exceptions.RayActorError as error:
            raise EOFError(str(error).strip().splitlines()[-1]) from None
        return answer

    def stop(self) -> None:
        self.ray.kill(self.actor)

"""Workers that run trials: in this process, in several, or on a Ray cluster.

Every worker holds the bench and computes its own activations once. A worker that dies, whatever killed it, is replaced,
and its trial is tried again; the outcomes are those of one process with as many threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

import torch

from modelpatch.errors import ModelpatchError, TrainingError
from modelpatch.select.trials import Bench, Outcome, Trial
from modelpatch.train.ray import connected, require_ray

ATTEMPTS = 3  # a trial that kills its worker this often is given up


class Workers(Protocol):
    """`run` yields (position, outcome) as trials finish, in any order."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]: ...

    def __enter__(self) -> Workers: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InProcess:
    """Runs one trial after another in this process."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        for position, trial in enumerate(trials):
            yield position, self.bench.run(trial)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class Processes:
    """`count` processes on this machine, each with `threads` threads; they are started when there is work for them."""

    def __init__(self, bench: Bench, count: int, threads: int) -> None:
        self.bench, self.count, self.threads = bench.for_worker(count), count, threads
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """Raises what a trial raised, and `TrainingError` for a trial that kills its worker again and again."""
        waiting, attempts = deque(range(len(trials))), [0] * len(trials)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        while waiting or busy:
            while waiting and len(busy) < self.count:
                worker, position = self._idle(busy), waiting.popleft()
                attempts[position] += 1
                if worker.send(trials[position]):
                    busy[worker.pipe] = worker, position
                else:
                    self._lost(worker, position, attempts, waiting)
            ready = wait(list(busy))
            for pipe in [one for one in busy if one in ready]:
                worker, position = busy.pop(pipe)
                answer = worker.receive()
                if answer is None:
                    self._lost(worker, position, attempts, waiting)
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    yield position, answer

    def _idle(self, busy: dict[Connection, tuple[_Worker, int]]) -> _Worker:
        for worker in self.workers:
            if worker.pipe not in busy:
                return worker
        self.workers.append(_Worker(self.context, self.bench, self.threads))
        return self.workers[-1]

    def _lost(self, worker: _Worker, position: int, attempts: list[int], waiting: deque[int]) -> None:
        self.workers.remove(worker)
        worker.stop()
        give_up(attempts[position], f"exit status {worker.process.exitcode}")
        waiting.appendleft(position)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()


class _Worker:
    """A process that answers trials with outcomes."""

    def __init__(self, context: Any, bench: Bench, threads: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, bench, threads), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, trial: Trial) -> bool:
        """Send a trial. Returns False if the process is dead."""
        try:
            self.pipe.send(trial)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> Outcome | Exception | None:
        """The trial's outcome, or what it raised; None where the process died."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, bench: Bench, threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that stops its workers
    while True:
        try:
            trial = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(bench, trial))


def attempt(bench: Bench, trial: Trial) -> Outcome | Exception:
    """A trial's outcome, or the error it raised, in a form that travels between processes."""
    try:
        return bench.run(trial)
    except ModelpatchError as error:
        return error
    except Exception:
        return TrainingError(f"a trial failed in its worker:\n{traceback.format_exc()}")


def give_up(attempts: int, why: str) -> None:
    """Raise `TrainingError` if a trial has killed its worker often enough."""
    if attempts >= ATTEMPTS:
        raise TrainingError(
            f"a trial ended its worker {attempts} times ({why}). Where memory runs out, give fewer workers or less memory."
        )


class RayWorkers:
    """`count` actors of `threads` CPUs each on the cluster at `address` (`local` starts one here, `auto` finds a running one).

    What trials need travels with them: images lie in files on this machine or, for data from parquet or the hub, in memory.
    On several machines those files must be readable under the same paths. Raises `MissingExtraError` without Ray.
    """

    def __init__(self, bench: Bench, count: int, threads: int, address: str) -> None:
        require_ray("--ray")
        self.bench, self.count, self.threads, self.address = bench.for_worker(count), count, threads, address
        self.actors: list[Any] = []

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """Raises what a trial raised, and `TrainingError` for a trial that kills its actor again and again."""
        import ray
        from ray.exceptions import RayActorError

        waiting, attempts = deque(range(len(trials))), [0] * len(trials)
        busy: dict[Any, tuple[Any, int]] = {}
        while waiting or busy:
            while waiting and len(busy) < self.count:
                actor, position = self._idle([one for one, _ in busy.values()]), waiting.popleft()
                attempts[position] += 1
                busy[actor.run.remote(trials[position])] = actor, position
            for done in ray.wait(list(busy))[0]:
                actor, position = busy.pop(done)
                try:
                    answer = ray.get(done)
                except RayActorError as error:
                    self.actors.remove(actor)
                    give_up(attempts[position], str(error).strip().splitlines()[-1])
                    waiting.appendleft(position)
                    continue
                if isinstance(answer, Exception):
                    raise answer
                yield position, answer

    def _idle(self, busy: list[Any]) -> Any:
        for actor in self.actors:
            if actor not in busy:
                return actor
        import ray

        kind = ray.remote(num_cpus=self.threads)(Actor)
        self.actors.append(kind.remote(self._stored, self.threads))
        return self.actors[-1]

    def __enter__(self) -> RayWorkers:
        import ray

        self._connection = connected(self.address, self.count * self.threads)
        self._connection.__enter__()
        self._stored = ray.put(self.bench)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors.clear()
        self._connection.__exit__(kind, error, trace)


class Actor:
    """The bench in a process of the cluster."""

    def __init__(self, bench: Bench, threads: int) -> None:
        torch.set_num_threads(threads)
        self.bench = bench

    def run(self, trial: Trial) -> Outcome | Exception:
        return attempt(self.bench, trial)


def default_threads(workers: int) -> int:
    """Threads for each of so many workers."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers))


def make_workers(bench: Bench, workers: int, ray: str | None = None) -> Workers:
    """Workers in this process for one, in processes for more, and on a Ray cluster if its address is given.

    Raises `MissingExtraError` for Ray where it is not installed.
    """
    if workers < 1:
        raise TrainingError(f"the number of workers is {workers}; expected at least 1.")
    if ray is not None:
        return RayWorkers(bench, workers, default_threads(workers), ray)
    return InProcess(bench) if workers == 1 else Processes(bench, workers, default_threads(workers))

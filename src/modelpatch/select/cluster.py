"""Trials on a Ray cluster: every actor holds the bench; one that dies is replaced, and its trial is tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from modelpatch.select.trials import Bench, Outcome, Trial
from modelpatch.select.workers import attempt, give_up
from modelpatch.train.ray import LOCAL, connected, require_ray

__all__ = ["LOCAL", "RayWorkers"]


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
    """What runs on the cluster."""

    def __init__(self, bench: Bench, threads: int) -> None:
        torch.set_num_threads(threads)
        self.bench = bench

    def run(self, trial: Trial) -> Outcome | Exception:
        return attempt(self.bench, trial)

"""A whole selection on a Ray cluster is the one of a single process, though one of its workers is killed at work."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from conftest import color_task, make_tiny
from modelpatch.select.greedy import Greedy, Selection, select

pytestmark = pytest.mark.service

ACTOR = b"ray::Actor"


def actors_at_work() -> set[int]:
    """The processes of this user's Ray that are running a trial; Ray writes what they run into their titles."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(ACTOR + b".run"):
                found.add(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Assassin(threading.Thread):
    """Kills the first actor that is seen at work and was not there before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.spared, self.stopped, self.killed = actors_at_work(), threading.Event(), 0

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            for process in actors_at_work() - self.spared:
                os.kill(process, signal.SIGKILL)
                self.killed = process
                return


def chosen(**options: object) -> Selection:
    return select(
        make_tiny(),
        color_task(30),
        "subset",
        greedy=Greedy(epsilon=0.0),
        folds=2,
        epochs=2,
        batch_size=8,
        max_blocks=2,
        **options,  # type: ignore[arg-type]
    )


def top1s(selection: Selection) -> list[list[tuple[float, ...]]]:
    return [[step.score.top1s for step in one.steps if step.score] for one in selection.rounds]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker to kill in /proc")
def test_ray_selects_what_one_process_selects_though_a_worker_is_killed_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the actors read the tests' classes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker has
    try:
        alone = chosen()
        assassin = Assassin()
        assassin.start()
        together = chosen(workers=2, ray="local")
    finally:
        torch.set_num_threads(threads)
    assassin.stopped.set()
    assert assassin.killed
    assert together.blocks == alone.blocks
    assert top1s(together) == top1s(alone)
    assert all(torch.equal(tensor, together.patch.tensors[name]) for name, tensor in alone.patch.tensors.items())

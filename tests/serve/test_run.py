"""Workers that die are replaced; those that never serve end the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelpatch.serve.run import TRIES

pytestmark = pytest.mark.service

SCRIPT = """
import os, signal, sys, time
from modelpatch.serve.run import Supervisor, bind

def serve(listening, ready):
    with open(sys.argv[1], "a") as file:
        print("started", file=file)
    with open(sys.argv[1]) as file:
        starts = len(file.readlines())
    {body}

Supervisor(serve, bind("127.0.0.1", 0), 1, 5.0).run()
"""


def run(folder: Path, body: str) -> tuple[int, str, int]:
    """The exit status of a server whose workers do this, what it said, and how many workers it started."""
    starts = folder / "starts"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body), str(starts)], capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stderr, len(starts.read_text().splitlines())


def test_a_server_whose_workers_never_serve_gives_up(tmp_path: Path) -> None:
    status, said, starts = run(tmp_path, "os._exit(3)")
    assert status == 1
    assert "ServeError: workers end before they serve (status 3)" in said
    assert starts == TRIES


def test_workers_that_served_are_replaced_however_soon_they_die(tmp_path: Path) -> None:
    last = 2 * TRIES
    die, stop = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getppid(), signal.SIGTERM); time.sleep(900)"
    body = f"ready(); starts < {last} and {die}; {stop}"
    status, said, starts = run(tmp_path, body)
    assert (status, starts) == (0, last)
    assert said.count("ended (signal 9)") == last - 1


def test_a_signal_inside_a_callback_ends_a_worker(tmp_path: Path) -> None:
    """An exception that a callback raises is printed and forgotten, so that a worker must not end by one."""
    stop = "lambda _: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(900))"
    body = f"import weakref; seen = weakref.finalize(type('Thing', (), {{}})(), {stop}, None); time.sleep(900)"
    status, said, _ = run(tmp_path, body)
    assert (status, said) == (0, "")

"""Replicas on Ray Serve: both are killed in turn under traffic, then all is ended. Long: only with MODELPATCH_LONG=1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from conftest import draft_patch, skip_without
from modelpatch.backbone.load import load_backbone
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.serve.client import Client
from modelpatch.store.store import Store
from serving import alive, children, close, picture, told, wait_until

skip_without("ray")
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(os.environ.get("MODELPATCH_LONG") != "1", reason="a long test: set MODELPATCH_LONG=1"),
]
METHODS = {"flowers": ScaleBias(), "birds": LinearProbe()}


def descendants(pid: int) -> set[int]:
    below = set(children(pid))
    return below.union(*map(descendants, below))


def replicas(pid: int) -> set[int]:
    """The process ids of the replicas that a deploying process has."""
    return {found for found in descendants(pid) if b"ServeReplica:modelpatch:" in command_of(found)}


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ")
    except (FileNotFoundError, ProcessLookupError):
        return b""


@contextmanager
def deployed(store: Store) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "modelpatch", "serve", store.url, "-b", "bundled:tiny", "--ray"]
    running = subprocess.Popen([*command, "--port", url.rpartition(":")[2]])
    try:
        with Client(url) as client:
            wait_until(lambda: client.ready() or running.poll() is not None, 400)
            assert running.poll() is None, "it could not start"
        yield running, url
    finally:
        running.kill()
        running.wait(300)


class Traffic:
    """Clients that ask both patches over and over, and count answers: right, wrong, or none. Nobody asks again."""

    def __init__(self, url: str, right: Callable[[dict[str, object]], bool], clients: int = 4) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[float, str]] = []
        self._url, self._right, self._lock, self._stop = url, right, threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with Client(self._url, retries=0) as client:
            while not self._stop.is_set():
                try:
                    answers = client.ask([picture(pixels=32)], list(METHODS))["images"][0]["answers"]
                except Exception as error:
                    with self._lock:
                        self.failures.append((time.monotonic(), str(error)[:200]))
                    time.sleep(0.05)
                    continue
                with self._lock:
                    self.counts["right" if self._right(answers) else "wrong"] += 1
                time.sleep(0.1)  # the replica that starts meanwhile needs a core too

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)


def test_replicas_that_are_killed_are_replaced_and_sigterm_ends_everything(tmp_path: Path) -> None:
    store, backbone = Store(tmp_path / "store"), load_backbone("bundled:tiny")
    truth = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        patch = draft_patch(backbone, method, seed=seed)
        truth[name] = backbone.patched(patch)(patch.preprocessing(picture(pixels=32))).softmax(1)[0].tolist()
        store.publish(name, patch)

    def right(answers: dict[str, object]) -> bool:
        return set(answers) == set(truth) and all(
            close(guess["probability"], truth[name][guess["index"]])
            for name, answer in answers.items()
            for guess in answer["top"]  # type: ignore[index]
        )

    back = []
    with deployed(store) as (running, url):
        first = replicas(running.pid)
        assert len(first) == 2
        with Traffic(url, right) as traffic:
            wait_until(lambda: traffic.counts["right"] >= 20)
            for victim in first:  # the second is killed once there is another in the place of the first
                os.kill(victim, signal.SIGKILL)
                start, before = time.monotonic(), traffic.counts["right"]
                wait_until(lambda: traffic.counts["right"] >= before + 20)  # noqa: B023
                wait_until(lambda: len(replicas(running.pid) - {victim}) == 2 and ready(url, running.pid))  # noqa: B023
                back.append(time.monotonic() - start)
                failed = len(traffic.failures)
                after = traffic.counts["right"]
                wait_until(lambda: traffic.counts["right"] >= after + 20)  # noqa: B023
                assert len(traffic.failures) == failed, "requests failed after the other replica had taken over"
        everything = descendants(running.pid)
        with ThreadPoolExecutor(8) as pool, Client(url, retries=0) as client:
            asked = [pool.submit(client.predict, [picture(n, 64)] * 16, ["flowers", "base"]) for n in range(8)]
            time.sleep(0.5)
            running.send_signal(signal.SIGTERM)
            start = time.monotonic()
            outcomes = [future.exception() for future in asked]
        assert running.wait(300) == 0
        stopping = time.monotonic() - start
        # those that reached a replica are answered; for those that came later there is no application
        assert all(error is None or getattr(error, "status", 0) == 404 for error in outcomes)
        assert None in outcomes
        wait_until(lambda: not any(map(alive, everything)))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz", timeout=2)
    assert traffic.counts["wrong"] == 0
    assert len(traffic.failures) <= 2 * 4, "more failed than could have been in flight"
    told(
        "killed replica",
        kills=2,
        right=traffic.counts["right"],
        wrong=traffic.counts["wrong"],
        failed=[said for _, said in traffic.failures],
        seconds_to_replace=[round(seconds, 1) for seconds in back],
        seconds_to_stop=round(stopping, 1),
        processes_left=0,
    )


def ready(url: str, pid: int) -> bool:
    """Whether the service is ready and no replica is being made: Ray writes what an actor does behind its name."""
    return httpx.get(f"{url}/readyz", timeout=30).is_success and not any(
        command_of(found).endswith(b"__init__") for found in replicas(pid)
    )


def test_nothing_outlives_a_deploying_process_that_is_killed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish("flowers", draft_patch(load_backbone("bundled:tiny"), ScaleBias()))
    with deployed(store) as (running, _):
        everything = descendants(running.pid)
        assert len(everything) > 4
        running.kill()
        wait_until(lambda: not any(map(alive, everything)), 120)  # its agents look for their Ray for a minute

"""Replicas on Ray Serve: one is killed, and the service goes on. Takes a minute, so only with MODELPATCH_LONG=1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import picture, wait_until

from conftest import draft_patch
from modelpatch.backbone import load_backbone
from modelpatch.methods import ScaleBias
from modelpatch.patch import Store
from modelpatch.serve import Client

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.skipif(os.environ.get("MODELPATCH_LONG") != "1", reason="a long test: set MODELPATCH_LONG=1")


def replicas() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::ServeReplica:modelpatch" in path.read_bytes():
                found.add(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_killed_replica_is_replaced_while_the_other_answers(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish("flowers", draft_patch(load_backbone("bundled:tiny"), ScaleBias()))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modelpatch", "serve", store.url, "-b", "bundled:tiny", "--no-tune", "--ray"]
    before = replicas()
    running = subprocess.Popen([*command, "--port", str(port)])
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            wait_until(client.ready, 180)
            client.predict([picture()], ["flowers"])
            killed = min(replicas() - before)
            os.kill(killed, signal.SIGKILL)
            start = time.monotonic()
            for _ in range(20):
                client.predict([picture()], ["flowers"])
            assert time.monotonic() - start < 60
            wait_until(lambda: len(replicas() - before) == 2, 120)
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(120)

"""A server over a tiny network and a store of drafted patches, in a thread of this process or in processes of its own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.cascade import Cascade
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.serve.app import create_app
from modelpatch.serve.client import Client
from modelpatch.serve.protocol import GuardedProtocol
from modelpatch.serve.run import bind
from modelpatch.serve.service import Service
from modelpatch.serve.settings import Settings
from modelpatch.store.store import Store

TOKEN = "a-token-for-tests"
METHODS = {"flowers": ScaleBias(), "birds": Subset(), "signs": LinearProbe(), "full": FullFinetune()}


@dataclass
class Serving:
    url: str
    service: Service
    store: Store
    backbone: Backbone

    def client(self, token: str | None = TOKEN, **options: object) -> Client:
        return Client(self.url, token=token, **options)  # type: ignore[arg-type]

    def truth(self, patch: Patch, image: bytes) -> list[float]:
        """The probabilities of the patch alone."""
        images = patch.preprocessing(image)
        return self.backbone.patched(patch)(images).softmax(1)[0].tolist()


@contextmanager
def serving(
    store: Store,
    backbone: Backbone | None = None,
    cascades: Mapping[str, Cascade] | None = None,
    **settings: object,
) -> Iterator[Serving]:
    """A server in a thread of this process on a free port."""
    backbone = backbone or network()
    limits = Settings(**{"token": TOKEN, "refresh": 0.05, **settings})  # type: ignore[arg-type]
    service = Service(store, backbone, limits, cascades=cascades)
    service.admission.wrong_keys.MOST = 0.01
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), http=GuardedProtocol, log_level="warning", lifespan="on", ws="none")
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    port = listening.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        with Client(url) as client:
            wait_until(client.ready)
        yield Serving(url, service, store, backbone)
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()


def wait_until(ready: Callable[[], bool], seconds: float = 300.0) -> float:
    """Wait until `ready()` is true, however slow the machine is. Returns the seconds it took."""
    start = time.monotonic()
    while not ready():
        assert time.monotonic() - start < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - start


@cache
def network(seed: int = 0) -> Backbone:
    """The tiny network, loaded once: loading traces, and while one thread traces none may compute."""
    return make_tiny(seed)


@cache
def drafts() -> dict[str, Patch]:
    """Patches of several methods for the tiny network."""
    return {
        name: draft_patch(network(), method, classes=3 + seed, seed=seed)
        for seed, (name, method) in enumerate(METHODS.items())
    }


def fill(folder: Path) -> Store:
    """A store of the drafts."""
    filled = Store(folder)
    for name, patch in drafts().items():
        filled.publish(name, patch)
    return filled


def damage(store: Store, name: str) -> None:
    """Flip a byte of the copy that one name has."""
    version = store.resolve(name)
    (file,) = (
        path
        for path in Path(store.url).rglob("*")
        if name in path.parts and version.hash in path.name and path.stat().st_size == version.nbytes
    )
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


def picture(seed: int = 0, pixels: int = 16, kind: str = "PNG") -> bytes:
    """An encoded image of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


@contextmanager
def process(store: Store, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`modelpatch serve` as a process of its own, and where it listens."""
    command = [sys.executable, "-m", "modelpatch", "serve", store.url, "-b", "bundled:tiny", "--port", "0"]
    running = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    try:
        assert running.stdout is not None
        url = running.stdout.readline().strip()
        assert url.startswith("http://"), url
        with Client(url) as client:
            wait_until(client.ready)
        yield running, url
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)
        running.wait(300)
        assert running.stdout is not None
        running.stdout.close()


def children(pid: int) -> list[int]:
    """Process ids of a process' children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def close(given: float, expected: float) -> bool:
    return bool(torch.isclose(torch.tensor(given), torch.tensor(expected), atol=2e-5))


def told(what: str, **counts: object) -> None:
    """Say the counts of a long run, and keep them where `MODELPATCH_COUNTS` says."""
    line = json.dumps({what: counts})
    print(line)
    if path := os.environ.get("MODELPATCH_COUNTS"):
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

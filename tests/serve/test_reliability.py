"""What must hold while much goes wrong at once. `MODELPATCH_LONG=1` runs the counts of docs/reliability.md, else a share."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from conftest import draft_patch
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch, encode_patch
from modelpatch.serve.client import Client
from modelpatch.serve.problems import Problem
from modelpatch.store.store import Store
from serving import Serving, alive, children, close, drafts, fill, network, picture, process, serving, told, wait_until

pytestmark = pytest.mark.service

LONG = os.environ.get("MODELPATCH_LONG") == "1"


class Traffic:
    """Clients that ask one question over and over, and remember every answer and failure."""

    def __init__(self, server: Serving, names: list[str], clients: int = 2) -> None:
        self.answers: list[dict[str, object]] = []
        self.failures: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server, names)) for _ in range(clients)]

    def _ask(self, server: Serving, names: list[str]) -> None:
        image = picture()
        with server.client(retries=0) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(client.ask([image], names, top=1)["images"][0]["answers"])
                except Exception as error:
                    self.failures.append(error)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


# loads ------------------------------------------------------------------------------------------------------


def bad_patch(number: int, good: Patch) -> tuple[Patch, Callable[[Path], None]]:
    """A patch to publish and what happens to its file afterwards: damaged, gone, of another backbone, of wrong shapes."""
    own = replace(good, created={"number": number})
    match number % 4:
        case 0:
            return own, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        case 1:
            return own, lambda path: path.unlink()
        case 2:
            return replace(draft_patch(network(1), LinearProbe()), created={"number": number}), lambda path: None
    name = next(name for name in own.tensors if not name.startswith("head."))
    return replace(own, tensors={**own.tensors, name: torch.ones(1, 1)}), lambda path: None


def test_bad_loads_under_traffic_hurt_nobody(tmp_path: Path) -> None:
    count = 1000 if LONG else 40
    network(1)
    store = fill(tmp_path / "store")
    good = drafts()
    for number in range(count):
        patch, harm = bad_patch(number, good["flowers"])
        version = store.publish(f"bad{number}", patch)
        harm(next(path for path in (tmp_path / "store").rglob(f"*{version.hash}*") if path.read_bytes()[8:9] == b"{"))
    room = sum(max(len(encode_patch(patch)), 1) for patch in good.values()) + 40_000
    statuses: Counter[int] = Counter()
    with serving(store, cache_bytes=room) as server, server.client(retries=0) as client:
        client.predict([picture()], list(good))
        healthy = set(server.service.cache.sizes)
        with Traffic(server, list(good)) as traffic:
            for number in range(count):
                with pytest.raises(Problem) as refusal:
                    client.predict([picture()], [f"bad{number}"])
                statuses[refusal.value.status] += 1
            wait_until(lambda: len(traffic.answers) > 5)
        assert not traffic.failures
        assert set(server.service.cache.sizes) == healthy
        assert b"modelpatch_evictions_total 0.0" in server.service.metrics.text()
    assert statuses.keys() <= {404, 409, 422}
    assert statuses[409] == count // 4
    told("bad loads", loads=count, statuses=dict(statuses), good=len(traffic.answers), failed=len(traffic.failures))


def test_swaps_under_load_give_the_old_or_the_new_version_exactly(store: Store) -> None:
    count = 200 if LONG else 6
    image = picture()
    known: dict[str, float] = {}
    backbone = network()
    with serving(store) as server, server.client() as client:

        def publish(seed: int) -> None:
            patch = draft_patch(backbone, (ScaleBias(), Subset())[seed % 2], classes=3, seed=100 + seed)
            truth = max(server.truth(patch, image))
            known[client.publish("flowers", patch)["version"]] = truth

        publish(0)
        with Traffic(server, ["flowers"], clients=4) as traffic:
            for swap in range(1, count + 1):
                before = len(traffic.answers)
                publish(swap)
                wait_until(lambda before=before: len(traffic.answers) > before + 4)
        assert not traffic.failures
        seen = {}
        for answer in traffic.answers:
            found = answer["flowers"]
            assert close(found["top"][0]["probability"], known[found["version"]])  # type: ignore[index]
            seen[found["version"]] = None  # type: ignore[index]
        assert len(seen) > 2
    told("swaps", swaps=count, answers=len(traffic.answers), versions=len(seen), wrong=0)


def test_a_small_cache_under_many_patches_and_clients_never_mixes_them_up(tmp_path: Path) -> None:
    patches, clients, requests = (64, 16, 20_000) if LONG else (24, 16, 320)
    store = Store(tmp_path / "many")
    image = picture()
    backbone = network()
    made = {f"task{n}": draft_patch(backbone, ScaleBias(), classes=4, seed=n) for n in range(patches)}
    for name, patch in made.items():
        store.publish(name, patch)
    truth = {n: backbone.patched(p)(p.preprocessing(image)).softmax(1)[0].max().item() for n, p in made.items()}
    assert len({round(value, 5) for value in truth.values()}) > patches // 2
    most = 4 * max(len(encode_patch(patch)) for patch in made.values())
    over = []
    with serving(store, cache_bytes=most, refresh=5) as server:
        names = random.Random(0).choices(list(made), k=requests)

        def ask(part: int) -> int:
            wrong = 0
            with server.client() as client:
                for name in names[part::clients]:
                    found = client.predict([image], [name], top=1)[0][name]
                    wrong += not close(found[0][1], truth[name])
                    if server.service.cache.nbytes > most:
                        over.append(name)
            return wrong

        with ThreadPoolExecutor(clients) as pool:
            wrong = sum(pool.map(ask, range(clients)))
        evictions = server.service.metrics.evictions._value.get()
    assert wrong == 0
    assert not over
    assert evictions > 4
    told("small cache", patches=patches, clients=clients, requests=requests, wrong=wrong, evictions=evictions)


# hostile HTTP -----------------------------------------------------------------------------------------------


def test_a_server_outlives_hostile_http(server: Serving) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    generator = random.Random(0)
    heads = [
        b"",
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000,
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary="
        + b"b" * 60_000
        + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        "PUT /v1/patches/\u202eflowers HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        b"PUT /v1/patches/../../x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET /page/..%2f..%2fapp.py HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ]
    heads += [generator.randbytes(generator.randrange(1, 2000)) for _ in range(300 if LONG else 60)]
    held = [socket.create_connection((host, int(port))) for _ in range(50)]  # that say nothing
    for head in heads:
        with socket.create_connection((host, int(port)), timeout=300) as connection:
            try:
                connection.sendall(head)
                connection.settimeout(0.1)
                answer = connection.recv(64)
            except (TimeoutError, ConnectionError):
                continue
            assert not answer.startswith(b"HTTP/1.1 5"), head[:80]
    with server.client() as client:
        assert client.ready()
        assert client.predict([picture()], ["flowers"])
    for connection in held:
        connection.close()


# processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def ordinary(tmp_path: Path) -> Store:
    """A store for the bundled backbone, which processes can load."""
    from modelpatch.backbone.load import load_backbone

    store = Store(tmp_path / "ordinary")
    store.publish("flowers", draft_patch(load_backbone("bundled:tiny"), ScaleBias()))
    return store


def test_a_killed_worker_is_replaced(ordinary: Store) -> None:
    took = []
    with process(ordinary) as (running, url), Client(url, retries=0) as client:
        for _ in range(20 if LONG else 2):
            (worker,) = children(running.pid)
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda killed=worker: children(running.pid) not in ([], [killed]))
            start = time.monotonic()
            wait_until(client.ready)
            took.append(time.monotonic() - start)
        assert client.predict([picture()], ["flowers"])
    told("killed workers", kills=len(took), slowest_seconds=round(max(took), 3))


def test_stopping_finishes_what_runs_closes_the_port_and_leaves_no_process(ordinary: Store) -> None:
    with process(ordinary, "--workers", "2") as (running, url):
        workers = children(running.pid)
        assert len(workers) == 2
        with ThreadPoolExecutor(8) as pool, Client(url, retries=0) as client:
            client.predict([picture()], ["flowers"])
            asked = [pool.submit(client.predict, [picture(n, 64)] * 16, ["flowers", "base"]) for n in range(8)]
            time.sleep(0.1)
            running.send_signal(signal.SIGTERM)
            outcomes = [future.exception() for future in asked]
        assert running.wait(300) == 0
        # those that were accepted are answered; those that came too late were never taken
        assert all(error is None or "cannot be reached" in str(error) for error in outcomes)
        assert any(error is None for error in outcomes)
        assert not any(map(alive, workers))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz", timeout=2)


def test_nothing_outlives_a_killed_parent(ordinary: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with process(ordinary, "--workers", "2") as (running, _):
        workers = children(running.pid)
        (counts,) = tmp_path.glob("modelpatch-metrics-*")
        running.kill()
        wait_until(lambda: not any(map(alive, workers)))
        assert not counts.exists()


def test_gauges_forget_a_worker_that_was_killed(ordinary: Store) -> None:
    with (
        process(ordinary, "--workers", "2") as (running, url),
        Client(url) as client,
        httpx.Client(base_url=url) as http,
    ):

        def files() -> set[int]:
            """The workers whose gauges are kept."""
            with contextlib.suppress(httpx.TransportError):  # the connection may be the killed worker's
                http.get("/metrics")
            return {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*.db")}

        client.predict([picture()], ["flowers"])
        environment = Path(f"/proc/{children(running.pid)[0]}/fd")
        (folder,) = {
            Path(os.readlink(link)).parent for link in environment.iterdir() if os.readlink(link).endswith(".db")
        }
        killed = children(running.pid)[0]
        wait_until(lambda: killed in files())
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in files() and client.ready())

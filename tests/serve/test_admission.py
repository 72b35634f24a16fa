"""Clients that take more than their share: slow bodies, many requests, much at once. Others are answered."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest

import modelpatch.serve.question as question
from modelpatch.serve.admission import WrongKeys
from modelpatch.store.store import Store
from serving import Serving, picture, serving

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.service
HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def slow_bodies(server: Serving, count: int) -> Iterator[list[socket.socket]]:
    """Connections whose requests have begun and do not end."""
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)), timeout=300)) for _ in range(count)]
        for one in opened:
            one.sendall(HEAD % 1024 + b"x")
        until = time.monotonic() + 300
        while server.service.admission.arrived < count and time.monotonic() < until:
            time.sleep(0.01)
        yield opened


def ask(server: Serving, **transport: object) -> int:
    with httpx.Client(base_url=server.url, transport=httpx.HTTPTransport(**transport), timeout=300) as http:
        answer = http.post("/v1/predict?tasks=signs", content=picture(), headers={"content-type": "image/png"})
    return int(answer.status_code)


def test_bodies_that_arrive_slowly_take_no_place_among_those_that_are_answered(store: Store) -> None:
    with serving(store, requests=1) as server, slow_bodies(server, 8):
        assert [ask(server) for _ in range(3)] == [200] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address of their own")
def test_an_address_with_too_many_requests_is_refused_and_others_are_not(store: Store) -> None:
    with serving(store, per_client=2) as server:
        with slow_bodies(server, 2):
            assert ask(server) == 429
            assert ask(server, local_address="127.0.0.2") == 200
        until = time.monotonic() + 300
        while server.service.admission.clients and time.monotonic() < until:
            time.sleep(0.01)
        assert ask(server) == 200


def test_a_body_that_drips_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store) as server, slow_bodies(server, 1) as (slow,):
        monkeypatch.setattr(question, "PATIENCE", 0.0)
        monkeypatch.setattr(question, "SLOWEST", 10**9)
        slow.sendall(b"x")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_bodies_together_have_a_limit_and_are_forgotten_when_they_are_answered(store: Store) -> None:
    with (
        serving(store, arriving_bytes=50_000, patch_bytes=25_000) as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
    ):
        for size, status in ((60_000, 429), (24_000, 422), (24_000, 422)):
            answer = http.post("/v1/predict", content=b"x" * size, headers={"content-type": "image/png"})
            assert answer.status_code == status, answer.text
        assert server.service.admission.arrived == 0
        assert "modelpatch_request_bytes 0.0" in http.get("/metrics").text


def test_a_name_that_is_not_the_servers_is_refused(store: Store) -> None:
    with (
        serving(store, hosts=("127.0.0.1", "patches.example.org")) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        for name, status in (("patches.example.org", 200), ("rebound.example.net", 400)):
            answer = http.get("/v1/patches", headers={"Host": name})
            assert answer.status_code == status
        assert "--allowed-host" in answer.json()["advice"]


def test_wrong_keys_of_one_address_wait_longer_and_longer() -> None:
    now = [0.0]
    wrong = WrongKeys(lambda: now[0])
    waits = [wrong.delay("a") for _ in range(20)]
    assert waits[0] == wrong.FIRST
    assert all(later == min(2 * earlier, wrong.MOST) for earlier, later in pairwise(waits))
    assert wrong.delay("b") == wrong.FIRST
    now[0] = wrong.FORGOTTEN + 1
    assert wrong.delay("a") == wrong.FIRST
    for number in range(2 * wrong.ADDRESSES):
        wrong.delay(str(number))
    assert wrong.delay("a") == wrong.FIRST
    assert len(wrong._seen) <= wrong.ADDRESSES

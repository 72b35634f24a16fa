"""Heads without an end, in bytes or in time, end; what is ordinary passes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modelpatch.serve import protocol
from modelpatch.serve.protocol import HEAD_BYTES
from serving import Serving, picture

pytestmark = pytest.mark.service

CHUNKED = (
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@contextmanager
def connected(server: Serving) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        yield connection


def alive(connection: socket.socket) -> bool:
    """The whole answer of `/healthz`."""
    answer = b""
    while not answer.endswith(b'{"status":"alive"}') and (more := connection.recv(65536)):
        answer += more
    return answer.startswith(b"HTTP/1.1 200")


def flood(connection: socket.socket, piece: bytes, most: int) -> tuple[int, bytes]:
    """Send until the server hangs up: the bytes that it took, and its answer."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
            time.sleep(0.001)
    except ConnectionError:
        pass
    try:
        return sent, connection.recv(65536)
    except ConnectionError:
        return sent, b""


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET / HTTP/1.1\r\nA: ", b"b" * 4096),
        (b"GET / HTTP/1.1\r\n", b"b" * 4096),
        (b"GET /", b"a" * 4096),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 700),
        (b"", b"\r\n" * 2048),
        (CHUNKED + b"0\r\nA: ", b"b" * 4096),
        (CHUNKED + b"1;", b"b" * 4096),
    ],
    ids=["value", "name", "url", "headers", "lines", "trailer", "extension"],
)
def test_what_has_no_end_is_hung_up_on_soon(server: Serving, start: bytes, piece: bytes) -> None:
    with connected(server) as connection, server.client() as client:
        connection.sendall(start)
        sent, answer = flood(connection, piece, 10_000_000)
        assert sent < 2_000_000  # what the socket's buffers hold comes on top of the limit
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert client.ready()


def test_a_large_head_is_refused_in_words(server: Serving) -> None:
    for head in (
        b"GET /" + b"a" * HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * HEAD_BYTES + b"\r\n\r\n",
    ):
        with connected(server) as connection:
            connection.sendall(head)
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 431")
            assert b"application/problem+json" in answer


def test_ordinary_requests_pass_whole_or_byte_by_byte_one_after_another(server: Serving) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 30_000 + b"\r\n\r\n"
    with connected(server) as connection:
        for _ in range(4):  # more than the limit together
            connection.sendall(request)
            assert alive(connection)
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":
            connection.sendall(bytes([byte]))
        assert alive(connection)
    with server.client() as client:
        assert client.predict([picture(pixels=400)], ["flowers"])  # a body far above the limit for heads


def test_silence_and_half_a_head_end(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    for before, said, expected in (
        (b"", b"", b""),
        (b"", b"GET / HTTP/1.1\r\nHo", b"HTTP/1.1 408"),
        (request, b"GET /", b"HTTP/1.1 408"),
        (request, b"\r\n", b""),
    ):
        with connected(server) as connection:
            if before:
                connection.sendall(before)
                assert alive(connection)
            connection.sendall(said)
            assert connection.recv(65536)[:12] == expected  # the connection is closed, and not left open for ever
    with connected(server) as connection:
        connection.sendall(request)
        assert alive(connection)
        time.sleep(0.6)  # between requests a connection may rest longer
        connection.sendall(request)
        assert alive(connection)

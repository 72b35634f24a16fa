"""HTTP as uvicorn reads it, within bounds: a head that has no end, in bytes or in seconds, costs nothing.

The parser keeps an unfinished line whole and copies it with every piece that arrives, so a line without end would stop the
event loop; and it waits for the first byte for ever. So bytes that finish nothing are counted (an endless line, chunk
extension or trailer), and those of all lines of a head; and connections whose head is not complete in time are closed.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelpatch.serve.problems import MEDIA_TYPE, Problem

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10.0


class GuardedProtocol(HttpToolsProtocol):
    """Refuses heads above `HEAD_BYTES` with 431 and ends connections whose head takes more than `HEAD_SECONDS`."""

    _timer: asyncio.TimerHandle | None = None
    _lines = 0  # bytes of the request line, headers and trailers that are read of this message
    _unfinished = 0  # bytes in a row that finished nothing
    _heard = False  # whether the parser understood something in the bytes it was given last
    _begun = False  # a head has begun and is not complete
    _between = True  # no body is expected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = False
        super().data_received(data)
        self._unfinished = 0 if self._heard else self._unfinished + len(data)
        if self.transport.is_closing():
            return
        if self._unfinished > HEAD_BYTES:
            self.send_400_response("")
        elif self._begun or (self._between and not self._heard):
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed, or is too large, with a problem, and close the connection."""
        if max(self._lines, self._unfinished) > HEAD_BYTES:
            said = f"The request line and headers are larger than {HEAD_BYTES:,} bytes."
            self._refuse(Problem("head-too-large", said, "Send images in the body."))
        else:
            self._refuse(Problem("bad-request", "This is no HTTP.", "GET /openapi.json describes the routes."))

    def _refuse(self, problem: Problem) -> None:
        body = json.dumps(problem.body()).encode()
        head = (
            f"HTTP/1.1 {problem.status} {problem.body()['title']}\r\nContent-Type: {MEDIA_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._stop_waiting()
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait()  # the head of another request behind the one that is being answered
        elif self._begun:
            late = f"The headers were not complete within {HEAD_SECONDS:g} seconds."
            self._refuse(Problem("too-slow", late, "Send the request faster."))
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._begun, self._between, self._lines = True, True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._heard, self._begun, self._between = True, False, False
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._heard, self._between = True, True
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._heard = True
        self._lines += size
        if self._lines > HEAD_BYTES:
            raise ValueError("the head is too large")

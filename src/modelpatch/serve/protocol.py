"""HTTP as uvicorn reads it, within bounds: a head that has no end, in bytes or in seconds, costs nothing.

The parser keeps an unfinished line whole and copies it with every piece that arrives, so a line without end would stop the
event loop; and it waits for the first byte for ever. So bytes are counted until they complete a head, a piece of a body or a
message (an endless line, trailer or chunk extension does not), and connections that stay in between too long are closed.
"""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelpatch.serve.problems import MEDIA_TYPE, Problem

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10.0


class GuardedProtocol(HttpToolsProtocol):
    """Refuses heads above `HEAD_BYTES` with 431 and ends connections whose head takes more than `HEAD_SECONDS`."""

    _timer: asyncio.TimerHandle | None = None
    _pending = 0  # bytes that completed nothing yet
    _begun = False  # a head has begun and is not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._proceed()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._pending > HEAD_BYTES:
            self.send_400_response("")
        elif self._pending or self._begun:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed, or is too large, with a problem, and close the connection."""
        if self._pending > HEAD_BYTES:
            said = f"The request line and headers are larger than {HEAD_BYTES:,} bytes."
            self._refuse(Problem("head-too-large", said, "Send images in the body."))
        else:
            self._refuse(Problem("bad-request", "This is no HTTP.", "GET /openapi.json describes the routes."))

    def _refuse(self, problem: Problem) -> None:
        body = json.dumps(problem.body()).encode()
        head = (
            f"HTTP/1.1 {problem.status} {problem.title}\r\nContent-Type: {MEDIA_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._proceed()
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _proceed(self) -> None:
        self._pending = 0
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
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_BYTES:
            self._pending = size
            raise ValueError("the head is too large")
        self._begun = False
        self._proceed()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._proceed()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._proceed()
        super().on_message_complete()

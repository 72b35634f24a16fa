"""Bodies of requests, read within limits: bytes are counted as they arrive, independent of the headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.types import Message, Receive

from modelpatch.serve.problems import Problem

SILENCE = 10.0  # seconds without a byte


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises `Problem`: 413 beyond `limit` bytes, 408 where nothing comes for a while."""
    return await Request(request.scope, _counted(request, limit)).body()


@asynccontextmanager
async def read_form(request: Request, limit: int, parts: int) -> AsyncIterator[FormData]:
    """A multipart form of at most `parts` files and as many fields. Raises what `read_body` raises, 400 if it is malformed."""
    counted = Request(request.scope, _counted(request, limit))
    async with counted.form(max_files=parts, max_fields=parts, max_part_size=64 * 1024) as form:
        yield form


def _counted(request: Request, limit: int) -> Receive:
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said[:20]) > limit:
        raise _too_large(limit)
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        try:
            async with asyncio.timeout(SILENCE):
                message = await request.receive()
        except TimeoutError:
            raise Problem("too-slow", f"No byte came for {SILENCE:g} seconds.", "Send the body faster.") from None
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return receive


def _too_large(limit: int) -> Problem:
    return Problem("too-large", f"The body is larger than {limit:,} bytes.", "Send less at once.")

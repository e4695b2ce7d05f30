"""Server-sent events: a response whose body is produced while it is sent; its work ends when the client leaves.

Knows frames and disconnects; nothing about what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from haomiao.errors import CancelledError, EngineError, HaomiaoError
from haomiao.serve.client import Answer
from haomiao.serve.failures import error_body
from haomiao.serve.jsonbody import dump

DONE = b"data: [DONE]\n\n"


def frame(value: Any, event: str | None = None) -> bytes:
    """One event; JSON has no raw newlines, so that one data line is enough."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + dump(value) + b"\n\n"


class EventStream(Response):
    """A streamed answer. `events` yields frames; an error that it raises becomes the last event before [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        answers: list[Answer],
        *,
        last: bytes = DONE,
        failed: Callable[[HaomiaoError], bytes] = lambda error: frame(error_body(error)),
        headers: dict[str, str] | None = None,
    ) -> None:
        self._events = events
        self._answers = answers
        self._last = last
        self._failed = failed
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client leaves."""
        watching = asyncio.create_task(_leave(receive, self._answers))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except CancelledError:
                pass
            except HaomiaoError as error:
                await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
            except Exception as error:
                failure = EngineError(f"{type(error).__name__} while the answer was written")
                await send({"type": "http.response.body", "body": self._failed(failure), "more_body": True})
                raise
            await send({"type": "http.response.body", "body": self._last, "more_body": False})
        finally:
            watching.cancel()
            for answer in self._answers:
                answer.cancel()


async def _leave(receive: Callable[[], Awaitable[Any]], answers: list[Answer]) -> None:
    """Cancel the answers when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for answer in answers:
        answer.cancel()


@asynccontextmanager
async def cancelled_with_client(request: Request, answers: list[Answer]) -> AsyncIterator[None]:
    """For answers that are not streamed: they are cancelled when the client disconnects, and when the block ends."""
    watching = asyncio.create_task(_leave(request.receive, answers))
    try:
        yield
    finally:
        watching.cancel()
        for answer in answers:
            answer.cancel()

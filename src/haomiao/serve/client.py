"""The HTTP process's end of the connection to the engine: requests out, answers in, one queue per request.

Lives on one event loop and never blocks it. Knows nothing about HTTP, nor how the engine process is kept alive.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable

from haomiao.errors import CancelledError, EngineError, HaomiaoError
from haomiao.serve import messages
from haomiao.serve.messages import Done, Fed, FromEngine, Message, Refused, Submit, Token

MAX_BUFFERED = 16384
"""Events of one request that its reader has not taken; more, and the request is cancelled."""


class Answer:
    """One request in flight: an async iterator over `Token` and `Done`. Raises the error of a request that failed."""

    def __init__(self, connection: Connection, request_id: int, samples: int) -> None:
        self.id = request_id
        self._connection = connection
        self._open = samples
        self._waiting: deque[Token | Done] = deque()
        self._news = asyncio.Event()
        self._error: HaomiaoError | None = None

    def __aiter__(self) -> AsyncIterator[Token | Done]:
        return self

    async def __anext__(self) -> Token | Done:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def some(self) -> list[Token | Done]:
        """Everything that is there, waiting for the first; an empty list after the end."""
        try:
            first = await self.__anext__()
        except StopAsyncIteration:
            return []
        rest = list(self._waiting)
        self._waiting.clear()
        return [first, *rest]

    def cancel(self, error: HaomiaoError | None = None) -> None:
        """End the request if it has not ended; idempotent. Whoever waits is told `error`."""
        if self._open and self._error is None:
            self._connection.forget(self.id, tell=True)
            self.fail(error or CancelledError("the request was cancelled"))

    def fail(self, error: HaomiaoError) -> None:
        """The connection's way of saying that nothing more will come."""
        self._error = self._error or error
        self._news.set()

    def push(self, event: Token | Done) -> None:
        """The connection's way of saying what came."""
        self._waiting.append(event)
        if isinstance(event, Done):
            self._open -= 1
            if not self._open:
                self._connection.forget(self.id)
        elif len(self._waiting) > MAX_BUFFERED:
            self.cancel(CancelledError("the client reads too slowly"))
        self._news.set()


class Connection(asyncio.Protocol):
    """The socket to one engine process. `on_message` sees what belongs to no request; `on_lost` is called once."""

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = messages.FrameReader(FromEngine)
        self._answers: dict[int, Answer] = {}
        self._ids = itertools.count(1)
        self._transport: asyncio.Transport | None = None
        self.on_fed: dict[int, Callable[[Fed], None]] = {}
        """By session: who wants to know what was computed of streamed input."""

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._answers)

    def new_id(self) -> int:
        """An id for a request or session, never used before on this connection."""
        return next(self._ids)

    def submit(self, request: Submit) -> Answer:
        """Send a request whose id came from `new_id`. Raises `EngineError` if the engine is gone."""
        return self.expect(request, request)

    def expect(self, request: Submit, carrier: Message) -> Answer:
        """As `submit`, the request being part of another message."""
        samples = request.sampling.n if request.work == "generate" else 1
        answer = Answer(self, request.id, samples)
        self.send(carrier)
        self._answers[request.id] = answer
        return answer

    def send(self, message: Message) -> None:
        """Send any message. Raises `EngineError` if the engine is gone."""
        if self._transport is None or self._transport.is_closing():
            raise EngineError("the engine process ended")
        self._transport.write(messages.encode([message]))

    def forget(self, request_id: int, *, tell: bool = False) -> None:
        """A request has ended, or shall."""
        known = self._answers.pop(request_id, None)
        if known is not None and tell and self._transport is not None and not self._transport.is_closing():
            self._transport.write(messages.encode([messages.Cancel(id=request_id)]))

    def close(self) -> None:
        """Close the socket; the engine process ends by that."""
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._dispatch(message)
        except EngineError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            answer.fail(EngineError("the engine process ended before the answer was complete"))
        self._on_lost()

    def _dispatch(self, message: Message) -> None:
        if isinstance(message, (Token, Done)):
            answer = self._answers.get(message.id)
            if answer is not None:
                answer.push(message)
        elif isinstance(message, Refused) and message.id:
            answer = self._answers.pop(message.id, None)
            if answer is not None:
                answer.fail(message.exception())
        elif isinstance(message, Fed):
            told = self.on_fed.get(message.session)
            if told is not None:
                told(message)
        else:
            self._on_message(message)

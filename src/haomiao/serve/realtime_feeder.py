"""Reading ahead: keeps the engine's session up to what was said on one realtime connection.

Knows the engine's messages and the conversation's tokens; nothing about frames and events.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve.conversation import Reader, common
from haomiao.serve.messages import Close, Fed, Feed

if TYPE_CHECKING:
    from haomiao.serve.realtime import Socket


class Feeder:
    """Keeps the engine's session up to what was said; at most one rendering at a time, of the newest text."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._service = socket.service
        self.reader = Reader(socket.service.prompts, socket.salt)
        self.turn = asyncio.Lock()
        """Held while tokens are sent to the engine, so that positions agree."""
        self._connection: Any = None
        self._session = 0
        self._fed: list[int] = []
        self._computed = 0
        self._news = asyncio.Event()

    def poke(self) -> None:
        """Something was said or changed."""
        self._news.set()

    async def run(self) -> None:
        """Feed for as long as the connection lives. What cannot be fed now is told when an answer is asked for."""
        while True:
            await self._news.wait()
            self._news.clear()
            with contextlib.suppress(HaomiaoError):
                async with self.turn:
                    await self._feed()

    async def _feed(self) -> None:
        socket = self._socket
        if socket.response is not None:
            return
        ids = await self.reader.beginning(
            socket.fields, socket.conversation, socket.form, lambda: socket.response is not None
        )
        if ids is None or socket.response is not None:  # its own prefill computes this, in the step of the first token
            return
        self.open()
        position = common(self._fed, ids)
        if position < len(ids):  # what was fed beyond is still good for an answer, if nothing else is said
            point = socket.fields.point
            salt, session = socket.salt, self._session
            tail = ids[position:]
            self._connection.send(Feed(session=session, position=position, token_ids=tail, salt=salt, point=point))
            self._fed, self._computed = ids, min(self._computed, position)
        elif ids and self._computed >= len(ids):  # it was computed before, and is said to be
            socket.computed(Fed(session=self._session, tokens=len(ids), cached=len(ids)))

    def computed(self, fed: Fed) -> None:
        """The engine has read so far."""
        self._computed = fed.tokens
        self._socket.computed(fed)

    def open(self) -> None:
        """A session with the engine that runs now; a new one if it was restarted. Raises `NotReadyError`."""
        connection = self._service.supervisor.connection()
        if connection is not self._connection:
            self._connection, self._session, self._fed, self._computed = connection, connection.new_id(), [], 0
            connection.on_fed[self._session] = self.computed

    def commit(self, ids: list[int]) -> tuple[Any, int, list[int]]:
        """Before an answer to the prompt `ids`: connection, session, and the ids that the session lacks."""
        self.open()
        position = common(self._fed, ids)
        if position < len(self._fed) or not self._fed:
            salt, point = self._socket.salt, self._socket.fields.point
            feed = Feed(session=self._session, position=position, token_ids=[], salt=salt, point=point)
            self._connection.send(feed)
        self._fed, self._computed = list(ids), len(ids)
        return self._connection, self._session, ids[position:]

    def close(self) -> None:
        """Forget the session."""
        if self._connection is not None:
            self._connection.on_fed.pop(self._session, None)
            with contextlib.suppress(EngineError):
                self._connection.send(Close(session=self._session))

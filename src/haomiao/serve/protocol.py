"""uvicorn's h11 protocol with the limits that it lacks: time for headers, time for readers, and refusals that are JSON.

Knows connections and bytes; nothing about routes. Header bytes are bounded by h11 (incomplete headers) and by `guard`
(complete ones).
"""

from __future__ import annotations

import asyncio
import sys
import time
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from haomiao.serve.failures import HttpError, error_body, status_of
from haomiao.serve.jsonbody import dump
from haomiao.serve.settings import Limits

LINGER_SECONDS = 2.0
"""How long a body that was refused is still read (and dropped), so that the client sees the answer, not a reset."""


class LimitedProtocol(H11Protocol):
    """One connection. `limits` is set by `make_protocol`."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = dict(self.app_state)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_timer = self.loop.call_later(self.limits.receive_seconds, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_timer, self._stall_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.app_state["accepted_ns"] = time.monotonic_ns()  # copied into the scope of a request that begins here
        if self.conn.their_state is h11.IDLE and self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.limits.receive_seconds, self._headers_late)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_headers_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_headers_timer()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what h11 refuses, as our error object; h11 says when it was the headers' size."""
        refused = sys.exc_info()[1]
        if isinstance(refused, h11.RemoteProtocolError) and refused.error_status_hint == 431:
            error = HttpError(431, f"the headers are larger than {self.limits.header_bytes} bytes")
        else:
            error = HttpError(400, "this is not HTTP", code="invalid_http")
        self._refuse(error)

    def _headers_late(self) -> None:
        self._headers_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            if self.conn.trailing_data[0]:
                self._refuse(HttpError(408, f"no complete headers within {self.limits.receive_seconds:g} s"))
            else:
                self.transport.close()

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _refuse(self, error: HttpError) -> None:
        """Answer without an application, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        body, status = dump(error_body(error)), status_of(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(status).phrase.encode()
        for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()


def make_protocol(limits: Limits) -> type[LimitedProtocol]:
    """The class that uvicorn makes connections of."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})

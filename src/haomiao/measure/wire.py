"""One HTTP request, timed: a raw asyncio client that notes the moment at which every piece of the response arrived.

Moments are monotonic nanoseconds, taken in the callback that receives the bytes, before anything is parsed; the body is
read when the response has ended, so that the client disturbs what it measures as little as it can. Connections are kept
open and used again. Knows nothing about models.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from haomiao.errors import InputError

MAX_BODY = 64 << 20


@dataclass(slots=True)
class Response:
    """What came back, and when. `moments_ns[i]` is when `pieces[i]` arrived."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    moments_ns: list[int] = field(default_factory=list)
    sent_ns: int = 0
    """When the request's last byte was given to the kernel."""
    head_ns: int = 0
    end_ns: int = 0
    error: str | None = None
    """Why there is no whole response; None if it is whole."""

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    tls: bool
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """From `http://host:port[/prefix]`. Raises `InputError`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"{url!r:.120} is not a URL: {error}", param="server") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InputError(f"{url!r:.120} is not http://host:port or https://host:port", param="server")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))


class _Exchange(asyncio.Protocol):
    """One connection; one request at a time on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reader = h11.Connection(h11.CLIENT)
        self.response = Response()
        self.done: asyncio.Future[None] | None = None
        self._bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def start(self, request: h11.Request, body: bytes) -> asyncio.Future[None]:
        """Send, and return what is done when the response has ended."""
        assert self.transport is not None
        self.done = asyncio.get_running_loop().create_future()
        self.response = Response()
        self._bytes = 0
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.reader.send(event) or b"" for event in events))
        self.response.sent_ns = time.monotonic_ns()
        return self.done

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self.done is None or self.done.done():
            return
        try:
            self.reader.receive_data(data)
            self._read(now)
        except h11.RemoteProtocolError as error:
            self._end(now, f"not HTTP: {error}" if data else "the connection ended: closed by the server")

    def _read(self, now: int) -> None:
        while True:
            event = self.reader.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Response):
                self.response.status = event.status_code
                self.response.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in event.headers}
                self.response.head_ns = now
            elif isinstance(event, h11.Data):
                self._bytes += len(event.data)
                if self._bytes > MAX_BODY:
                    self._end(now, f"a response of more than {MAX_BODY >> 20} MiB")
                    return
                self.response.pieces.append(bytes(event.data))
                self.response.moments_ns.append(now)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                self._end(now, None)
                return

    def eof_received(self) -> None:
        self.data_received(b"")  # the end of a response without a length

    def connection_lost(self, error: Exception | None) -> None:
        self._end(time.monotonic_ns(), f"the connection ended: {error or 'closed by the server'}")

    def _end(self, now: int, error: str | None) -> None:
        if self.done is not None and not self.done.done():
            self.response.end_ns = now
            self.response.error = error
            self.done.set_result(None)

    def reusable(self) -> bool:
        """True if another request may follow; the parser is then ready for it."""
        if self.transport is None or self.transport.is_closing() or self.response.error is not None:
            return False
        if self.reader.our_state is not h11.DONE or self.reader.their_state is not h11.DONE:
            return False
        self.reader.start_next_cycle()
        return True


class Client:
    """Connections to one server. `post` may be called by many tasks at once."""

    def __init__(self, url: str, *, api_key: str | None = None, tls_verify: bool = True) -> None:
        self.address = Address.of(url)
        self._idle: list[_Exchange] = []
        self._tls: ssl.SSLContext | None = None
        if self.address.tls:
            self._tls = ssl.create_default_context()
            if not tls_verify:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        self._fixed = [("Host", f"{host}:{self.address.port}"), ("User-Agent", "haomiao-bench")]
        if api_key:
            self._fixed.append(("Authorization", f"Bearer {api_key}"))

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> Response:
        """Send and wait for the end, at most `timeout_s`. Never raises for what the server or the network does: the
        response's `error` says it. Cancelling the task, like the timeout, closes the connection: the client hung up."""
        given = dict(headers or {})
        if body:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        request = h11.Request(method=method, target=self.address.prefix + path, headers=[*self._fixed, *given.items()])
        exchange: _Exchange | None = None
        try:
            async with asyncio.timeout(timeout_s):
                exchange = await self._exchange()
                await exchange.start(request, body)
        except TimeoutError:
            if exchange is None:
                return Response(end_ns=time.monotonic_ns(), error="no connection in time")
            exchange.response.end_ns = time.monotonic_ns()
            exchange.response.error = "gave up"
        except OSError as error:
            return Response(end_ns=time.monotonic_ns(), error=f"no connection: {error.strerror or error}")
        finally:
            if exchange is not None and exchange.transport is not None:
                if exchange.done is not None and exchange.done.done() and exchange.reusable():
                    self._idle.append(exchange)
                else:
                    exchange.transport.abort()
        return exchange.response

    async def _exchange(self) -> _Exchange:
        while self._idle:
            exchange = self._idle.pop()
            if exchange.transport is not None and not exchange.transport.is_closing():
                return exchange
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Exchange, self.address.host, self.address.port, ssl=self._tls)
        return made

    async def get_json(self, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON that a GET gives, None if it gives none."""
        import msgspec

        response = await self.request("GET", path, timeout_s=timeout_s)
        if response.error is not None or response.status != 200:
            return None
        try:
            return msgspec.json.decode(response.body)
        except msgspec.DecodeError:
            return None

    def close(self) -> None:
        """Close what is idle."""
        for exchange in self._idle:
            if exchange.transport is not None:
                exchange.transport.abort()
        self._idle.clear()

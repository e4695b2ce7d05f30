"""What stands before every route: keys, rates, sizes, the queue, draining; and after it: the log line and the counters.

An ASGI middleware. Knows no body and no model.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from haomiao.errors import HaomiaoError, NotReadyError, OverloadError
from haomiao.serve import logs
from haomiao.serve.failures import HttpError, error_response
from haomiao.serve.settings import Settings, is_loopback

if TYPE_CHECKING:
    from haomiao.serve.service import Service

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset(["/", "/health", "/ready", "/favicon.ico"])
OPEN_FOLDER = "/page/"
"""Routes that need no key; everything else does, those that do not exist included."""
MAX_CLIENTS = 4096
_SALT = secrets.token_bytes(32)


class Keys:
    """API keys, compared in constant time: by their digests, every one of them, whatever matches."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [self._digest(key.encode()) for key in keys]

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.blake2b(key, key=_SALT, digest_size=32).digest()

    @property
    def wanted(self) -> bool:
        """True if requests need one."""
        return bool(self._digests)

    def check(self, authorization: bytes) -> bytes:
        """The salt of the key in a header `Bearer KEY`, under which its prefixes are cached: prefixes of one key are
        never used for another. Raises `HttpError` 401. Without keys everyone shares the empty salt."""
        if not self._digests:
            return b""
        scheme, _, key = authorization.partition(b" ")
        given = self._digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            missing = not authorization
            raise HttpError(401, "an API key is needed: Authorization: Bearer KEY" if missing else "wrong API key")
        return given


class Rates:
    """Token buckets by client: `per_minute` requests, as many at once as fall into ten seconds; None: no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._rate = (per_minute or 0.0) / 60.0
        self._burst = max(1.0, (per_minute or 0.0) / 6.0)
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def check(self, scope: Scope) -> None:
        """Take one for the client of a request or WebSocket: its key, else its address. Raises `HttpError` 429."""
        if self.per_minute is None:
            return
        client = scope["state"].get("salt") or str((scope.get("client") or ("",))[0]).encode()
        wait = self.take(client, time.monotonic())
        if wait:
            limited = HttpError(429, f"more than {self.per_minute:g} requests a minute")
            limited.retry_after_ms = wait * 1e3
            raise limited

    def take(self, client: bytes, now: float) -> float:
        """0 if the request may pass, else the seconds to wait."""
        tokens, then = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[client] = (tokens - 1.0 if allowed else tokens, now)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._rate


class Guard:
    """The middleware."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service
        limits = service.settings.limits
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or one WebSocket (which is only checked: its route counts and logs itself)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state.setdefault("accepted_ns", time.monotonic_ns())
        state["request_id"] = request_id = "req-" + secrets.token_hex(8)
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send, headers)
            return
        started, status = state["accepted_ns"], 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        working = scope["method"] == "POST"
        counted = False
        try:
            try:
                self._check(scope, headers)
                if working:
                    self._admit(scope)
                    self._service.in_flight += 1
                    counted = True
                await self._app(scope, receive, watched)
                self._service.sent(started, state.get("facts", {}))
            except HaomiaoError as error:
                if status:
                    raise
                await error_response(error)(scope, receive, watched)
        finally:
            if counted:
                self._service.done()
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self._service.metrics.http.labels(path, str(status)).inc()
            if working or status >= 400:
                logs.event(
                    "request",
                    id=request_id,
                    method=scope["method"] if scope["method"] in _METHODS else "other",
                    route=path,
                    status=status,
                    ms=round((time.monotonic_ns() - started) / 1e6, 3),
                    **state.get("facts", {}),
                )

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self._limits.header_bytes:
            raise HttpError(431, f"the headers are larger than {self._limits.header_bytes} bytes")
        check_host(self._service.settings, headers)
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return
        scope["state"]["salt"] = self._service.keys.check(headers.get(b"authorization", b""))

    def _admit(self, scope: Scope) -> None:
        service = self._service
        if service.draining:
            raise NotReadyError("the server is stopping")
        if service.in_flight >= self._limits.queue:
            error = OverloadError(f"{self._limits.queue} requests are in flight already", code="queue_full")
            error.retry_after_ms = 1000.0
            raise error
        service.rates.check(scope)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        """The handshake of a WebSocket is refused with an HTTP status."""
        try:
            check_host(self._service.settings, headers)
            check_origin(self._service.settings, headers)
            scope["state"]["salt"] = self._service.keys.check(websocket_key(headers))
            if self._service.draining:
                raise NotReadyError("the server is stopping")
        except HaomiaoError as error:
            await refuse_websocket(error, send)
            return
        await self._app(scope, receive, send)


_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])


def check_host(settings: Settings, headers: dict[bytes, bytes]) -> None:
    """A server on loopback without a key answers only to its own names: otherwise a page that a browser got from
    elsewhere could reach it through a DNS name that points here. Raises `HttpError` 403."""
    if settings.api_keys or not is_loopback(settings.host) or settings.insecure:
        return
    host = headers.get(b"host", b"localhost").decode("latin-1").strip().lower()
    name = urlsplit("//" + host).hostname if not host.startswith("/") else None
    if name is None or not is_loopback(name):
        raise HttpError(403, "this server answers only to localhost (give --api-key to serve other names)")


def check_origin(settings: Settings, headers: dict[bytes, bytes]) -> None:
    """A browser's Origin must be the server's own, or one of --origin. Raises `HttpError` 403."""
    origin = headers.get(b"origin")
    if origin is None:
        return
    text = origin.decode("latin-1").strip().lower()
    own = headers.get(b"host", b"").decode("latin-1").strip().lower()
    if text in (f"http://{own}", f"https://{own}") or text in settings.origins:
        return
    raise HttpError(403, "this Origin is not allowed")


def websocket_key(headers: dict[bytes, bytes]) -> bytes:
    """The Authorization of a WebSocket: the header, or, from a browser, the subprotocol that OpenAI's clients use."""
    given = headers.get(b"authorization")
    if given is not None:
        return given
    for protocol in headers.get(b"sec-websocket-protocol", b"").split(b","):
        name = protocol.strip()
        if name.startswith(b"openai-insecure-api-key."):
            return b"Bearer " + name.removeprefix(b"openai-insecure-api-key.")
    return b""


async def refuse_websocket(error: HaomiaoError, send: Send) -> None:
    """Answer a handshake with an error instead of an upgrade."""
    response = error_response(error)
    await send(
        {
            "type": "websocket.http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "websocket.http.response.body", "body": response.body})

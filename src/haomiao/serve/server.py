"""Runs a server: binds the port, serves at once, loads the model meanwhile, and drains when it is told to stop.

Knows uvicorn and signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from haomiao.errors import InputError, UnavailableError
from haomiao.serve import logs
from haomiao.serve.app import make_app
from haomiao.serve.messages import Hello
from haomiao.serve.protocol import make_protocol
from haomiao.serve.service import Service
from haomiao.serve.settings import Settings

WEBSOCKET_BYTES = 1 << 20
SWITCH_SECONDS = 0.0005
"""After so long a thread that computes in Python lets another one go on; Python's own 5 ms would be a whole refusal."""


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `InputError` with one line that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is said; else answers wait 40 ms for the client's ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UnavailableError(f"port {port} of {host} is in use: choose another --port", param="port") from None
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}", param="host") from None
    return listener


def serve(settings: Settings, *, announce: Callable[[str, Hello], None] | None = None) -> int:
    """Serve until told to stop. Returns the exit code; raises why the model cannot be served."""
    settings.check()
    if settings.tls_cert is not None:
        _check_tls(settings.tls_cert, settings.tls_key)
    listener = bind(settings.host, settings.port)
    logs.configure(settings.log_level)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.setswitchinterval(SWITCH_SECONDS)
    return asyncio.run(_Running(settings, listener, announce).run())


def _check_tls(cert: str, key: str | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the TLS certificate and key cannot be used: {error}", param="tls_cert") from error


def config_of(settings: Settings, service: Service) -> uvicorn.Config:
    """uvicorn's settings, with our limits."""
    return uvicorn.Config(
        make_app(service),
        loop="asyncio",
        http=make_protocol(settings.limits),
        ws="websockets-sansio",
        ws_max_size=WEBSOCKET_BYTES,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.limits.header_bytes,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


class _Running:
    """One server while it runs."""

    def __init__(
        self, settings: Settings, listener: socket.socket, announce: Callable[[str, Hello], None] | None
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._announce = announce
        self._stop = asyncio.Event()
        self._signals = 0

    async def run(self) -> int:
        service = Service(self._settings)
        self._service = service
        server = QuietServer(config_of(self._settings, service))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)
        await service.start()
        serving = loop.create_task(server._serve([self._listener]))
        loading = loop.create_task(self._load(service))
        stopping = loop.create_task(self._stop.wait())
        try:
            await asyncio.wait((serving, loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()  # raises why the model cannot be served
                await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            began = time.monotonic()
            drained = await service.drain()
            logs.event("drained" if drained else "drain ended early", seconds=round(time.monotonic() - began, 3))
        finally:
            loading.cancel()
            server.should_exit = True
            server.force_exit = True
            with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(serving, 1.5)
            await service.stop()
        return 0

    async def _load(self, service: Service) -> None:
        hello = await service.ready()
        if self._announce is not None:
            scheme = "https" if self._settings.tls_cert else "http"
            host, port = self._listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._announce(f"{scheme}://{shown}:{port}", hello)

    def _told(self, number: int) -> None:
        """The first signal drains, the second ends everything at once."""
        self._signals += 1
        if self._signals == 1:
            self._service.draining = True
            self._stop.set()
            return
        self._service.supervisor.kill_now()
        sys.stderr.flush()
        os._exit(128 + number)


def read_template(path: str) -> str:
    """A chat template from a file. Raises `InputError`."""
    try:
        data = Path(path).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template: {path} is not UTF-8 text", param="chat_template") from error
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"--chat-template: cannot read {path}: {why}", param="chat_template") from error

"""Keeps one engine process alive: starts it, watches its pulse, starts it again, and gives up when that does not help.

Lives on the event loop of the HTTP process. Knows nothing about requests but how many are in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from haomiao.errors import EngineError, HaomiaoError, NotReadyError
from haomiao.serve import messages
from haomiao.serve.client import Connection
from haomiao.serve.messages import Hello, Loading, Message, Open, Refused, Stats
from haomiao.serve.settings import Limits, Settings

State: TypeAlias = Literal["starting", "ready", "restarting", "broken", "stopped"]
TICK_SECONDS = 0.25
CONNECT_SECONDS = 60.0
"""From the start of a process to its connection; loading the model comes after that and takes what it takes."""
_log = logging.getLogger("haomiao.serve")


class Watchdog:
    """Judges the pulse. Arithmetic on times that are given; knows no clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._steps = -1
        self._since: float | None = None
        self._heard: float | None = None

    def pulse(self, now: float, stats: Stats) -> None:
        """The engine says how it is."""
        if not stats.busy or stats.steps != self._steps:
            self._since = None
        elif self._since is None:
            self._since = now
        self._steps = stats.steps
        self._heard = now

    def hangs(self, now: float) -> bool:
        """True if it is busy and took no step for too long, or is silent altogether."""
        silent = self._heard is not None and now - self._heard >= self.seconds
        return silent or (self._since is not None and now - self._since >= self.seconds)


class Breaker:
    """Counts crashes: too many within a while, and nothing is started for as long."""

    def __init__(self, crashes: int, seconds: float) -> None:
        self._times: deque[float] = deque(maxlen=crashes)
        self._seconds = seconds

    def crash(self, now: float) -> None:
        """One more."""
        self._times.append(now)

    def open_until(self, now: float) -> float | None:
        """When the next start is allowed; None: now."""
        full = len(self._times) == self._times.maxlen
        if not full or self._times[-1] - self._times[0] >= self._seconds:
            return None
        until = self._times[-1] + self._seconds
        return until if now < until else None


class Supervisor:
    """The engine process and its connection. `hello` says what the model is, once it is known; it stays while the
    engine is started again."""

    def __init__(self, settings: Settings, command: Sequence[str] | None = None) -> None:
        """`command` starts an engine process, given the socket's path as one more argument; None: our own."""
        self._settings = settings
        self._command = tuple(command or (sys.executable, "-P", "-m", "haomiao.serve.engine_process"))
        self._limits: Limits = settings.limits
        self.state: State = "starting"
        self.hello: Hello | None = None
        self.stats = Stats(steps=0, busy=False)
        self.loading = Loading(what="starting")
        self.failure: HaomiaoError | None = None
        """Why the model cannot be loaded at all; nothing is tried again after that."""
        self.crashes = 0
        self.on_ready: Callable[[Hello], None] | None = None
        self._breaker = Breaker(self._limits.crashes, self._limits.crash_seconds)
        self._watchdog = Watchdog(self._limits.watchdog_seconds)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._lost = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine, or None."""
        return None if self._process is None else self._process.pid

    def connection(self) -> Connection:
        """The way to an engine that is ready. Raises `NotReadyError` if it is not."""
        if self.state == "ready" and self._connection is not None:
            return self._connection
        said = {
            "starting": f"the model is being loaded ({self.loading.what})",
            "restarting": "the engine is being started again",
            "broken": "the engine crashed too often and is left alone for a while",
            "stopped": "the server is stopping",
        }
        error = NotReadyError(said.get(self.state, "the engine is not ready"))
        error.retry_after_ms = self._limits.crash_seconds * 1e3 if self.state == "broken" else 1000.0
        raise error

    async def start(self) -> None:
        """Begin: returns at once, while the model is being loaded."""
        self._directory = Path(tempfile.mkdtemp(prefix="haomiao-"))  # 0700
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, path=str(self._directory / "engine"))
        self._task = loop.create_task(self._run())

    async def ready(self) -> Hello:
        """Wait until the model is loaded. Raises why it cannot be."""
        while self.state != "ready" or self.hello is None:
            if self.failure is not None:
                raise self.failure
            self._changed.clear()
            await self._changed.wait()
        return self.hello

    async def stop(self) -> None:
        """End the engine and clean up; idempotent."""
        self._set("stopped")
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._end_process()
        if self._server is not None:
            self._server.close()
        self.remove_directory()

    def kill_now(self) -> None:
        """For an immediate exit: nothing is waited for."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self.remove_directory()

    def remove_directory(self) -> None:
        """Remove the socket's directory."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    # ---- the life of the process ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            wait = self._breaker.open_until(time.monotonic())
            if wait is not None:
                self._set("broken")
                await asyncio.sleep(max(0.0, wait - time.monotonic()))
                self._set("restarting")
            self._lost.clear()
            self._watchdog = Watchdog(self._limits.watchdog_seconds)
            self._spawn()
            await self._watch()
            await self._end_process()
            if self.failure is not None:
                self._set("broken")
                return
            self._breaker.crash(time.monotonic())
            self.crashes += 1
            if self.hello is None and self.crashes >= self._limits.crashes:
                self.failure = EngineError(f"the engine process ended {self.crashes} times while it loaded the model")
                self._set("broken")
                return
            self._set("restarting")

    def _spawn(self) -> None:
        if self._directory is None:
            raise EngineError("the supervisor was not started")
        self._process = subprocess.Popen(
            [*self._command, str(self._directory / "engine")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which drains first
        )

    async def _watch(self) -> None:
        """Until the process is gone, or deserves to be."""
        started = time.monotonic()
        while not self._lost.is_set():
            if self._process is not None and self._process.poll() is not None:
                _log.error("the engine process ended", extra={"facts": {"status": self._process.returncode}})
                return
            now = time.monotonic()
            if self._connection is None and now - started > CONNECT_SECONDS:
                _log.error("the engine process did not start")
                return
            if self.state == "ready" and self._watchdog.hangs(now):
                _log.error("the engine hangs and is killed", extra={"facts": {"seconds": self._watchdog.seconds}})
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._lost.wait(), TICK_SECONDS)
        if self.failure is None:
            _log.error("the engine process ended")

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()  # its end is told later, and is that of no engine that is started meanwhile
        if process is None:
            return
        if process.poll() is None:
            # it ends by itself when its socket is closed; whether it hangs is not waited out
            if self.state == "stopped":
                for _ in range(20):
                    if process.poll() is not None:
                        break
                    await asyncio.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        while process.poll() is None:
            await asyncio.sleep(0.005)

    # ---- the connection -------------------------------------------------------------------------------------------

    def _accept(self) -> asyncio.Protocol:
        return _Guarded(self)

    def adopt(self, connection: Connection, peer: int | None) -> bool:
        """Take the connection of our own process; any other is turned away."""
        if self._process is None or self._connection is not None or peer not in (None, self._process.pid):
            return False
        self._connection = connection
        connection.send(Open(model=self._settings.model, options=dict(self._settings.options)))
        return True

    def lost(self, connection: Connection) -> None:
        """A connection ended."""
        if connection is self._connection:
            self._connection = None
            self._lost.set()
            if self.state == "ready":
                self._set("restarting")

    def heard(self, message: Message) -> None:
        """What belongs to no request."""
        if isinstance(message, Stats):
            self.stats = message
            self._watchdog.pulse(time.monotonic(), message)
        elif isinstance(message, Loading):
            self.loading = message
        elif isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, Refused) and self.hello is None:  # it never worked: nothing is tried again
            self.failure = message.exception()
            self._set("broken")

    def _greet(self, hello: Hello) -> None:
        if hello.protocol != messages.PROTOCOL:
            self.failure = EngineError(
                f"the engine speaks protocol {hello.protocol} and this server {messages.PROTOCOL}: restart both"
            )
            return
        self.hello = hello
        self._watchdog = Watchdog(max(self._limits.watchdog_seconds, 4 * hello.step_seconds))
        self._watchdog.pulse(time.monotonic(), Stats(steps=0, busy=False))
        if self.on_ready is not None:
            self.on_ready(hello)
        self._set("ready")

    def _set(self, state: State) -> None:
        if self.state != "stopped":
            self.state = state
        self._changed.set()


class _Guarded(Connection):
    """A connection that is checked before anything is believed."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor.heard, lambda: supervisor.lost(self))
        self._supervisor = supervisor

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._supervisor.adopt(self, _peer_pid(transport)):
            self.close()


def _peer_pid(transport: asyncio.BaseTransport) -> int | None:
    """The process at the other end; None where the system does not tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    peer = transport.get_extra_info("socket")
    if option is None or peer is None:
        return None
    pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, option, 12))
    return int(pid)

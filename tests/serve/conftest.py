"""Servers to test against: in this process with the real or a made-up engine process, or the whole command.

`live` is one server with the embedded model for all tests that only ask; `start` makes servers with other settings;
`command` runs `haomiao serve` itself. All listen on loopback at a free port, and are ended with the test.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from haomiao.serve.server import QuietServer, bind, config_of
from haomiao.serve.service import Service
from haomiao.serve.settings import Limits, Settings

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


class Running:
    """A server on a thread of this process; its engine is a process of its own, as always."""

    def __init__(self, settings: Settings, engine: tuple[str, ...] | None = None) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.url = f"{'https' if settings.tls_cert else 'http'}://127.0.0.1:{self.port}"
        self.settings = settings
        self._engine = engine
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._up.wait(60), "the server did not start"
        self.http = httpx.Client(base_url=self.url, timeout=30, verify=False, trust_env=False)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = Service(self.settings, self._engine)
        self.server = QuietServer(config_of(self.settings, self.service))
        await self.service.start()
        self.stop = asyncio.Event()
        serving = self.loop.create_task(self.server._serve([self.listener]))
        self._up.set()
        await self.stop.wait()
        self.server.should_exit = self.server.force_exit = True
        await asyncio.wait([serving], timeout=3)
        await self.service.stop()

    def ready(self) -> Running:
        """Wait until requests are served."""
        asyncio.run_coroutine_threadsafe(self.service.ready(), self.loop).result(60)
        return self

    def chat(self, **body: Any) -> httpx.Response:
        """One chat completion."""
        return self.http.post("/v1/chat/completions", json={**CHAT, **body})

    def close(self) -> None:
        """End it; idempotent."""
        self.http.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self._thread.join(15)


@pytest.fixture(scope="session")
def live() -> Iterator[Running]:
    """One server with the embedded model, ready."""
    running = Running(Settings(options={"threads": 1}))
    try:
        yield running.ready()
    finally:
        running.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Makes servers: keyword arguments are fields of `Settings` or of `Limits`; `fake` takes the made-up engine, which
    answers with numbered words, one every `pause` seconds."""
    made: list[Running] = []

    def make(*, fake: bool = True, wait: bool = True, pause: float = 0.0, **fields: Any) -> Running:
        limits = {name: fields.pop(name) for name in list(fields) if name in Limits.__dataclass_fields__}
        options = {"pause": pause} if fake else {"threads": 1}
        settings = Settings(options={**options, **fields.pop("options", {})}, limits=Limits(**limits), **fields)
        made.append(Running(settings, FAKE_ENGINE if fake else None))
        return made[-1].ready() if wait else made[-1]

    yield make
    for running in made:
        running.close()


class Command:
    """`haomiao serve` as its users run it."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "haomiao", "serve", "--port", "0", "--threads", "1", *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def url(self) -> str:
        """Wait for the start-up line and return the address in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(r"(https?://\S+) · ", line)
            if found:
                return found[1]
        raise AssertionError("the server ended without a start-up line")

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> tuple[int, str]:
        """Send a signal and return the exit code and the rest of stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    """Starts commands and ends them."""
    made: list[Command] = []

    def make(*flags: str, **environment: str) -> Command:
        made.append(Command(*flags, **environment))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()

"""The parent's side of the template worker: one process per Python process, started when first needed, killed when it
takes too long, and replaced.

Knows nothing about chats. Starting it takes about 0.1 s (Python and Jinja2), which `TemplateProcess.start` can spend
while a model loads; a render is then one exchange over a pipe. Time is counted from the outside: the worker is killed
after `SECONDS`, unless the machine gave it less than half of that to run in; then it gets up to `STARVED_SECONDS`.
"""

from __future__ import annotations

import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from haomiao.errors import TemplateError, UnavailableError

SECONDS = 0.25
STARVED_SECONDS = 2.0
START_SECONDS = 20.0
MAX_CHARACTERS = 4 << 20
"""Longest rendered text."""
_MAX_REPLY = 32 << 20
_WORKER = Path(__file__).with_name("template_worker.py")


class _WorkerGoneError(TemplateError):
    """The worker ended without an answer."""


class TemplateProcess:
    """A worker and the templates that it holds. Safe to use from several threads; they take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._ids: dict[str, int] = {}

    def start(self) -> None:
        """Make sure that a worker runs."""
        with self._lock:
            self._ensure()

    def compile(self, source: str) -> None:
        """Check that `source` is a template. Raises `TemplateError`."""
        with self._lock:
            try:
                self._template(source)
            except _WorkerGoneError:
                self._template(source)

    def render(self, source: str, context: dict[str, Any]) -> str:
        """The text of a template. Raises `TemplateError`: malformed, refused by itself, too slow, too large.

        A worker that was gone (killed by someone else) is replaced and asked once more.
        """
        with self._lock:
            try:
                return self._render(source, context)
            except _WorkerGoneError:
                return self._render(source, context)

    def _render(self, source: str, context: dict[str, Any]) -> str:
        template = self._template(source)
        text = self._exchange({"id": template, "context": context, "limit": MAX_CHARACTERS}).get("text")
        if not isinstance(text, str):
            raise TemplateError("the template worker gave no text")
        return text

    def close(self) -> None:
        """End the worker; the next use starts another."""
        with self._lock:
            self._kill()

    @property
    def pid(self) -> int | None:
        """The worker's process id, or None."""
        return self._process.pid if self._process is not None else None

    def _template(self, source: str) -> int:
        self._ensure()
        known = self._ids.get(source)
        if known is None:
            if len(self._ids) >= 48:  # fewer than the worker holds: start afresh rather than let it fill up
                self._kill()
                self._ensure()
            known = self._exchange({"source": source})["id"]
            self._ids[source] = int(known)
        return int(known)

    def _ensure(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        if self._owner == os.getpid():
            self._kill()
        self._ids, self._process, self._owner = {}, None, os.getpid()
        if not sys.executable:
            raise UnavailableError("chat templates need a Python program to run in, and sys.executable names none")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: value for key, value in os.environ.items() if key in _KEPT},
                bufsize=0,
            )
        except OSError as error:
            raise UnavailableError(f"the template worker cannot be started: {error.strerror or error}") from error
        self._read(START_SECONDS, START_SECONDS, "did not start")

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            data = json.dumps(request, ensure_ascii=True).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the conversation is not JSON: {str(error)[:200]}") from error
        self._write(struct.pack("<I", len(data)) + data)
        reply = self._read(SECONDS, STARVED_SECONDS, f"took longer than {SECONDS * 1000:.0f} ms")
        if "error" in reply:
            raise TemplateError(f"chat template: {str(reply['error'])[:600]}")
        return reply

    def _write(self, data: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise TemplateError("the template worker is gone")
        try:
            view = memoryview(data)
            while view:  # unbuffered pipes may take less than all
                view = view[process.stdin.write(view) or 0 :]
        except OSError as error:
            self._kill()
            raise _WorkerGoneError("the template worker ended") from error

    def _read(self, seconds: float, starved_seconds: float, complaint: str) -> dict[str, Any]:
        """One reply. Kills the worker if it does not come in time, is too long, or is not one."""
        process = self._process
        if process is None or process.stdout is None:
            raise TemplateError("the template worker is gone")
        start, used_before = time.monotonic(), _cpu_seconds(process.pid)
        buffer = bytearray()
        wanted = 4
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(buffer) < wanted:
                elapsed = time.monotonic() - start
                if elapsed >= seconds:
                    used = _cpu_seconds(process.pid) - used_before
                    if used >= seconds / 2 or elapsed >= starved_seconds:
                        self._kill()
                        raise TemplateError(f"the chat template {complaint} and was stopped")
                if not selector.select(max(0.01, seconds - elapsed)):
                    continue
                part = os.read(process.stdout.fileno(), 1 << 20)
                if not part:
                    self._kill()
                    raise _WorkerGoneError("the chat template used too much memory or ended its process")
                buffer += part
                if len(buffer) >= 4 and wanted == 4:
                    (size,) = struct.unpack_from("<I", buffer)
                    wanted = 4 + size
                    if size > _MAX_REPLY:
                        self._kill()
                        raise TemplateError("the chat template produced too much text")
        try:
            reply = json.loads(buffer[4:wanted])
        except ValueError as error:
            self._kill()
            raise TemplateError("the template worker answered nonsense") from error
        return reply if isinstance(reply, dict) else {}

    def _kill(self) -> None:
        process, self._process = self._process, None
        self._ids = {}
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "SYSTEMROOT", "VIRTUAL_ENV")
"""Environment variables that the worker inherits: enough to find Jinja2, and no secrets."""


def _cpu_seconds(pid: int) -> float:
    """Time that a process has run for; infinite where the system does not tell (no allowance is made then)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux: the process's own clock, as clock_getcpuclockid gives it
    except OSError:
        return float("inf")


PROCESS = TemplateProcess()
"""The one that `template` uses."""

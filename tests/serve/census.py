"""Whether a server is as well after a fault as before: it answers, and nothing is left over."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from tests.serve.conftest import Running

SLACK_BYTES = 24 << 20
"""What allocators of two processes keep of a few large requests; a leak would grow with every one."""


@dataclass
class Census:
    """What a server holds."""

    descriptors: int
    threads: int
    memory: int
    kv_held: int
    in_flight: int

    def no_more_than(self, other: Census) -> bool:
        """True if nothing has grown."""
        return (
            self.descriptors <= other.descriptors
            and self.threads <= other.threads
            and self.memory <= other.memory * 1.01 + SLACK_BYTES
            and self.kv_held == 0
            and self.in_flight == 0
        )


def census(running: Running) -> Census:
    """Count. The HTTP process is the test's own, so its clients are counted too: they must be closed by then."""
    gc.collect()
    stats = running.service.supervisor.stats
    processes = [psutil.Process()]
    if running.service.supervisor.pid is not None:
        processes.append(psutil.Process(running.service.supervisor.pid))
    return Census(
        sum(each.num_fds() for each in processes),
        sum(each.num_threads() for each in processes),
        sum(each.memory_info().rss for each in processes),
        stats.kv_blocks - stats.kv_free + stats.running + stats.waiting,
        running.service.in_flight,
    )


@contextmanager
def unharmed(running: Running, *, restarted: bool = False) -> Iterator[Running]:
    """After the block the next valid request must succeed, and nothing may be left over."""
    first = running.chat(max_tokens=1)
    assert first.status_code == 200, first.text
    before = census(running)
    yield running
    running.ready()
    assert eventually(lambda: running.chat(max_tokens=1).status_code == 200)
    if restarted:
        assert eventually(lambda: census(running).in_flight == 0)
        return
    assert eventually(lambda: census(running).no_more_than(before)), (before, census(running))


def eventually(check: object, seconds: float = 10.0) -> bool:
    """True as soon as `check()` is, False if it is not in time. The time is a limit, not a measurement."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return bool(check())  # type: ignore[operator]


def raw(running: Running, data: bytes, *, more: bytes = b"", wait: float = 10.0) -> bytes:
    """Send bytes as they are and return everything that comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(wait)
        out = b""
        try:
            connection.sendall(data)
            if more:
                connection.sendall(more)
        except OSError:
            pass  # the server had seen enough
        try:
            while part := connection.recv(65536):
                out += part
        except OSError:
            pass
        return out


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    """A request, byte for byte; the connection ends with it."""
    lines = [b"POST " + path.encode() + b" HTTP/1.1", b"host: localhost", b"connection: close", *headers]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in headers):
        lines.append(b"content-length: " + str(len(body)).encode())
    if not any(line.lower().startswith(b"content-type") for line in headers):
        lines.append(b"content-type: application/json")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(response: bytes) -> int:
    """The status of raw bytes."""
    assert response.startswith(b"HTTP/1.1 "), response[:100]
    return int(response[9:12])

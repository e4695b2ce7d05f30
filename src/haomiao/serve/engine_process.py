"""The engine process: loads the model, then steps for the requests that arrive on its socket, until that is closed.

Started by `supervisor` with the socket's path as its only argument. Three threads: the main one steps, a second reads
messages (so that a refusal does not wait for the running step), a third sends the pulse. Knows nothing about HTTP; owns
constraints, sampling and sequence state. It ends with its parent, because the socket does.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve import messages
from haomiao.serve.messages import Open, Refused, ToEngine

PULSE_SECONDS = 0.5
SWITCH_SECONDS = 0.0005
"""A message that arrives while Python code runs between two steps waits no longer than this."""


class Link:
    """The socket, as the threads of this process share it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._reader = messages.FrameReader(ToEngine)

    def send(self, *said: messages.Message) -> None:
        """Say it now. The process ends if nobody listens any more."""
        if not said:
            return
        data = messages.encode(said)
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            os._exit(0)

    def receive(self) -> Iterator[Any]:
        """Messages until the other side closes."""
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError:
                return
            if not data:
                return
            yield from self._reader.feed(data)


def main(path: str) -> int:
    """Serve one parent. Returns the exit code."""
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    logging.basicConfig(level=logging.WARNING, format="haomiao engine: %(message)s", stream=sys.stderr)
    link = Link(path)
    inbox = link.receive()
    first = next(inbox, None)
    if not isinstance(first, Open) or first.protocol != messages.PROTOCOL:
        said = getattr(first, "protocol", "none")
        error = EngineError(f"the server speaks protocol {said} and this engine {messages.PROTOCOL}: restart both")
        link.send(Refused.of(0, error))
        return error.exit_code
    try:
        from haomiao.serve.engine_loop import EngineLoop

        loop = EngineLoop(first, link.send)
        gc.collect()
        gc.freeze()  # what the model and the libraries are made of is not looked through again, in the midst of a step
    except HaomiaoError as error:
        link.send(Refused.of(0, error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        link.send(Refused.of(0, EngineError(f"{type(error).__name__}: {error}")))
        return 1
    threading.Thread(target=_read, args=(inbox, loop), name="haomiao-reader", daemon=True).start()
    threading.Thread(target=_pulse, args=(loop, link), name="haomiao-pulse", daemon=True).start()
    try:
        loop.run()
    except BaseException:
        traceback.print_exc()  # the supervisor starts another one
        sys.stderr.flush()
        os._exit(1)
    return 0


def _read(inbox: Iterator[Any], loop: Any) -> None:
    try:
        for message in inbox:
            loop.take(message)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # even while a step hangs


def _pulse(loop: Any, link: Link) -> None:
    while True:
        time.sleep(PULSE_SECONDS)
        link.send(loop.stats())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

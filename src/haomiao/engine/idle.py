"""A thread that does what can wait, while nothing is asked: it sleeps until there is something, and between the pieces.

Started when first woken. Knows a driver and nothing about what is done.
"""

from __future__ import annotations

import atexit
import contextlib
import threading

from haomiao.engine.driver import Driver
from haomiao.errors import InputError

PAUSE_S = 0.02
"""Between two pieces of work, so that whoever asks comes first; and before the first one, so that a conversation that
goes on at once is not in the way of it."""


class IdleWorker:
    """Calls `Engine.idle` of a driver's engine."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._work = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something to do. Never waits."""
        self._work.set()
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._run, name="haomiao-idle", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # an interpreter that ends may not find it inside a step

    def close(self) -> None:
        """End the thread; idempotent. To be called before the driver is closed."""
        self._closed.set()
        self._work.set()
        atexit.unregister(self.close)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._closed.wait(PAUSE_S)
            self._work.clear()  # before looking: whatever comes from here on, `close` too, sets it again
            if self._closed.is_set():
                return
            with contextlib.suppress(InputError):  # the model was closed
                if self._driver.alone(lambda engine: engine.idle() or engine.busy or engine.monitor.waiting):
                    self._work.set()

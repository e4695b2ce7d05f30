"""The cost model of one loaded model, and where it is kept: `HAOMIAO_CACHE/costs/<key>.json`.

The key covers machine, artifact, build, threads, KV type, points and coverage: whatever changes how long a step takes,
and what is said of it. What is
read back is distrusted; a folder that cannot be written costs a new measurement next time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from haomiao.config import cache_dir
from haomiao.engine.cost import COVERAGE, CostModel
from haomiao.engine.driver import Driver
from haomiao.errors import InputError
from haomiao.models.open import OpenedModel
from haomiao.types import Executor

FORMAT = 1
MAX_BYTES = 1 << 20


class Calibration:
    """A cost model that is measured, or read, when it is first needed."""

    def __init__(
        self,
        opened: OpenedModel,
        executor: Executor,
        points: Sequence[str],
        *,
        kind: str,
        max_context: int,
        coverage: float = COVERAGE,
    ) -> None:
        """`points` are measured: those that the throttle may use. Raises `InputError` for the coverage."""
        self.cost = CostModel(coverage)
        self.ready = False
        self._executor = executor
        self._points = tuple(points)
        self._max_context = max_context
        self._opened = opened
        self._kind = kind
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """Where the measurement of this model on this machine is kept."""
        return cache_dir() / "costs" / f"{self._key()}.json"

    def prepare(
        self, driver: Driver, progress: Callable[[str, int, int], None] | None = None, *, again: bool = False
    ) -> None:
        """Read the measurement, or (`again`, or where there is none) make it, between two steps of `driver`."""
        with self._lock:
            if self.ready and not again:
                return
            if again or not self._read():
                from haomiao.engine.calibrate import calibrate

                steps = driver.alone(
                    lambda engine: calibrate(
                        self._executor, engine.pool, self._points, max_context=self._max_context, progress=progress
                    )
                )
                if steps:
                    self.cost.calibrate(steps)
                    self._write()
            self.ready = True

    def _read(self) -> bool:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES)
            self.cost.restore(json.loads(data))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, RecursionError, InputError, AttributeError, TypeError) as error:
            logging.getLogger(__name__).warning("%s is not used: %s", self.path, error)
            return False
        return self.cost.knows(self._points)

    def _write(self) -> None:
        """Beside its final name, then renamed: it is whole or absent."""
        path = self.path
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.cost.state()), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            logging.getLogger(__name__).warning("the measurement of this machine is not kept: %s", error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _key(self) -> str:
        """32 hex digits that change with whatever a step's time, or its bound, depends on."""
        about: list[Any] = [
            *(FORMAT, platform.machine(), _processor(), os.cpu_count(), self._kind, _build()),
            *(getattr(self._executor, "threads", 1), getattr(self._executor, "isa", "")),
            *(self._executor.kv_type, self._executor.max_step_tokens, self._points, self.cost.coverage),
            [[s.kind, s.name, s.plane, s.bytes, s.crc] for s in self._opened.artifact.sections],
        ]
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _build() -> list[Any]:
    """The version, and the compiled core's size and time: a developer's build counts as another one."""
    from haomiao import __version__

    with contextlib.suppress(ImportError, OSError, TypeError):
        from haomiao import _core

        found = Path(_core.__file__ or "").stat()
        return [__version__, found.st_size, found.st_mtime_ns]
    return [__version__]

"""Clocks. Monotonic only; milliseconds are floats. Knows nothing about what is timed. Imports no numpy."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise


class Stopwatch:
    """Marks moments of one activity. `now` is an argument of the constructor, so that tests can drive the clock."""

    __slots__ = ("_marks", "_now", "_start")

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now_ns
        self._start = now_ns()
        self._marks: list[int] = []

    def mark(self) -> float:
        """Note this moment; milliseconds since the start."""
        moment = self._now()
        self._marks.append(moment)
        return (moment - self._start) / 1e6

    def elapsed_ms(self) -> float:
        """Milliseconds since the start, without a mark."""
        moment = self._now()
        return (moment - self._start) / 1e6

    @property
    def marks_ms(self) -> list[float]:
        """Milliseconds from the start to each mark."""
        return [(moment - self._start) / 1e6 for moment in self._marks]

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between neighbouring marks: one fewer than marks."""
        return [(later - earlier) / 1e6 for earlier, later in pairwise(self._marks)]

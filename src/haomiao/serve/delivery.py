"""How long an answer is on its way from the engine to the socket, so that budgets can leave room for it.

The engine ends an answer; this process still decodes, writes and sends it, beside whoever else wants a core. Told when
what happened; knows no clock and no route.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
FORGET_NS = 10_000_000_000
"""What is older says little, and must not keep out today's requests."""
SHARE = 0.9
"""Of the ways that are to fit into what is set aside."""
MOST = 8
"""At most this part of a budget is set aside: a bad minute, or clients that read slowly, lock nobody else out."""


class Delivery:
    """Recent times between the end of an answer in the engine and its last byte."""

    def __init__(self) -> None:
        self._latest: deque[tuple[int, int]] = deque(maxlen=WINDOW)  # (when it was seen, its nanoseconds)
        self._way_ns = 0

    def note(self, now: int, way_ns: int) -> None:
        """An answer was sent at `now`, `way_ns` after the engine was done with it."""
        self._latest.append((now, max(0, way_ns)))
        self._update(now)

    def set_aside(self, now: int, budget_ns: int) -> int:
        """Nanoseconds by which the engine must be earlier than a budget of `budget_ns`."""
        if self._latest and now - self._latest[0][0] > FORGET_NS:
            self._update(now)
        return min(self._way_ns, max(0, budget_ns) // MOST)

    def _update(self, now: int) -> None:
        while self._latest and now - self._latest[0][0] > FORGET_NS:
            self._latest.popleft()
        ways = sorted(way for _, way in self._latest)
        self._way_ns = ways[math.ceil(SHARE * len(ways)) - 1] if ways else 0

"""A second look at a machine that is said to be too slow: a few steps of its own, run while nothing is asked.

What keeps every request out is never measured again, since nothing runs: a cost model of a bad minute would go on
refusing long after it. So a refusal by time alone, with no company to blame, is followed by a rehearsal, seldom enough
to cost next to nothing. Knows a cost model and how steps are measured; nothing about requests.
"""

from __future__ import annotations

from collections.abc import Callable

from haomiao.engine.cost import LearningCost
from haomiao.engine.state import BlockPool
from haomiao.types import Executor

PAUSE_NS = 250_000_000
"""Between two rehearsals: of half a dozen short steps each."""


class Rehearsal:
    """Measures, when a refusal was doubted, what it stood on."""

    def __init__(
        self, executor: Executor, pool: BlockPool, cost: LearningCost | None, clock: Callable[[], int]
    ) -> None:
        self._executor = executor
        self._pool = pool
        self._cost = cost
        self._clock = clock
        self._point: str | None = None
        self._last: int | None = None

    def doubt(self, point: str) -> bool:
        """A budget was refused for what a step is said to take at this point. True if that is to be measured now. May
        be called from any thread."""
        if self._cost is None or (self._last is not None and self._clock() - self._last < PAUSE_NS):
            return False
        self._point = point
        return True

    def work(self) -> bool:
        """Run a rehearsal if one is due; False if not. No step of the engine may run meanwhile."""
        point, self._point = self._point, None
        if point is None or self._cost is None:
            return False
        from haomiao.engine.calibrate import rehearse

        self._last = self._clock()
        for shape, nanoseconds in rehearse(self._executor, self._pool, point, self._clock):
            self._cost.observe(shape, nanoseconds)
        return True

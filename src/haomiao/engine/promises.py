"""What was promised at admission and what came of it: the measured coverage of whole requests.

A forecast knows the work at hand and not the company that is still to come. What requests took beyond it is learned
from those that ended, apart for short, middling and long ones, and the next promises are stretched by the quantile that
the stated coverage asks for. Knows durations and nothing else.
"""

from __future__ import annotations

from haomiao.engine.quantile import AdaptiveQuantile

CLASSES = (4, 24)
"""Steps that short and middling requests take at most."""
ENOUGH = 24


class Promises:
    """Bounds that were stated, and how they were kept."""

    def __init__(self, coverage: float) -> None:
        self.stated = 0
        self.kept = 0
        self._ratios = [AdaptiveQuantile(coverage, window=512) for _ in range(len(CLASSES) + 1)]

    def stretch(self, steps: int) -> float:
        """What a forecast of so many steps must be multiplied by; 1 before enough of its kind ended."""
        ratios = self._ratios[self._class(steps)]
        return ratios.value if ratios.value is not None and len(ratios) >= ENOUGH else 1.0

    def knows(self, steps: int) -> bool:
        """True if enough requests of so many steps ended."""
        return len(self._ratios[self._class(steps)]) >= ENOUGH

    def learn(self, steps: int, forecast_ns: int, actual_ns: int, *, whole: bool) -> None:
        """A request ended that was promised nothing, among others like it. It teaches until enough is known: a class
        that is refused from the start would teach nothing."""
        if whole and not self.knows(steps):
            self._ratios[self._class(steps)].extend([actual_ns / max(1, forecast_ns)])

    def record(self, steps: int, forecast_ns: int, actual_ns: int, *, kept: bool, whole: bool) -> None:
        """A request ended. Only those that ran as far as was forecast teach something about time."""
        self.stated += 1
        self.kept += kept
        if whole or actual_ns > forecast_ns:
            self._ratios[self._class(steps)].add(actual_ns / max(1, forecast_ns))

    @staticmethod
    def _class(steps: int) -> int:
        return sum(steps > limit for limit in CLASSES)

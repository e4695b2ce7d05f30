"""A quantile of what was seen lately, held to its stated coverage. Arithmetic on numbers; knows nothing about time.

Conformal prediction with a sliding window's order statistics; the level follows the misses, so that the long-run
share inside is the stated one even where the distribution drifts (adaptive conformal inference, Gibbs and Candès 2021,
equation 2).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class AdaptiveQuantile:
    """The value that `coverage` of the next numbers stay within, learned from the latest `window` of them."""

    def __init__(self, coverage: float, window: int = 256, rate: float = 0.1) -> None:
        self.coverage = coverage
        self.seen = 0
        self.inside = 0
        self._rate = rate * (1.0 - coverage)
        self._miss = 1.0 - coverage  # the share of misses that is aimed at, moved by those that happen
        self._latest: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._value: float | None = None

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def value(self) -> float | None:
        """The quantile; None before anything was seen. With too few numbers to tell it is their maximum."""
        return self._value

    def add(self, number: float) -> None:
        """Take a number into account, after counting whether the quantile held for it."""
        if self._value is not None:
            held = number <= self._value
            self.seen += 1
            self.inside += held
            aim = 1.0 - self.coverage
            self._miss = min(4 * aim, max(aim / 8, self._miss + self._rate * (aim - (0.0 if held else 1.0))))
        self._push(number)
        self._value = self._quantile()

    def extend(self, numbers: Iterable[float]) -> None:
        """Take numbers in that were seen elsewhere: no miss is counted."""
        for number in numbers:
            self._push(number)
        self._value = self._quantile()

    def latest(self) -> list[float]:
        """What the quantile stands on, oldest first."""
        return list(self._latest)

    def _push(self, number: float) -> None:
        if len(self._latest) == self._latest.maxlen:
            del self._sorted[bisect_left(self._sorted, self._latest[0])]
        self._latest.append(number)
        insort(self._sorted, number)

    def _quantile(self) -> float | None:
        if not self._sorted:
            return None
        count = len(self._sorted)
        return self._sorted[min(count, math.ceil((1.0 - self._miss) * (count + 1))) - 1]

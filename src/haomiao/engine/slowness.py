"""How much slower than fitted the machine runs at present: what lasts, told from what passes.

Two medians of actual / fitted over the latest steps: a calm one over a tenth of a second, and a quick one over five
steps, or more if they are short, that counts only where it lies beyond the band in which steps vary anyway. So a
neighbour that stays is followed within three steps and forgotten within about a dozen, and a stall moves nothing:
stalls are no slowness, they are added (engine/overrun.py). Knows durations and nothing else.
"""

from __future__ import annotations

from collections import deque
from statistics import median

MOST = 16.0
"""No neighbour slows a machine more; a step that took longer was of a kind that the fit does not know."""
QUICK_NS, QUICK_STEPS = 8e6, 5
CALM_NS, CALM_STEPS = 100e6, 25
FEWEST = 3
"""Steps before anything is said."""
BAND = 1.4
"""Cores that share their execution units or change their frequency vary by so much within a few steps."""
EVERY = 8
"""Steps between two looks at the calm median."""


class Slowness:
    """Implements what the module says; `value` is the present slowness, 1 before three steps were seen."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, float]] = deque(maxlen=160)
        self._calm = 1.0
        self._since = 0
        self.value = 1.0
        self.latest = 1.0
        """The quick median alone."""

    def add(self, ratio: float, fitted_ns: float) -> None:
        """A step took `ratio` times the `fitted_ns` nanoseconds."""
        self._kept.append((min(max(ratio, 1.0 / MOST), MOST), fitted_ns))
        count = len(self._kept)
        if count < FEWEST:
            return
        self.latest = self._median(QUICK_NS, QUICK_STEPS)
        self._since += 1
        if count < CALM_STEPS or self._since >= EVERY:
            self._calm, self._since = self._median(CALM_NS, CALM_STEPS), 0
        self.value = self.latest if count < CALM_STEPS or self.latest > BAND * self._calm else self._calm

    def fade(self, share: float) -> None:
        """Keep `share` of the slowness, on a logarithmic scale; a machine that was quicker stays so."""
        for index, (ratio, fitted_ns) in enumerate(self._kept):
            if ratio > 1.0:
                self._kept[index] = ratio**share, fitted_ns
        self._calm, self.latest, self.value = (
            each**share if each > 1.0 else each for each in (self._calm, self.latest, self.value)
        )

    def _median(self, nanoseconds: float, steps: int) -> float:
        """Over the latest steps: at least so many, and so many nanoseconds of them."""
        latest: list[float] = []
        for ratio, fitted_ns in reversed(self._kept):
            latest.append(ratio)
            nanoseconds -= fitted_ns
            if nanoseconds <= 0 and len(latest) >= steps:
                break
        return median(latest)

"""What verifying costs: the time of a step of `m` tokens that decode, relative to one, learned from the steps
themselves.

Two things change at different speeds and are kept apart: the ratio of `m` tokens to one belongs to the kernels and is
averaged slowly; the time of one token follows context, clock and neighbours and is averaged fast. (The engine's own
cost model is linear in tokens and would miss that a few tokens more cost nothing, and then suddenly much.)
Knows no sequences; durations are told to it.
"""

from __future__ import annotations

_PRIOR_SLOPE = 0.03
"""Share of a one-token step that each further token costs where nothing was measured: low, so that it is tried."""
_SPEED_WEIGHT = 0.3
_RATIO_WEIGHT = 0.1
_OUTLIER = 3.0
MOST = 256
"""Tokens of the longest step that is looked at."""


class StepCosts:
    """Nanoseconds by name (an operating point, or the rounds of another model) and tokens."""

    def __init__(self) -> None:
        self._one: dict[str, float] = {}
        self._ratios: dict[str, dict[int, float]] = {}

    def observe(self, name: str, tokens: int, nanoseconds: float) -> None:
        """A step of `tokens` tokens, one or more of each sequence, none of a prompt, took so long."""
        if not 0 < tokens <= MOST or nanoseconds <= 0:
            return
        one = self._one.get(name)
        ratio = self.ratio(name, tokens)
        if one is None:
            self._one[name] = nanoseconds / ratio
            self._ratios[name] = {1: 1.0, tokens: ratio}
            return
        nanoseconds = min(nanoseconds, _OUTLIER * one * ratio)
        ratios = self._ratios[name]
        if tokens not in ratios:
            ratios[tokens] = max(1.0, nanoseconds / one)
            return
        if tokens > 1:
            ratios[tokens] = max(1.0, ratio + _RATIO_WEIGHT * (nanoseconds / one - ratio))
        self._one[name] = one + _SPEED_WEIGHT * (nanoseconds / ratios[tokens] - one)

    def knows(self, name: str) -> bool:
        """True if a step under this name was seen."""
        return name in self._one

    def ratio(self, name: str, tokens: int) -> float:
        """Time of `tokens` tokens in units of one. More tokens never cost less."""
        ratios = self._ratios.get(name) or {1: 1.0}
        if tokens in ratios:
            return ratios[tokens]
        below = max((m for m in ratios if m < tokens), default=1)
        above = min((m for m in ratios if m > tokens), default=None)
        estimate = ratios[below] + _PRIOR_SLOPE * (tokens - below)
        if above is None:
            return estimate
        return max(min(estimate, ratios[above]), ratios[below])

    def predict(self, name: str, tokens: int) -> float | None:
        """Nanoseconds, or None if no step was seen."""
        one = self._one.get(name)
        return None if one is None else one * self.ratio(name, tokens)


class Allowance:
    """Bounds what speculation may lose: a bucket that fills with a small share of the time that passes and with every
    gain, up to a few steps, and from which every loss is taken. While it is empty, nothing is drafted.

    However wrong the estimates are, all of it together is slower than without speculation by at most `share` of the
    time, plus `steps` steps.
    """

    def __init__(self, share: float = 0.01, steps: float = 6.0) -> None:
        self._share = share
        self._steps = steps
        self._left = steps  # in plain steps, so that it means the same for every model

    @property
    def open(self) -> bool:
        """True if there is something left to lose."""
        return self._left > 0

    def settle(self, taken: float, plain: float, worth: float) -> None:
        """A step took `taken` ns, drafting included; a plain one would have taken `plain`, and what came out is worth
        `worth` plain steps."""
        steps = taken / plain
        self._left = min(self._steps, self._left + self._share * steps + worth - steps)

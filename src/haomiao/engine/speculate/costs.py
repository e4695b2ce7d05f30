"""What verifying costs: the time of a step of `m` tokens that decode, relative to one, learned from the steps
themselves.

Two things change at different speeds and are kept apart: the ratio of `m` tokens to one belongs to the kernels and
hardly changes; the time of one token follows context, clock and neighbours. A step of `m` tokens tells only their
product, so each surprise is shared out by how uncertain either is (a Kalman filter on logarithms, the two taken as
independent): right after a plain step the ratio learns, long after one the speed does. (The engine's own cost model is
linear in tokens and would miss that a few tokens more cost nothing, and then suddenly much.) Knows no sequences;
durations are told to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

_PRIOR_SLOPE = 0.03
"""Share of a one-token step that each further token costs where nothing was measured: low, so that it is tried."""
_NOISE = 0.01
"""Variance of a measured time's logarithm: a tenth, as spread."""
_SPEED_DRIFT = 0.001
"""What a step adds to the variance of the speed's logarithm."""
_RATIO_DRIFT = 2e-5
_RATIO_PRIOR = 0.25
_LEAST_VARIANCE = 1e-6
_COUPLING = 0.95
"""Greatest correlation of a ratio with the speed."""
_SURPRISE = 1.1
"""A logarithm further off than this is cut: a hiccup teaches no more than a factor of three."""
MOST = 256
"""Tokens of the longest step that is looked at."""


@dataclass(slots=True)
class _Ratio:
    """The logarithm of a ratio, its variance, and its covariance with the logarithm of the speed."""

    log: float
    variance: float = _RATIO_PRIOR
    shared: float = 0.0


class _Line:
    """One name: the logarithm of one token's time, its variance, and the ratios by tokens."""

    def __init__(self, log_ns: float) -> None:
        self.log_ns = log_ns
        self.variance = _NOISE
        self.ratios: dict[int, _Ratio] = {1: _Ratio(0.0, 0.0)}

    def learn(self, tokens: int, log_ns: float) -> None:
        """One measurement of the sum of speed and ratio."""
        seen = self.ratios[tokens]
        self.variance += _SPEED_DRIFT
        seen.variance += _RATIO_DRIFT if tokens > 1 else 0.0
        surprise = max(-_SURPRISE, min(_SURPRISE, log_ns - self.log_ns - seen.log))
        of_speed, of_ratio = self.variance + seen.shared, seen.variance + seen.shared
        total = of_speed + of_ratio + _NOISE
        for ratio in self.ratios.values():
            if ratio is not seen:  # what speed and ratio were wrong about together is put right together
                ratio.log += surprise * ratio.shared / total
                ratio.variance -= ratio.shared**2 / total
                ratio.shared -= ratio.shared * of_speed / total
        self.log_ns += surprise * of_speed / total
        self.variance -= of_speed**2 / total
        seen.log += surprise * of_ratio / total
        seen.variance -= of_ratio**2 / total
        seen.shared -= of_speed * of_ratio / total
        self._stay_sound()

    def _stay_sound(self) -> None:
        """What ratios are wrong about among themselves is not kept, so that the rest may contradict itself after many
        surprises: variances stay positive, no covariance exceeds what they allow, and `m` tokens take between one and
        twice `m` times as long as one."""
        self.variance = max(self.variance, _LEAST_VARIANCE)
        for tokens, ratio in self.ratios.items():
            if tokens == 1:
                ratio.log = ratio.variance = ratio.shared = 0.0
                continue
            ratio.log = min(max(ratio.log, 0.0), math.log(2 * tokens))
            ratio.variance = min(max(ratio.variance, _LEAST_VARIANCE), _RATIO_PRIOR)
            most = _COUPLING * math.sqrt(self.variance * ratio.variance)
            ratio.shared = min(max(ratio.shared, -most), most)


class StepCosts:
    """Nanoseconds by name (an operating point, or the rounds of another model) and tokens."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def observe(self, name: str, tokens: int, nanoseconds: float) -> None:
        """A step of `tokens` tokens, one or more of each sequence, none of a prompt, took so long."""
        if not 0 < tokens <= MOST or nanoseconds <= 0:
            return
        log_ns = math.log(nanoseconds)
        line = self._lines.get(name)
        if line is None:
            self._lines[name] = line = _Line(log_ns - math.log(self.ratio(name, tokens)))
        if tokens not in line.ratios:
            line.ratios[tokens] = _Ratio(math.log(self.ratio(name, tokens)))
        line.learn(tokens, log_ns)

    def knows(self, name: str) -> bool:
        """True if a step under this name was seen."""
        return name in self._lines

    def widest(self, name: str) -> int:
        """Tokens of the longest step that was seen under this name."""
        line = self._lines.get(name)
        return max(line.ratios) if line is not None else 1

    def ratio(self, name: str, tokens: int) -> float:
        """Time of `tokens` tokens in units of one. What was not seen lies between its neighbours."""
        ratios = self._lines[name].ratios if name in self._lines else {1: _Ratio(0.0)}
        if tokens in ratios:
            return math.exp(ratios[tokens].log)
        below = max((m for m in ratios if m < tokens), default=1)
        above = min((m for m in ratios if m > tokens), default=None)
        low = math.exp(ratios[below].log)
        if above is None:
            # beyond what was seen it grows at least as it did so far
            slope = max(_PRIOR_SLOPE, (low - 1.0) / (below - 1)) if below > 1 else _PRIOR_SLOPE
            return low + slope * (tokens - below)
        high = math.exp(ratios[above].log)
        return low + (high - low) * (tokens - below) / (above - below)

    def predict(self, name: str, tokens: int) -> float | None:
        """Nanoseconds, or None if no step was seen."""
        line = self._lines.get(name)
        return None if line is None else math.exp(line.log_ns) * self.ratio(name, tokens)


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

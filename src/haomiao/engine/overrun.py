"""How far a run of steps goes beyond what was expected when it began, as a function of how long it is.

The time of a run that is expected to take E is taken to be

    T(E) = sum of e_i (1 + noise_i) + sum of N(E) stalls,    E(N) = rate * E,

e_i being the steps' expectations. Noise averages out as E grows, down to what drifts with the machine; stalls (a time
slice that a neighbour got, an interrupt, a page that was gone) come at a rate per time and with a size of their own, so
that a run of one step mostly sees none and a long one sees rate * E of them. The tail of one step is therefore not
charged to every step of an answer: the bound of a sum is its expectation plus a quantile of the sum's own error.

That quantile is not derived from fitted rates and sizes. It is read off the recorded process: of all runs of length E
among the latest steps, overlapping ones included, the share that is stated stayed within it. Blocks of neighbouring
steps keep the dependence between them, bursts of stalls among it (moving blocks: Künsch 1989, "The jackknife and the
bootstrap for general stationary observations", section 2). What the past does not tell about the present, the level
corrects: it follows the misses that happen (adaptive conformal inference, Gibbs and Candès 2021, equation 2), counted
on runs that do not overlap, each against the bound that was stated when it began.

A slowness that is seen now is half gone, on a logarithmic scale, by the time that bounds are needed for: what is slow
now is mostly so for a while. So the quantile is one of actual / (fitted * sqrt(slowness)), one number for what lasts,
what passes and what comes back; a bound that multiplies the present slowness with the worst that ever came on top of
one counts the same neighbour twice.

Runs are told apart by their expected nanoseconds: the same stall is little to a long run, however few its steps. Knows
no clock and no shapes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

HORIZONS_NS = (0.0, 1e6, 4e6, 16e6, 64e6, 256e6, 1024e6)
"""Expected lengths of the runs whose error is kept; 0 stands for single steps of any length."""
PRIORS = (1.5, 1.5, 1.4, 1.3, 1.25, 1.2, 1.2)
"""Bound / expectation before enough runs of that length were seen."""
MOST, MOST_NS = 4.0, 10e6
"""No bound is more than so many times its expectation, unless by less than a stall of so many nanoseconds: one bad
minute would keep everybody out for long."""
SHORTEST_NS = 0.25e6
"""Where single steps stand on the logarithmic scale of lengths."""
STRIDE = 4
"""Of the overlapping runs every fourth is looked at: the others differ little, and take time."""
RESTED = 1.5
"""Bound / expectation that no rest brings down."""
KEPT_STEPS, KEPT_NS = 2048, 30e9
"""The past that counts."""
ENOUGH = 24
"""Overlapping runs before their quantile is believed."""
EVERY = 8
"""Steps between two looks at one horizon; they take turns."""
EARLY = 256
"""Steps after which they do."""
RATE = 0.1
DAMPING = 0.5
"""Exponent of the slowness in what bounds are relative to."""


class Overrun:
    """The errors of the latest runs, and bounds for the next ones."""

    def __init__(self, coverage: float) -> None:
        self._room = 2 * KEPT_STEPS
        self._fitted = np.zeros(self._room + 1)  # sums up to each step: of what was fitted, and of what it took
        self._actual = np.zeros(self._room + 1)
        self._slowness = np.ones(self._room)  # as it was believed when the step began
        self._end = 0
        self._count = 0
        self._horizons = [_Horizon(length, prior, coverage) for length, prior in zip(HORIZONS_NS, PRIORS, strict=True)]
        self._ease = 1.0
        self._damp = 1.0
        self._refresh()

    def add(self, fitted_ns: float, actual_ns: float, slowness: float) -> None:
        """A step took `actual_ns`; `slowness` times `fitted_ns` was expected."""
        expected = fitted_ns * slowness
        for horizon in self._horizons:
            horizon.add(expected, actual_ns, slowness)
        self._ease = min(1.0, self._ease + 1 / 32)
        self._keep(fitted_ns, actual_ns, slowness)
        self._count += 1
        if self._count % EVERY == 0:
            turn = self._count // EVERY % len(self._horizons)
            for horizon in self._horizons if self._count <= EARLY else self._horizons[turn : turn + 1]:
                self._look(horizon)
            self._refresh()

    def prime(self, steps: Sequence[tuple[float, float]]) -> None:
        """Start from these steps, (fitted, actual) in the order in which they ran. No miss is counted."""
        for fitted_ns, actual_ns in steps:
            self._keep(fitted_ns, actual_ns, 1.0)
        for horizon in self._horizons:
            self._look(horizon)
        self._refresh()

    def fade(self, share: float) -> None:
        """Keep `share` of what bounds are beyond `RESTED`; the next steps bring it back if it is true."""
        self._ease *= share

    def believe(self, slowness: float) -> None:
        """The machine's slowness at present, which the expectations of the bounds to come hold."""
        self._damp = slowness ** (DAMPING - 1.0)

    def margin(self, nanoseconds: float) -> float:
        """Bound / expectation of a run that is expected to take so long, between the horizons by the logarithm."""
        logs, margins = self._table
        log = math.log(max(nanoseconds, 1.0))
        index = bisect_right(logs, log)
        if index in (0, len(logs)):
            found = margins[min(index, len(logs) - 1)]
        else:
            share = (log - logs[index - 1]) / (logs[index] - logs[index - 1])
            found = margins[index - 1] + share * (margins[index] - margins[index - 1])
        if self._damp < 1.0:
            found = max(min(found, 1.0), found * self._damp)  # no bound is below what is expected now
        else:
            found *= self._damp
        return found if found <= RESTED else RESTED + (found - RESTED) * self._ease

    def state(self) -> list[float]:
        """What another process on this machine may start from: a margin for each horizon."""
        return [horizon.margin for horizon in self._horizons]

    def restore(self, margins: Sequence[float]) -> None:
        """Start from what `state` returned."""
        for horizon, margin in zip(self._horizons, margins, strict=True):
            horizon.margin = min(max(float(margin), 0.1), horizon.most)
        self._refresh()

    def _keep(self, fitted_ns: float, actual_ns: float, slowness: float) -> None:
        if self._end == self._room:  # the older half makes room
            half = self._room - KEPT_STEPS
            self._fitted[: KEPT_STEPS + 1] = self._fitted[half:] - self._fitted[half]
            self._actual[: KEPT_STEPS + 1] = self._actual[half:] - self._actual[half]
            self._slowness[:KEPT_STEPS] = self._slowness[half:]
            self._end = KEPT_STEPS
        at = self._end
        self._fitted[at + 1] = self._fitted[at] + fitted_ns
        self._actual[at + 1] = self._actual[at] + actual_ns
        self._slowness[at] = slowness
        self._end = at + 1

    def _look(self, horizon: _Horizon) -> None:
        """Read the horizon's quantile off the latest steps."""
        begin = max(0, self._end - KEPT_STEPS)
        begin = max(begin, int(np.searchsorted(self._actual[: self._end], self._actual[self._end] - KEPT_NS)))
        fitted, actual = self._fitted[begin : self._end + 1], self._actual[begin : self._end + 1]
        slowness = self._slowness[begin : self._end]
        starts = np.arange(0, len(slowness), STRIDE if len(slowness) > EARLY else 1)
        ends = starts + 1
        if horizon.length:
            ends = np.maximum(np.searchsorted(fitted, fitted[starts] + horizon.length / slowness[starts]), ends)
        run = fitted[np.minimum(ends, len(slowness))] - fitted[starts]
        expected, damped = slowness[starts] * run, slowness[starts] ** DAMPING * run
        alike = ends <= len(slowness)
        if horizon.length:
            alike &= expected < 4 * horizon.length  # a longer step is no run of this length
        horizon.learn((actual[ends[alike]] - actual[starts[alike]]) / np.maximum(damped[alike], 1.0))

    def _refresh(self) -> None:
        """The table that `margin` reads: of horizons that were seen, or of all if none was; a longer run's bound is
        never less than a shorter one's."""
        known = [horizon for horizon in self._horizons if horizon.known] or self._horizons
        logs: list[float] = []
        margins: list[float] = []
        reached = 0.0
        for horizon in known:
            margin = max(horizon.margin, reached / horizon.place)
            reached = margin * horizon.place
            logs.append(math.log(horizon.place))
            margins.append(margin)
        self._table = logs, margins  # at once: admission reads it from another thread


class _Horizon:
    """Runs of one length."""

    def __init__(self, length: float, prior: float, coverage: float) -> None:
        self.length = length
        self.place = length or SHORTEST_NS
        self.most = max(MOST, 1.0 + MOST_NS / self.place)
        self.margin = prior  # of a machine as fast as it was measured
        self.known = False
        self._aim = 1.0 - coverage
        self._miss = self._aim
        self._actual = self._expected = 0.0
        self._slowness = self._stated = 1.0

    def add(self, expected_ns: float, actual_ns: float, slowness: float) -> None:
        """Go on with the present run: its expectation was made at the slowness of its first step."""
        if not self._expected:
            self._slowness, self._stated = slowness, self.margin * slowness ** (DAMPING - 1.0)
        self._actual += actual_ns
        self._expected += expected_ns * self._slowness / slowness
        if self._expected < self.length:
            return
        if self.known and (not self.length or self._expected < 4 * self.length):
            missed = self._actual > self._expected * self._stated
            self._miss = min(4 * self._aim, max(self._aim / 8, self._miss + RATE * self._aim * (self._aim - missed)))
        self._actual = self._expected = 0.0

    def learn(self, ratios: np.ndarray) -> None:
        """The latest runs of this length, overlapping: actual / (fitted * sqrt(slowness))."""
        if len(ratios) < ENOUGH:
            return
        rank = min(len(ratios), math.ceil((1.0 - self._miss) * (len(ratios) + 1))) - 1
        self.margin = min(float(np.partition(ratios, rank)[rank]), self.most)
        self.known = True

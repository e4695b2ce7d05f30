"""How many threads of an executor work on the next step: all of them, unless fewer are quicker.

Threads of a step wait for each other at every phase. Where another program holds one of the cores, or where a model is
so small that meeting costs more than sharing, one thread fewer computes the step sooner, and its time varies less.
Which it is depends on the step and on the moment, so it is measured: steps of one kind (point, and order of magnitude
of their tokens) run with the number of threads that was quickest lately, and now and then with one more or one fewer;
the more rarely, the oftener that was in vain. No bit of a result depends on it. Arithmetic on durations that are told;
knows no clock, no pool and no model.
"""

from __future__ import annotations

from collections import deque
from statistics import median

KEPT = 9
"""Latest durations of a kind and a number of threads that count."""
ENOUGH = 3
"""Durations without which a number of threads is not judged."""
BETTER = {-1: 0.99, 1: 0.92}
"""What one thread fewer, or one more, may take of the usual to be preferred: who adds nothing is in the way."""
CALM_STEPS = 512
"""Steps of a kind between two looks at one thread fewer while no thread was waited for."""
CROWDED_STEPS = 32
"""The same while threads are waited for."""
RETURN_STEPS = 48
"""Steps of a kind between two looks at one thread more."""
HOPELESS = 1.5
"""A look ends at once when a step takes so many times the usual."""
MOST_DOUBLED = 4
"""Looks in vain after which the pause before the next one grows no further."""


class Crew:
    """Chooses a number of threads, and learns from what steps took."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def choose(self, point: str, tokens: int, crowded: bool) -> int:
        """Threads for a step of so many tokens. `crowded`: a thread was waited for lately as if it had no core."""
        if self.threads == 1:
            return 1
        return self._kind(point, tokens).choose(crowded)

    def observe(self, point: str, tokens: int, threads: int, nanoseconds: int) -> None:
        """A step of so many tokens took `nanoseconds` with so many threads."""
        if self.threads > 1:
            self._kind(point, tokens).observe(threads, nanoseconds / max(1, tokens))

    def _kind(self, point: str, tokens: int) -> _Kind:
        name = point, tokens.bit_length()
        if name not in self._kinds:
            self._kinds[name] = _Kind(self.threads)
        return self._kinds[name]


class _Kind:
    """Steps of one order of magnitude."""

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._best = threads
        self._taken: dict[int, deque[float]] = {}  # threads -> latest nanoseconds a token
        self._since = {-1: 0, 1: 0}  # steps since one fewer, or one more, was last looked at
        self._vain = {-1: 0, 1: 0}  # how often that was for nothing
        self._trial: tuple[int, int] | None = None  # threads, and steps to go

    def choose(self, crowded: bool) -> int:
        if self._trial is not None:
            return self._trial[0]
        for way in self._since:
            self._since[way] += 1
        patience = {-1: CROWDED_STEPS if crowded else CALM_STEPS, 1: RETURN_STEPS}
        for way, steps in self._since.items():
            if 1 <= self._best + way <= self._most and steps >= patience[way] << self._vain[way]:
                self._since[way] = 0
                self._taken.pop(self._best + way, None)  # what it took before was another time
                self._trial = self._best + way, ENOUGH
                return self._trial[0]
        return self._best

    def observe(self, threads: int, nanoseconds: float) -> None:
        taken = self._taken.setdefault(threads, deque(maxlen=KEPT))
        taken.append(nanoseconds)
        if self._trial is None or self._trial[0] != threads:
            return
        left, way = self._trial[1] - 1, threads - self._best
        usual = self._taken.get(self._best, ())
        if left and not (usual and nanoseconds > HOPELESS * median(usual)):
            self._trial = threads, left
            return
        self._trial = None
        if len(taken) >= ENOUGH and usual and median(taken) < BETTER[way] * median(usual):
            self._best = threads
            self._since, self._vain = {-1: 0, 1: 0}, {-1: 0, 1: 0}
        else:
            self._vain[way] = min(MOST_DOUBLED, self._vain[way] + 1)

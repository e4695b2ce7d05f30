"""How often drafted tokens stand: counted by sequence and by trust, with what other sequences saw as the prior.

A drafted token is a trial if all before it stood. Estimates are those of a Beta prior: (hits + w * prior) / (trials +
w). Old trials fade, so that a text that changes is followed. Knows no tokens and no costs.
"""

from __future__ import annotations

from collections.abc import Sequence

_PRIOR_WEIGHT = 4.0
_FADE = 0.95
"""Of a sequence's counts, with each verified draft of its class."""
_SHARED_FADE = 0.995
_IDLE_FADE = 0.99
"""With each step in which the sequence drafted nothing, so that a bad spell is not held against it for ever."""


class _Count:
    __slots__ = ("hits", "trials")

    def __init__(self, hits: float = 0.0, trials: float = 0.0) -> None:
        self.hits = hits
        self.trials = trials

    def add(self, stood: int, drafted: int, fade: float) -> None:
        self.hits = self.hits * fade + stood
        self.trials = self.trials * fade + stood + (1 if stood < drafted else 0)

    def fade(self, by: float) -> None:
        self.hits *= by
        self.trials *= by


class Acceptance:
    """Estimates for one proposer."""

    def __init__(self, expected: Sequence[float]) -> None:
        """`expected`: the share that stands by trust, before anything was seen."""
        self._shared = [_Count(share * 2 * _PRIOR_WEIGHT, 2 * _PRIOR_WEIGHT) for share in expected]
        self._of: dict[int, list[_Count]] = {}

    def estimate(self, key: int, trust: int) -> float:
        """Chance that a drafted token of this class stands if all before it did."""
        shared = self._shared[trust]
        prior = shared.hits / shared.trials
        counts = self._of.get(key)
        if counts is None:
            return prior
        return (counts[trust].hits + _PRIOR_WEIGHT * prior) / (counts[trust].trials + _PRIOR_WEIGHT)

    def observe(self, key: int, trust: int, drafted: int, stood: int) -> None:
        """A draft of `drafted` tokens was verified and `stood` of them were right."""
        if drafted:
            self._counts(key)[trust].add(stood, drafted, _FADE)
            shared = self._shared[trust]
            shared.add(stood, drafted, _SHARED_FADE)
            if shared.trials < _PRIOR_WEIGHT:  # never so few that one draft decides
                shared.fade(_PRIOR_WEIGHT / shared.trials)

    def idle(self, key: int) -> None:
        """A step passed without a draft."""
        for count in self._of.get(key, ()):
            count.fade(_IDLE_FADE)

    def release(self, key: int) -> None:
        """The sequence is gone."""
        self._of.pop(key, None)

    def _counts(self, key: int) -> list[_Count]:
        if key not in self._of:
            self._of[key] = [_Count() for _ in self._shared]
        return self._of[key]

"""How many tokens to draft for whom: arithmetic on chances and times, no model and no clock.

Every drafted token has a chance to stand: of the j-th of a sequence that is p^j. Tokens are taken in the order of their
chance, as many as make expected tokens per second greatest. A sequence in the step that drafts little must not pay for
those that draft much: what the step grows by is bounded by what the least lucky sequence gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PATIENCE = 0.05
"""Share by which a step may grow at the expense of sequences that gain nothing from it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence for which tokens could be drafted."""

    key: int
    chance: float
    """That a drafted token stands if those before it do."""
    most: int
    rounds: bool = False
    """Its tokens are made one after the other, in rounds that take time."""


def choose_lengths(
    candidates: Sequence[Candidate],
    decoding: int,
    step_ns: Callable[[int], float],
    round_ns: Callable[[int], float],
    *,
    spare: int,
    limit_ns: float | None = None,
    alone: bool = True,
) -> dict[int, int]:
    """Tokens to draft by key; keys without any are left out.

    A step without drafts computes `decoding` tokens, one or more of each candidate. `step_ns(m)` is the time of a step
    of `m` tokens, `round_ns(n)` that of a drafting round over `n` sequences. `spare` bounds the drafted tokens
    together; `limit_ns` is the longest that the step and its rounds may take; `alone` is False if others than the
    candidates wait for it to end."""
    tokens = sorted(
        ((c.chance**j, -j, c) for c in candidates for j in range(1, c.most + 1)),
        key=lambda each: (each[0], each[1]),
        reverse=True,
    )[: max(spare, 0)]
    plain = step_ns(decoding)
    best_rate, best = decoding / plain, 0
    gains = dict.fromkeys((c.key for c in candidates), 0.0)
    width: list[int] = []  # sequences in each drafting round
    for count, (chance, minus_j, candidate) in enumerate(tokens, 1):
        gains[candidate.key] += chance
        if candidate.rounds:
            if -minus_j > len(width):
                width.append(0)
            width[-minus_j - 1] += 1
        time = step_ns(decoding + count) + sum(round_ns(each) for each in width)
        least = min(gains.values()) if alone else 0.0
        if limit_ns is not None and time > limit_ns:
            continue
        if time > plain * (1 + PATIENCE) * (1 + least):
            continue
        rate = (decoding + sum(gains.values())) / time
        if rate > best_rate:
            best_rate, best = rate, count
    lengths: dict[int, int] = {}
    for _, _, candidate in tokens[:best]:
        lengths[candidate.key] = lengths.get(candidate.key, 0) + 1
    return lengths

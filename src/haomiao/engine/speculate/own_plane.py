"""The model as its own draft: a switchable, cheaper point drafts on the very K/V that the next step overwrites.

The draft's K and V stand where those of the verified tokens will, inside the room that the step was given; the step
computes all of these positions again at its own point before it attends to them, so that no trace is left. Knows
executors and sequences; not how many tokens are worth drafting.
"""

from __future__ import annotations

from collections.abc import Sequence

from haomiao.engine.generation import Generation
from haomiao.engine.speculate.costs import StepCosts
from haomiao.engine.speculate.proposer import Ask, Offer
from haomiao.engine.speculate.rounds import Track, run_rounds
from haomiao.types import Executor


class OwnPlaneProposer:
    """Implements `Proposer` with the engine's own executor at `point`."""

    name = "self"
    expected: tuple[float, ...] = (0.75,)

    def __init__(self, executor: Executor, point: str, costs: StepCosts) -> None:
        self.costs: str | None = point
        self._executor = executor
        self._point = point
        self._costs = costs

    def offer(self, sequence: Generation, most: int, point: str) -> Offer | None:
        """As `Proposer.offer`; nothing for a step that runs at the drafting point itself."""
        return None if point == self._point else Offer(most)

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As `Proposer.draft`. The KV of each sequence has room for its tokens and `count` more."""
        tracks = []
        for ask in asks:
            verified = len(ask.sequence.tokens)
            tracks.append(Track(ask.sequence.shadow(), verified, ask.computed, ask.sequence.kv.snapshot(), ask.count))
        run_rounds(self._executor, self._point, tracks, self._costs, self._point)
        return [track.drafted for track in tracks]

    def release(self, key: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""

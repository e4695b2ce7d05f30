"""Who proposes tokens: the protocol. Knows nothing about how many are worth it, or how they are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from haomiao.engine.generation import Generation


@dataclass(frozen=True, slots=True)
class Offer:
    """What a proposer could draft for one sequence."""

    count: int
    """Tokens at most."""
    trust: int = 0
    """Which class of offers it belongs to; acceptance is counted by class."""
    tokens: tuple[int, ...] | None = None
    """The tokens, where they are known at once; None: `draft` makes them, and that takes time."""


@dataclass(slots=True)
class Ask:
    """`count` tokens are wanted after the tokens of `sequence`, whose KV has room for them."""

    sequence: Generation
    computed: int
    """Tokens in KV; room for the rest of the tokens and for the draft was made behind them."""
    count: int


class Proposer(Protocol):
    """One way to propose tokens. What it remembers of a sequence is kept by the sequence's key until `release`."""

    name: str
    expected: tuple[float, ...]
    """Share of drafted tokens that stand, by trust, before anything was seen."""
    costs: str | None
    """The name under which its rounds are timed (`StepCosts`); None if proposing costs nothing worth counting."""

    def offer(self, sequence: Generation, most: int, point: str) -> Offer | None:
        """What can be drafted for the sequence, at most `most` tokens, if the step runs at `point`; None: nothing."""
        ...

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Tokens for each ask, as many as wanted or fewer. Only for offers without tokens."""
        ...

    def release(self, key: int) -> None:
        """The sequence is gone; idempotent."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...

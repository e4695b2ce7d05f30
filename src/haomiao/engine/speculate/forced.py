"""A proposer that knows the answer and errs at a stated rate: step costs at forced acceptance, and tests.

Around another proposer it lets that one draft, for its cost, and hands out its own tokens instead. Never part of
serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from haomiao.engine.generation import Generation
from haomiao.engine.random import uniform
from haomiao.engine.speculate.proposer import Ask, Offer, Proposer


class ForcedProposer:
    """Implements `Proposer`: each token is the answer's with probability `rate`, else another one."""

    expected: tuple[float, ...]

    def __init__(
        self,
        answer: Callable[[Generation], Sequence[int]],
        rate: float,
        *,
        around: Proposer | None = None,
        name: str = "forced",
        seed: int = 0,
    ) -> None:
        """`answer` gives the whole answer (without the prompt) of a sequence, as far as it is known."""
        self.name = name
        self.expected = (rate,)
        self.costs = None if around is None else around.costs
        self._answer = answer
        self._rate = rate
        self._around = around
        self._seed = seed

    def offer(self, sequence: Generation, most: int, point: str) -> Offer | None:
        """As `Proposer.offer`."""
        tokens = self._tokens(sequence, most)
        if not tokens:
            return None
        if self._around is None:
            return Offer(len(tokens), 0, tuple(tokens))
        inner = self._around.offer(sequence, len(tokens), point)
        return None if inner is None else Offer(inner.count)

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As `Proposer.draft`; fewer tokens where the other proposer had fewer."""
        if self._around is None:
            return [[] for _ in asks]
        drafts = self._around.draft(asks)
        return [self._tokens(ask.sequence, len(draft)) for ask, draft in zip(asks, drafts, strict=True)]

    def release(self, key: int) -> None:
        """As `Proposer.release`."""
        if self._around is not None:
            self._around.release(key)

    def close(self) -> None:
        """As `Proposer.close`."""
        if self._around is not None:
            self._around.close()

    def _tokens(self, sequence: Generation, most: int) -> list[int]:
        vocab_size = sequence.job.vocab_size
        known = self._answer(sequence)[sequence.produced : sequence.produced + most]
        position = len(sequence.tokens)
        return [
            token if uniform(self._seed, position + index, sequence.sample) < self._rate else (token + 1) % vocab_size
            for index, token in enumerate(known)
        ]

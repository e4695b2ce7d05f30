"""A small model that drafts for a large one of the same vocabulary: an executor and KV of its own.

It reads what the sequence has read, in chunks of its own steps, before it drafts anything; after a verification it
keeps what stood. When its KV runs out, the sequence drafted for longest ago is forgotten. Knows nothing about the large
model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from haomiao.engine.generation import Generation
from haomiao.engine.speculate.costs import StepCosts
from haomiao.engine.speculate.proposer import Ask, Offer
from haomiao.engine.speculate.rounds import Track, run_rounds
from haomiao.engine.state import BlockPool, PagedState
from haomiao.errors import KvExhaustedError
from haomiao.types import Executor, StepBatch

ROUNDS = "draft model"
"""The name of its rounds in `StepCosts`."""


@dataclass(slots=True)
class _Read:
    """What the model has in KV of one sequence: its first `verified` tokens, and the `tail` that was drafted."""

    state: PagedState
    verified: int = 0
    tail: list[int] = field(default_factory=list)


class DraftModelProposer:
    """Implements `Proposer` with another executor, whose vocabulary must be that of the engine's."""

    name = "draft"
    expected: tuple[float, ...] = (0.6,)

    def __init__(self, executor: Executor, point: str, max_context: int, costs: StepCosts) -> None:
        """`max_context`: tokens after which the draft model has nothing to say."""
        self.costs: str | None = ROUNDS
        self._executor = executor
        self._point = point
        self._max_context = max_context
        self._step_costs = costs
        self._pool = BlockPool(executor.kv_blocks, executor.kv_bytes_per_block, executor.copy_blocks)
        self._reads: dict[int, _Read] = {}  # by key, drafted for longest ago first

    def offer(self, sequence: Generation, most: int, point: str) -> Offer | None:
        """As `Proposer.offer`."""
        count = min(most, self._max_context - len(sequence.tokens))
        return Offer(count) if count > 0 else None

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As `Proposer.draft`. A sequence that has not been read to its end yet gets nothing this time."""
        for ask in asks:  # the last to be forgotten
            key = ask.sequence.key
            self._reads[key] = self._reads.pop(key) if key in self._reads else _Read(PagedState(self._pool))
        busy = {ask.sequence.key for ask in asks}
        tracks = {ask.sequence.key: track for ask in asks if (track := self._track(ask, busy)) is not None}
        try:
            run_rounds(self._executor, self._point, list(tracks.values()), self._step_costs, ROUNDS)
        finally:
            for key, track in tracks.items():
                read = self._reads[key]
                read.state.truncate(track.computed)
                read.tail = track.shadow.tokens[read.verified : track.computed]
        return [tracks[ask.sequence.key].drafted if ask.sequence.key in tracks else [] for ask in asks]

    def release(self, key: int) -> None:
        """As `Proposer.release`."""
        read = self._reads.pop(key, None)
        if read is not None:
            read.state.release()

    def close(self) -> None:
        """As `Proposer.close`."""
        for key in list(self._reads):
            self.release(key)
        self._executor.close()

    def check_integrity(self) -> None:
        """Raise `EngineError` if one of its KV blocks is lost."""
        self._pool.check_integrity([read.state for read in self._reads.values()])

    def _track(self, ask: Ask, busy: set[int]) -> Track | None:
        """Read on. Returns what drafts, with room for the draft, once all but the last token was read."""
        tokens, read = ask.sequence.tokens, self._reads[ask.sequence.key]
        for drafted, token_id in zip(read.tail, tokens[read.verified : -1], strict=False):
            if drafted != token_id:
                break
            read.verified += 1
        read.tail = []
        read.state.truncate(read.verified)
        chunk = tokens[read.verified : min(len(tokens) - 1, read.verified + self._executor.max_step_tokens)]
        if chunk:
            if not self._make_room(read.state, len(chunk), busy):
                return None
            self._read(read, chunk)
        if read.verified < len(tokens) - 1 or not self._make_room(read.state, ask.count, busy):
            return None
        return Track(ask.sequence.shadow(), len(tokens), read.verified, read.state.snapshot(), ask.count)

    def _read(self, read: _Read, tokens: Sequence[int]) -> None:
        """Compute K and V of the next tokens, for which there is room."""
        batch = StepBatch(
            np.array(tokens, np.int32),
            np.array([0, len(tokens)], np.int32),
            np.array([read.verified], np.int32),
            read.state.snapshot()[None, :],
            np.zeros(0, np.int32),
            self._point,
        )
        try:
            self._executor.step(batch)
        except BaseException:
            read.state.truncate(read.verified)
            raise
        read.verified += len(tokens)

    def _make_room(self, state: PagedState, tokens: int, busy: set[int]) -> bool:
        """Room for `tokens` more, taken from sequences that were drafted for longest ago if need be."""
        while True:
            try:
                state.append(tokens)
            except KvExhaustedError:
                oldest = next((key for key in self._reads if key not in busy), None)
                if oldest is None:
                    return False
                self.release(oldest)
            else:
                return True

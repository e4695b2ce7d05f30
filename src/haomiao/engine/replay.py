"""Runs an answer again from its prompt: at the points it was served at, and at the most accurate one, side by side.

Each side has K and V of its own, so that what an error in K and V does to later tokens is measured too. The served side
is computed again rather than kept: bits are fixed by the schedule (docs/ARCHITECTURE.md, section 6), and an answer's
logits would fill the memory. Knows executors and blocks; nothing about when there is time.
"""

from __future__ import annotations

import numpy as np

from haomiao.engine.generation import Generation
from haomiao.engine.state import BlockPool, PagedState
from haomiao.metrics.divergence import kl_divergence, top1_agreement
from haomiao.types import F32, Executor, Receipt, StepBatch

CHUNK = 16
"""Tokens of one step: a request that comes meanwhile waits for no more than that."""
PROMPT_CHUNK = 64
"""The same, where no logits are wanted."""


class Replay:
    """One answer being run again."""

    def __init__(
        self, tokens: list[int], first_row: int, runs: list[tuple[str, int]], reference: str, receipt: Receipt
    ):
        """`first_row` is the position whose row predicts the answer's first token, `runs` the points by position:
        (point, end). The last token is not computed, for nothing follows it."""
        self.receipt = receipt
        points = {point for point, _ in runs}
        self.point = points.pop() if len(points) == 1 else "mixed"
        self._tokens = tokens
        self._first_row = first_row
        self._runs = runs
        self._reference = reference
        self._at = 0
        self.states: list[PagedState] = []
        self._kl: list[float] = []
        self._same: list[float] = []

    @classmethod
    def of(cls, sequence: Generation, receipt: Receipt, reference: str) -> Replay | None:
        """An answer that ended. None if nobody can say at which point each of its tokens was computed, because KV was
        lost and computed again at another one."""
        end = len(sequence.tokens) - 1
        schedule = receipt.schedule
        if end < 1 or not schedule or not sequence.produced:
            return None
        if len({entry.point for entry in schedule}) == 1:
            runs = [(schedule[0].point, end)]
        else:
            at, runs = receipt.cached_tokens, []
            for entry in schedule:
                at += entry.tokens
                runs.append((entry.point, at))
            if at not in (end, end + 1):
                return None
            runs[-1] = (runs[-1][0], end)
        return cls(list(sequence.tokens), sequence.prompt_length - 1, runs, reference, receipt)

    def open(self, pool: BlockPool) -> None:
        """Begin: nothing is computed yet."""
        self.states = [PagedState(pool), PagedState(pool)]

    def advance(self, executor: Executor) -> bool:
        """Compute the next chunk on both sides. True when the end is reached. Raises `KvExhaustedError`."""
        point, end = next((point, end) for point, end in self._runs if end > self._at)
        most = CHUNK if self._at + PROMPT_CHUNK > self._first_row else PROMPT_CHUNK
        upto = min(end, self._at + min(most, executor.max_step_tokens))
        served = self._step(executor, self.states[0], point, upto)
        accurate = self._step(executor, self.states[1], self._reference, upto)
        if accurate.shape[0]:
            self._kl += [float(each) for each in kl_divergence(accurate, served)]
            self._same += [float(each) for each in top1_agreement(accurate, served)]
        self._at = upto
        return upto >= self._runs[-1][1]

    def result(self) -> tuple[float, float]:
        """Mean KL and top-1 agreement over the answer's tokens."""
        return float(np.mean(self._kl)), float(np.mean(self._same))

    def close(self) -> None:
        """Give the KV back; idempotent."""
        for state in self.states:
            state.release()
        self.states = []

    def _step(self, executor: Executor, state: PagedState, point: str, upto: int) -> F32:
        """Tokens up to `upto` on one side; logits of those that predict the answer, a copy."""
        state.append(upto - self._at)
        rows = np.arange(max(self._first_row, self._at), upto, dtype=np.int32) - self._at
        batch = StepBatch(
            np.array(self._tokens[self._at : upto], np.int32),
            np.array([0, upto - self._at], np.int32),
            np.array([self._at], np.int32),
            state.snapshot()[None, :],
            rows.astype(np.int32),
            point,
        )
        logits: F32 = executor.step(batch).logits.copy()
        return logits

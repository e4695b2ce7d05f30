"""Runs a span of a step again, at another point, over the same K and V as served, and leaves no trace.

The blocks that the span writes are scratch ones; those before it are read as they are. Knows executors and blocks;
nothing about why a span is run again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from haomiao.engine.state import BlockPool
from haomiao.types import F32, KV_BLOCK_TOKENS, Executor, StepBatch

SPARE_BLOCKS = 8
"""Blocks that must be left besides the scratch ones: shadows take no KV that the next steps will need."""


class Shadow:
    """Shadow runs on one executor and its blocks."""

    def __init__(self, executor: Executor, pool: BlockPool) -> None:
        self._executor = executor
        self._pool = pool

    def again(self, point: str, tokens: Sequence[int], past: int, blocks: Sequence[int], rows: int) -> F32 | None:
        """Logits float32 [rows, vocab] of the first `rows` of the tokens at positions `past` and on, a copy; None if
        the pool is too full. `blocks` hold the K and V of the `past` tokens before."""
        first, end = past // KV_BLOCK_TOKENS, past + len(tokens)
        needed = -(-end // KV_BLOCK_TOKENS) - first
        if self._pool.available < needed + SPARE_BLOCKS:
            return None
        scratch = self._pool.allocate(needed)
        try:
            if past % KV_BLOCK_TOKENS:
                self._pool.copy(blocks[first], scratch[0])
            table = np.array([[*blocks[:first], *scratch]], np.int32)
            ids = np.array(tokens, np.int32)
            starts = np.array([0, len(tokens)], np.int32)
            wanted = np.arange(rows, dtype=np.int32)
            batch = StepBatch(ids, starts, np.array([past], np.int32), table, wanted, point)
            logits: F32 = self._executor.step(batch).logits.copy()
            return logits
        finally:
            self._pool.drop(scratch)

"""What changes from step to step, as one block of int32 that goes to the device in one copy.

    tokens [T] | positions [T] | slots [T] | owners [T] | rows [R] | starts [B] | counts [B] | tables [S, W]

T tokens, padded to what the launch is made for; padding tokens are position 0 of a block nobody reads. Knows sizes and
the batch; no operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from haomiao.engine.executors.torch.launch import Queries
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.types import I32, KV_BLOCK_TOKENS, StepBatch

LEAST_SPLIT, MOST_SPLITS = 64, 32
"""A program of a decode step's attention has at least so many positions; more where else there were too many parts."""
PREFILL_QUERIES = 16
"""Tokens of one sequence that attend together in a step of many."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a launch is made for. Everything is an upper bound: smaller steps are padded."""

    tokens: int
    rows: int
    blocks: int
    """Blocks of queries."""
    sequences: int
    table_width: int
    queries: int
    """Tokens of a block of queries."""
    split: int
    """Positions of one program, 0: all."""
    splits: int

    @property
    def words(self) -> int:
        """int32 numbers of the inputs."""
        return 4 * self.tokens + self.rows + 2 * self.blocks + self.sequences * self.table_width


def decode_size(tokens: int, context: int) -> StepSize:
    """A step in which every token is worked off by itself: decoding, or a few drafted tokens. The splits cover
    `context` positions."""
    width, split = -(-context // KV_BLOCK_TOKENS), LEAST_SPLIT
    while split * MOST_SPLITS < context:
        split *= 2
    return StepSize(tokens, tokens, tokens, tokens, width, 1, split, -(-context // split))


def long_size(tokens: int) -> StepSize:
    """A prompt of that many tokens, one row of which is wanted."""
    return StepSize(tokens, 1, -(-tokens // PREFILL_QUERIES), 1, -(-tokens // KV_BLOCK_TOKENS), PREFILL_QUERIES, 0, 1)


def prefill_size(batch: StepBatch) -> StepSize:
    """Just this step."""
    lengths = np.diff(batch.span_starts)
    blocks = int((-(-lengths // PREFILL_QUERIES)).sum())
    width = max(1, int((-(-(batch.past + lengths) // KV_BLOCK_TOKENS)).max()))
    return StepSize(batch.tokens, int(batch.logit_rows.size), blocks, int(lengths.size), width, PREFILL_QUERIES, 0, 1)


def fill(words: I32, size: StepSize, batch: StepBatch, padding_block: int) -> None:
    """Write a step's inputs into int32 [size.words]."""
    t, count = size.tokens, batch.tokens
    lengths = np.diff(batch.span_starts)
    owners = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    positions = batch.past[owners] + np.arange(count, dtype=np.int32) - batch.span_starts[owners]
    blocks = batch.block_tables[owners, positions // KV_BLOCK_TOKENS]
    fields = np.split(words, np.cumsum([t, t, t, t, size.rows, size.blocks, size.blocks]))
    for field, values, rest in (
        (fields[0], batch.token_ids, 0),
        (fields[1], positions, 0),
        (fields[2], blocks * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS, padding_block * KV_BLOCK_TOKENS),
        (fields[3], owners, 0),
        (fields[4], batch.logit_rows, 0),
    ):
        field[: values.size] = values
        field[values.size :] = rest
    starts = np.concatenate(
        [
            np.arange(a, b, size.queries, dtype=np.int32)
            for a, b in zip(batch.span_starts, batch.span_starts[1:], strict=False)
        ]
    )
    ends = batch.span_starts[1:][owners[starts]]
    fields[5][: starts.size] = starts
    fields[6][: starts.size] = np.minimum(ends - starts, size.queries)
    fields[5][starts.size :] = 0
    fields[6][starts.size :] = 0
    tables = fields[7].reshape(size.sequences, size.table_width)
    given = batch.block_tables[:, : size.table_width]
    tables[: given.shape[0], : given.shape[1]] = np.maximum(given, 0)  # unused entries are -1, and never read


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The block on the device, cut into its fields."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    queries: Queries


def views(words: Tensor, size: StepSize) -> StepInputs:
    """Fields of int32 [size.words]."""
    t = size.tokens
    sizes = [t, t, t, t, size.rows, size.blocks, size.blocks, size.sequences * size.table_width]
    tokens, positions, slots, owners, rows, starts, counts, tables = torch.split(words[: size.words], sizes)
    queries = Queries(
        positions, tables.view(size.sequences, size.table_width), owners, starts, counts,
        size.queries, size.split, size.splits,
    )  # fmt: skip
    return StepInputs(tokens, positions, slots, rows, queries)

"""What changes from step to step, as one block of int32 that goes to the device in one copy.

    tokens [T] | positions [T] | slots [T] | owners [T] | rows [R] | starts [B] | counts [B] | tables [S, W]
    and, where rows are drawn, from an even place on, floats as their bits:
    uniform [2 R] | top_p [2 R] | temperature [R] | min_p [R] | top_k [R]

T tokens, padded to what the launch is made for; padding tokens are position 0 of a block nobody reads, padding rows are
not drawn. Knows sizes and the batch; no operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from haomiao.engine.executors.torch.attending import Queries
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.engine.executors.torch.twins import Draws
from haomiao.types import I32, KV_BLOCK_TOKENS, RowDraws, StepBatch

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
    drawn: bool = False
    """Rows are drawn."""

    @property
    def fixed(self) -> int:
        """int32 numbers of the inputs, without what draws rows."""
        return 4 * self.tokens + self.rows + 2 * self.blocks + self.sequences * self.table_width

    @property
    def draws_at(self) -> int:
        """Where that begins: float64 need an even place."""
        return self.fixed + self.fixed % 2

    @property
    def words(self) -> int:
        """int32 numbers of the inputs."""
        return self.draws_at + 7 * self.rows if self.drawn else self.fixed


def decode_size(tokens: int, context: int, drawn: bool = False) -> StepSize:
    """A step in which every token is worked off by itself: decoding, or a few drafted tokens. The splits cover
    `context` positions."""
    width, split = -(-context // KV_BLOCK_TOKENS), LEAST_SPLIT
    while split * MOST_SPLITS < context:
        split *= 2
    return StepSize(tokens, tokens, tokens, tokens, width, 1, split, -(-context // split), drawn)


def long_size(tokens: int) -> StepSize:
    """A prompt of that many tokens, one row of which is wanted, and drawn."""
    width, blocks = -(-tokens // KV_BLOCK_TOKENS), -(-tokens // PREFILL_QUERIES)
    return StepSize(tokens, 1, blocks, 1, width, PREFILL_QUERIES, 0, 1, drawn=True)


def prefill_size(batch: StepBatch) -> StepSize:
    """Just this step."""
    lengths = np.diff(batch.span_starts)
    blocks = int((-(-lengths // PREFILL_QUERIES)).sum())
    width = max(1, int((-(-(batch.past + lengths) // KV_BLOCK_TOKENS)).max()))
    drawn = batch.draws is not None
    rows = int(batch.logit_rows.size)
    return StepSize(batch.tokens, rows, blocks, int(lengths.size), width, PREFILL_QUERIES, 0, 1, drawn)


def fill(words: I32, size: StepSize, batch: StepBatch, padding_block: int) -> None:
    """Write a step's inputs into int32 [size.words]. A decode step waits for this: few numpy calls."""
    count, spans = batch.tokens, batch.past.size
    owners, positions = counting(spans), batch.past
    if count > spans:  # not one token each
        owners = np.repeat(owners, np.diff(batch.span_starts))
        positions = (batch.past - batch.span_starts[:-1])[owners] + counting(count)
    blocks = batch.block_tables[owners, positions // KV_BLOCK_TOKENS]
    slots = blocks * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS
    starts, counts = _query_blocks(size, batch, owners)
    at, t = 0, size.tokens
    for length, values, rest in (
        (t, batch.token_ids, 0),
        (t, positions, 0),
        (t, slots, padding_block * KV_BLOCK_TOKENS),
        (t, owners, 0),
        (size.rows, batch.logit_rows, 0),
        (size.blocks, starts, 0),
        (size.blocks, counts, 0),
    ):
        words[at : at + values.size] = values
        if values.size < length:
            words[at + values.size : at + length] = rest
        at += length
    tables = words[at : size.fixed].reshape(size.sequences, size.table_width)
    given = batch.block_tables[:, : size.table_width]
    np.maximum(given, 0, out=tables[: given.shape[0], : given.shape[1]])  # unused entries are -1, and never read
    if size.drawn:
        _fill_draws(words[size.draws_at :], size.rows, batch.draws)


_FIRST: I32 = np.arange(64, dtype=np.int32)


def counting(n: int) -> I32:
    """0, 1, 2 ... n - 1; not to be written to."""
    return _FIRST[:n] if n <= _FIRST.size else np.arange(n, dtype=np.int32)


def _query_blocks(size: StepSize, batch: StepBatch, owners: I32) -> tuple[I32, I32]:
    """The first token of every block of queries, and how many it has: at most `size.queries` of one span."""
    if size.queries == 1:
        return counting(batch.tokens), np.ones(batch.tokens, np.int32)
    spans = zip(batch.span_starts, batch.span_starts[1:], strict=False)
    starts = np.concatenate([np.arange(a, b, size.queries, dtype=np.int32) for a, b in spans])
    return starts, np.minimum(batch.span_starts[1:][owners[starts]] - starts, size.queries)


def _fill_draws(words: I32, rows: int, draws: RowDraws | None) -> None:
    """Write how rows are drawn; padding is not."""
    words.fill(0)
    if draws is None:
        return
    wide, narrow = words[: 4 * rows].view(np.float64), words[4 * rows :].view(np.float32)
    count = draws.uniform.size
    wide[:count], wide[rows : rows + count] = draws.uniform, draws.top_p
    narrow[:count], narrow[rows : rows + count] = draws.temperature, draws.min_p
    words[6 * rows : 6 * rows + count] = draws.top_k


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The block on the device, cut into its fields."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    queries: Queries
    draws: Draws | None


def views(words: Tensor, size: StepSize) -> StepInputs:
    """Fields of int32 [size.words]."""
    t = size.tokens
    sizes = [t, t, t, t, size.rows, size.blocks, size.blocks, size.sequences * size.table_width]
    tokens, positions, slots, owners, rows, starts, counts, tables = torch.split(words[: size.fixed], sizes)
    queries = Queries(
        positions, tables.view(size.sequences, size.table_width), owners, starts, counts,
        size.queries, size.split, size.splits,
    )  # fmt: skip
    return StepInputs(tokens, positions, slots, rows, queries, _draws(words[size.draws_at :], size))


def _draws(words: Tensor, size: StepSize) -> Draws | None:
    if not size.drawn:
        return None
    r = size.rows
    uniform, top_p, temperature, min_p, top_k = torch.split(words, [2 * r, 2 * r, r, r, r])
    wide, narrow = torch.float64, torch.float32
    return Draws(uniform.view(wide), top_p.view(wide), temperature.view(narrow), min_p.view(narrow), top_k)

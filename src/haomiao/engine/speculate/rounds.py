"""Drafting with a model: rounds of one token for each sequence, each the next step of an executor.

A shadow of the sequence chooses from the drafting model's logits as the sequence itself would: with its penalties, its
grammar, and the random number of each position, so that sampled answers are drafted as well as greedy ones. Knows
neither where K and V lie nor what is done with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from haomiao.engine.draw import row_draws
from haomiao.engine.generation import Generation
from haomiao.engine.speculate.costs import StepCosts
from haomiao.errors import HaomiaoError
from haomiao.types import I32, Executor, StepBatch


@dataclass(slots=True)
class Track:
    """One sequence while it is drafted."""

    shadow: Generation
    verified: int
    """Its tokens when drafting began."""
    computed: int
    """Tokens in the drafting model's KV."""
    table: I32
    """Its KV blocks, int32 [blocks], with room for `verified + wanted` tokens."""
    wanted: int
    open: bool = True

    @property
    def drafted(self) -> list[int]:
        """The tokens so far, at most those wanted."""
        return self.shadow.tokens[self.verified : self.verified + self.wanted]


def run_rounds(executor: Executor, point: str, tracks: Sequence[Track], costs: StepCosts, name: str) -> int:
    """Draft until every track has what it wants or its answer would end. Returns the executor's nanoseconds.

    An end is not drafted: the row before it tells it anyway. A grammar's forced tokens come along without a round.
    """
    total = 0
    while going := _fitting(tracks, executor.max_step_tokens):
        batch = _batch(going, point, bool(getattr(executor, "draws", False)))
        result = executor.step(batch)
        total += result.elapsed_ns
        if batch.tokens == len(going):
            costs.observe(name, batch.tokens, result.elapsed_ns)
        for index, track in enumerate(going):
            track.computed = len(track.shadow.tokens)
            try:
                drawn = -1 if result.drawn is None else int(result.drawn[index])
                progress = track.shadow.advance(result.logits[index], int(result.argmax[index]), drawn)
            except HaomiaoError:  # logits that are not finite, say: what was drafted before may still stand
                track.open = False
                continue
            if progress.detail is not None:
                track.shadow.tokens.pop()
                track.open = False
            elif len(track.shadow.tokens) >= track.verified + track.wanted:
                track.open = False
    return total


def _fitting(tracks: Sequence[Track], most: int) -> list[Track]:
    """The open tracks that fit one step of `most` tokens; others end here."""
    going: list[Track] = []
    for track in tracks:
        if track.open:
            most -= len(track.shadow.tokens) - track.computed
            track.open = most >= 0
            if track.open:
                going.append(track)
    return going


def _batch(tracks: Sequence[Track], point: str, draws: bool) -> StepBatch:
    """The tokens that are not computed yet, the last row of each track, drawn by the executor if it `draws`."""
    token_ids: list[int] = []
    starts = [0]
    tables = np.full((len(tracks), max(track.table.shape[0] for track in tracks)), -1, np.int32)
    for index, track in enumerate(tracks):
        token_ids += track.shadow.tokens[track.computed :]
        starts.append(len(token_ids))
        tables[index, : track.table.shape[0]] = track.table
    span_starts = np.array(starts, np.int32)
    return StepBatch(
        np.array(token_ids, np.int32),
        span_starts,
        np.array([track.computed for track in tracks], np.int32),
        tables,
        span_starts[1:] - 1,
        point,
        np.array([track.shadow.argmax_suffices for track in tracks], np.bool_),
        draws=row_draws([track.shadow.drawings(1)[0] for track in tracks]) if draws else None,
    )

"""Prompts that begin alike and have not begun: who computes the common part, and who waits for it.

Two sequences without KV that lack the same block would both compute it wherever a step has room for both. The less
urgent one waits instead, as long as one before it computes that very block, and finds it in the prefix cache in the
next step: the step it is left out of is shorter by its tokens. Its forecast stays what it was, that of computing
everything after the other, so no promise depends on it. Knows sequences and views; what a step
holds is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from haomiao.engine import scheduler
from haomiao.engine.batch import reusable
from haomiao.engine.cost import Cost
from haomiao.engine.roster import Roster
from haomiao.engine.scheduler import SchedulerState, SequenceView, StepPlan, urgency
from haomiao.engine.sequence import Sequence
from haomiao.types import KV_BLOCK_TOKENS


def plan(now: int, state: SchedulerState, cost: Cost | None, roster: Roster) -> StepPlan:
    """The scheduler's plan without those that wait for what another computes, if those others are in it."""
    waits_for = waiting_for((roster[view.key], view) for view in state.sequences)
    if waits_for:
        others = tuple(view for view in state.sequences if view.key not in waits_for)
        found = scheduler.plan(now, replace(state, sequences=others), cost)
        if not found.preempt and {span.key for span in found.spans}.issuperset(waits_for.values()):
            return found
    return scheduler.plan(now, state, cost)


def waiting_for(live: Iterable[tuple[Sequence, SequenceView]]) -> dict[int, int]:
    """Of those that have not begun: the key of each that lacks what one before it is about to compute, with that one's
    key. Who is waited for waits for nobody."""
    found: dict[int, int] = {}
    ahead: dict[tuple[str, bytes, tuple[int, ...]], list[tuple[Sequence, SequenceView]]] = {}
    prefilling = [(sequence, view) for sequence, view in live if not view.decoding and sequence.names is not None]
    if len(prefilling) < 2:
        return found
    for sequence, view in sorted(prefilling, key=lambda pair: (not pair[1].running, urgency(pair[1]))):
        begin = view.point, sequence.job.request.salt, tuple(sequence.tokens[:KV_BLOCK_TOKENS])
        leaders = ahead.setdefault(begin, [])
        leader = None if view.running else _leader(sequence, view, leaders)
        if leader is None:
            leaders.append((sequence, view))
        else:
            found[view.key] = leader
    return found


def _leader(sequence: Sequence, view: SequenceView, leaders: list[tuple[Sequence, SequenceView]]) -> int | None:
    """Who computes the block that the sequence lacks next, where it may be had from the prefix cache."""
    end = (view.length // KV_BLOCK_TOKENS + 1) * KV_BLOCK_TOKENS
    if end > reusable(sequence):
        return None
    for other, seen in leaders:
        lacks = seen.length < end <= other.target and urgency(seen) < urgency(view)
        if lacks and other.publishes and other.tokens[:end] == sequence.tokens[:end]:
            return seen.key
    return None

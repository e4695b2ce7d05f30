"""What the next step computes: a pure function of the time, the sequences and a cost model.

Order: deadlines earliest first, then arrival. Sequences that decode go first, prefill fills the rest of the step in
chunks. A request without a deadline that got nothing for `PATIENCE_NS` is let in first once, so that nothing starves.
When KV runs out, the least urgent sequences lose theirs and are computed again later. Knows no clock, no model and no
tokens: frozen views in, a frozen plan out, so that all of it is tested with invented times.
"""

from __future__ import annotations

from dataclasses import dataclass

from haomiao.engine.cost import Cost, StepShape
from haomiao.engine.state import blocks_for
from haomiao.types import KV_BLOCK_TOKENS

PATIENCE_NS = 250_000_000
"""How long a sequence may go without a step before it is let in first: the floor of requests without a budget."""
FLOOR_TOKENS = 32
"""Prefill tokens that the floor gives while those with a budget need the time."""


@dataclass(frozen=True, slots=True)
class Branches:
    """What branches off a sequence in the very step that computes its last pending token: all of it or nothing."""

    tokens: int
    rows: int
    sequences: int
    blocks: int


@dataclass(frozen=True, slots=True)
class SequenceView:
    """What the scheduler sees of one sequence that wants tokens computed."""

    key: int
    point: str
    pending: int
    """Tokens to compute, at least 1, before the sequence can go on."""
    drafted: int = 0
    """How many of `pending`, the last ones, are drafted: good to have in the step, and nobody gives way for them."""
    decoding: bool = False
    """It has produced a token already."""
    arrival_ns: int = 0
    deadline_ns: int | None = None
    itl_ns: int | None = None
    """Inter-token budget."""
    last_served_ns: int = 0
    length: int = 0
    """Tokens in KV, or found for it in the prefix cache if it holds nothing yet."""
    running: bool = False
    """It holds KV."""
    blocks_alone: int = 0
    """Blocks that taking its KV away would make available."""
    claim: int = 0
    """Blocks of the prefix cache that are available now and no longer once it starts."""
    tail_shared: bool = False
    """Its last block must be copied before it is written."""
    rows_from: int | None = None
    """Logits are wanted for every position from here on; None: for the last pending token only."""
    waits: bool = False
    """It has no budget and others need the time: it gets the floor and nothing else."""
    branches: Branches | None = None
    """What may go along with the last of its pending tokens."""

    def blocks_needed(self, tokens: int) -> int:
        """Blocks taken from the pool if `tokens` of its tokens are computed."""
        grown = blocks_for(self.length + tokens) - blocks_for(self.length)
        copied = 1 if self.tail_shared and self.length % KV_BLOCK_TOKENS else 0
        return grown + copied + self.claim

    def rows(self, tokens: int) -> int:
        """Rows of logits if `tokens` of its tokens are computed."""
        if self.rows_from is None:
            return 1 if tokens >= self.pending else 0
        return max(0, self.length + tokens - max(self.length, self.rows_from))


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """Everything the plan depends on besides the time."""

    sequences: tuple[SequenceView, ...]
    free_blocks: int
    max_step_tokens: int
    max_step_rows: int
    max_step_sequences: int
    chunk_tokens: int | None = None
    """Prefill tokens in one step, at most, so that what comes next need not wait long; None: as many as fit."""
    tightest_ns: int = 0
    """The tightest budget that may come next: what is due no later than that from now would go before it anyway, and
    is not cut for it."""


@dataclass(frozen=True, slots=True)
class Span:
    """`tokens` of the sequence `key` are computed, and with `whole` what branches off it."""

    key: int
    tokens: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, at one point. `preempt` lists sequences that lose their KV before it; `blocked` is true if a sequence
    that should run found no KV. No spans and no preemption: there is nothing to do, or nothing can be done."""

    point: str = ""
    spans: tuple[Span, ...] = ()
    preempt: tuple[int, ...] = ()
    blocked: bool = False


def plan(now: int, state: SchedulerState, cost: Cost | None = None) -> StepPlan:
    """The next step. `now` is in nanoseconds, of the clock that the views' times are of."""
    if not state.sequences:
        return StepPlan()
    ranked = sorted(state.sequences, key=urgency)
    blocked = False
    for point in _points_in_turn(now, ranked):
        step = _Step(now, state, ranked, point, cost)
        for view in _serving_order(now, ranked, point):
            step.serve(view)
        if step.spans:
            return StepPlan(point, step.spans, tuple(step.preempted), step.blocked)
        blocked = blocked or step.blocked
    # even the most urgent one found no room: let it be alone, and try again
    others = tuple(view.key for view in ranked[1:] if view.running)
    return StepPlan(ranked[0].point, (), others, blocked)


def urgency(view: SequenceView) -> tuple[int, int, int, int]:
    """The order in which sequences keep KV: earliest deadline, then those without one in order of arrival."""
    if view.deadline_ns is not None:
        return 0, view.deadline_ns, view.arrival_ns, view.key
    return 1, view.arrival_ns, view.arrival_ns, view.key


def _starved(now: int, view: SequenceView) -> bool:
    return view.deadline_ns is None and now - view.last_served_ns >= PATIENCE_NS


def _points_in_turn(now: int, ranked: list[SequenceView]) -> list[str]:
    """Points in the order in which they may have the step: a starved sequence's, the earliest deadline's, else that
    of the sequence that waited longest."""
    order: list[str] = []
    starved = sorted((view for view in ranked if _starved(now, view)), key=lambda view: view.last_served_ns)
    deadlines = [view for view in ranked if view.deadline_ns is not None]
    rest = sorted((view for view in ranked if view.deadline_ns is None), key=lambda view: view.last_served_ns)
    for view in (*starved, *deadlines, *rest):
        if view.point not in order and not (view.waits and not _starved(now, view)):
            order.append(view.point)
    return order


def _serving_order(now: int, ranked: list[SequenceView], point: str) -> list[SequenceView]:
    """Starved ones, then those that decode, then those that prefill; inside each by urgency."""
    here = [view for view in ranked if view.point == point and (not view.waits or _starved(now, view))]
    return sorted(here, key=lambda view: 0 if _starved(now, view) else 1 if view.decoding else 2)


class _Step:
    """A step being put together."""

    def __init__(
        self, now: int, state: SchedulerState, ranked: list[SequenceView], point: str, cost: Cost | None
    ) -> None:
        self.preempted: list[int] = []
        self.blocked = False
        self._ranked = ranked
        self._rank = {view.key: index for index, view in enumerate(ranked)}
        self._point = point
        self._cost = cost
        self._tokens = state.max_step_tokens
        self._rows = state.max_step_rows
        self._sequences = state.max_step_sequences
        self._free = state.free_blocks
        self._served: dict[int, tuple[SequenceView, int]] = {}
        self._whole: set[int] = set()
        self._chunk = state.chunk_tokens if state.chunk_tokens is not None else state.max_step_tokens
        self._before_all = now + state.tightest_ns
        here = [view for view in ranked if view.decoding and view.point == point]
        limits = [view.itl_ns for view in here if view.itl_ns is not None]
        limits += [view.deadline_ns - now for view in here if view.deadline_ns is not None and view.deadline_ns > now]
        self._limit = min(limits, default=None)
        """Nanoseconds that the step may take: the tightest inter-token budget, or time left, of what decodes."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """What was given out, in the order in which it was."""
        return tuple(Span(key, tokens, key in self._whole) for key, (_, tokens) in self._served.items())

    def serve(self, view: SequenceView) -> None:
        """Give the sequence as much of the step as it can use."""
        if view.key in self.preempted or not self._sequences:
            return
        tokens = min(view.pending, self._tokens)
        if view.drafted and view.blocks_needed(tokens) + 2 * len(self._ranked) > self._free:  # others may need them
            tokens = min(tokens, view.pending - view.drafted)
        if view.rows(tokens) > self._rows:  # rows grow by at most one with every token
            tokens -= view.rows(tokens) - self._rows
        if not view.decoding:
            tokens = min(tokens, self._chunk_of(view))
            tokens = self._within_limit(view, tokens)
        if tokens <= 0:
            return
        tokens = self._make_room(view, tokens)
        if tokens <= 0:
            self.blocked = True
            return
        self._book(view, tokens, 1)
        self._served[view.key] = view, tokens
        if view.branches is not None and tokens == view.pending and self._fits(view.branches):
            self._whole.add(view.key)
            self._book_branches(view.branches, 1)

    def _chunk_of(self, view: SequenceView) -> int:
        """Prefill tokens that it may have so that who comes next, and is more urgent, need not wait long."""
        if view.waits:
            return min(self._chunk, FLOOR_TOKENS)
        first = view.deadline_ns is not None and view.deadline_ns <= self._before_all
        return view.pending if first else self._chunk

    def _fits(self, branches: Branches) -> bool:
        """True if there is room for them without taking anything from anybody."""
        room = (self._tokens, self._rows, self._sequences, self._free)
        wanted = (branches.tokens, branches.rows, branches.sequences, branches.blocks)
        return all(need <= have for need, have in zip(wanted, room, strict=True))

    def _book_branches(self, branches: Branches, sign: int) -> None:
        self._free -= sign * branches.blocks
        self._tokens -= sign * branches.tokens
        self._rows -= sign * branches.rows
        self._sequences -= sign * branches.sequences

    def _book(self, view: SequenceView, tokens: int, sign: int) -> None:
        """Take what the sequence uses off what is left, or (`sign` -1) put it back."""
        self._free -= sign * view.blocks_needed(tokens)
        self._tokens -= sign * tokens
        self._rows -= sign * view.rows(tokens)
        self._sequences -= sign
        if not view.decoding:
            self._chunk -= sign * tokens

    def _make_room(self, view: SequenceView, tokens: int) -> int:
        """Tokens for which there is KV, after taking it from the less urgent if need be."""
        # a sequence that holds nothing starts only if all of it fits: half a prompt in KV helps nobody
        wanted = tokens if view.running else view.pending
        missing = view.blocks_needed(wanted) - self._free
        if missing > 0:
            victims = self._victims(view, missing)
            if victims is None and view.running:  # as many tokens as fit without taking anything
                while tokens > 0 and view.blocks_needed(tokens) > self._free:
                    tokens -= (view.length + tokens - 1) % KV_BLOCK_TOKENS + 1
                return max(tokens, 0)
            if victims is None:
                return 0
            for victim in victims:
                self.preempted.append(victim.key)
                self._free += victim.blocks_alone
                if victim.key in self._served:  # it was given a part of this step already
                    self._book(*self._served.pop(victim.key), -1)
                    if victim.key in self._whole and victim.branches is not None:
                        self._whole.remove(victim.key)
                        self._book_branches(victim.branches, -1)
        return tokens

    def _victims(self, view: SequenceView, missing: int) -> list[SequenceView] | None:
        """The least urgent sequences that hold enough, all less urgent than `view`; None if that is not enough."""
        victims: list[SequenceView] = []
        for other in reversed(self._ranked[self._rank[view.key] + 1 :]):
            if other.running and other.blocks_alone and other.key not in self.preempted:
                victims.append(other)
                missing -= other.blocks_alone
                if missing <= 0:
                    return victims
        return None

    def _within_limit(self, view: SequenceView, tokens: int) -> int:
        """Prefill tokens that keep the step inside what those that decode leave it; at least 1, so that it ends."""
        if self._cost is None or self._limit is None or tokens <= 1:
            return tokens

        served = self._served.values()
        decode = sum(count for other, count in served if other.decoding)
        prefill = sum(count for other, count in served if not other.decoding)
        context = sum(_context(other, count) for other, count in served)
        rows = sum(other.rows(count) for other, count in served)
        model, limit = self._cost, self._limit

        def fits(count: int) -> bool:
            shape = StepShape(
                self._point,
                decode,
                prefill + count,
                context + _context(view, count),
                rows + view.rows(count),
                len(self._served) + 1,
            )
            bound = model.bound(shape)
            return bound is None or bound <= limit

        if fits(tokens):
            return tokens
        low, high = 0 if prefill else 1, tokens  # `low` is given in any case, `high` is too much
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def _context(view: SequenceView, tokens: int) -> int:
    """K/V positions read by the next `tokens` tokens together."""
    return tokens * view.length + tokens * (tokens + 1) // 2

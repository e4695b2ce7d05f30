"""Who is being served: live requests, their sequences, and the KV that these hold or start from.

Sequences come in by `open` and `enter`, are given room for a step by `make_room`, lose their KV by `preempt`, and go by
`leave`. Knows no clock, no executor, and nothing about what is told to whom.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from haomiao.engine.batch import Share, hidden_wanted, reusable, rows_wanted, view_of
from haomiao.engine.choice import ChoicePrompt
from haomiao.engine.generation import Generation
from haomiao.engine.held import HeldSequences
from haomiao.engine.origin import Origin
from haomiao.engine.prefix import PrefixNames
from haomiao.engine.scheduler import SequenceView, StepPlan
from haomiao.engine.sequence import Embedding, Job, Reading, Sequence
from haomiao.engine.state import BlockPool, PagedState
from haomiao.errors import KvExhaustedError
from haomiao.types import KV_BLOCK_TOKENS


class Roster:
    """Live jobs by id, live sequences by key, in order of arrival."""

    def __init__(
        self,
        pool: BlockPool,
        name_blocks: Callable[[Job], PrefixNames | None],
        gone: Callable[[int], None] = lambda key: None,
    ) -> None:
        """`name_blocks` names the prefix blocks of a request; it gives None where none are to be shared. `gone` is told
        the key of every sequence that leaves."""
        self.pool = pool
        self.held = HeldSequences()
        self.jobs: dict[int, Job] = {}
        self._active: dict[int, Sequence] = {}
        self._name_blocks = name_blocks
        self._gone = gone
        self._keys = itertools.count(1)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._active.values())

    def __len__(self) -> int:
        return len(self._active)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.key in self._active

    def __getitem__(self, key: int) -> Sequence:
        return self._active[key]

    # ---- come and go ----------------------------------------------------------------------------------------------

    def open(self, job: Job) -> Sequence:
        """Take a request in. Raises what its sequence or its session refuses; nothing was taken in then."""
        sequence = open_sequence(job)
        sequence.names = self._names_of(job)
        if job.request.session is not None:  # it goes on from what the session holds
            limit = reusable(sequence)
            taken = self.held.take(job.request.session, job.id, job.points, sequence.tokens, limit)
            if taken is not None:
                sequence.state, sequence.origin = taken
                sequence.reused()
            job.cached_tokens = sequence.length
        self.jobs[job.id] = job
        self.enter(sequence)
        return sequence

    def enter(self, sequence: Sequence, past: Sequence | None = None) -> None:
        """Take a sequence in; one that branched off shares its past's KV."""
        if past is not None and past.state is not None:
            if sequence.state is None:
                sequence.state = past.state.fork()
            sequence.names = None if past.names is None else past.names.fork()
            sequence.origin = past.origin.fork()
            sequence.point = past.point
            sequence.last_served_ns = past.last_served_ns
            sequence.schedule = [replace(entry) for entry in past.schedule]
        sequence.key = next(self._keys)
        sequence.job.open += 1
        self._active[sequence.key] = sequence

    def of(self, job: Job) -> list[Sequence]:
        """The live sequences of a request."""
        return [sequence for sequence in self._active.values() if sequence.job is job]

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go: its KV is given back, or left to the session it ran in."""
        job, state = sequence.job, sequence.state
        del self._active[sequence.key]
        self._gone(sequence.key)
        sequence.state = None
        job.open -= 1
        if state is not None:
            kept = sequence.leaves_kv and self.held.give(
                job.request.session, job.id, sequence.tokens, state, sequence.origin
            )
            if not kept:
                state.release()
        if not job.open:
            self.jobs.pop(job.id, None)
            self.held.leave(job.request.session, job.id)

    def clear(self) -> None:
        """Give everything back."""
        for state in self.states():
            state.release()
        self._active.clear()
        self.jobs.clear()
        self.held.close_all()

    # ---- KV -------------------------------------------------------------------------------------------------------

    def view(self, sequence: Sequence, point: str, waits: bool = False) -> SequenceView:
        """What the scheduler sees of it if it runs at `point` now, or `waits`."""
        found = self._find_prefix(sequence, point)[1] if sequence.state is None else []
        return view_of(sequence, self.pool, found, point, waits)

    def cached(self, job: Job) -> int:
        """Tokens of a request's prompt that need not be computed, as things are. May be asked from any thread."""
        request = job.request
        whole = request.work in ("logits", "embed") or request.prompt_logprobs is not None
        limit = 0 if whole else len(request.prompt_ids) - 1
        held = 0
        if request.session is not None:
            held = self.held.peek(request.session, job.points, request.prompt_ids, limit)
        names = self._names_of(job)
        if names is None:
            return held
        found = names.lookup(self.pool, request.prompt_ids, limit, job.points[:1])[1]
        return max(held, len(found) * KV_BLOCK_TOKENS)

    def make_room(self, step_plan: StepPlan, now: int) -> list[Share]:
        """Make room for the tokens of the step. A sequence for which there is none after all waits for the next plan:
        a cached prefix that it was to start from may have been that of a sequence which just lost its KV."""
        planned = [(self._active[span.key], span.tokens) for span in step_plan.spans]
        whole = {span.key for span in step_plan.spans if span.whole}
        for sequence, _ in planned:  # prefixes are held before anything is allocated, which could evict them
            if sequence.state is None:
                point, found = self._find_prefix(sequence, step_plan.point)
                sequence.state = PagedState(self.pool, found)
                sequence.origin = Origin()
                sequence.origin.add(point, sequence.length)
                sequence.reused()
                if sequence.job.started_ns is None:
                    sequence.job.cached_tokens = sequence.length
        shares: list[Share] = []
        for sequence, tokens in planned:
            rows, hidden = rows_wanted(sequence, tokens), hidden_wanted(sequence, tokens)
            try:
                sequence.kv.append(tokens)
            except KvExhaustedError:
                self.preempt(sequence)
                continue
            sequence.draft = sequence.draft[: max(0, sequence.length - sequence.target)]
            if sequence.job.started_ns is None:
                sequence.job.started_ns = now
            sequence.last_served_ns = now
            share = Share(sequence, tokens, rows, hidden=hidden)
            shares.append(share)
            if sequence.key in whole:
                self._branch(share)
                shares += [each for each in share.branches if each.tokens]
        return shares

    def _branch(self, share: Share) -> None:
        """Make room for what branches off within the step; if there is none it does so after the step, as ever. It is
        taken in when the step has been computed."""
        parent = share.sequence
        for branch in parent.branches():
            state = parent.kv.fork()
            tokens = branch.target - state.length
            try:
                state.append(tokens)
            except KvExhaustedError:
                state.release()
                for each in share.branches:
                    each.take_back()
                share.branches.clear()
                return
            branch.state = state
            share.branches.append(Share(branch, tokens, tokens, parent=share))

    def publish(self, sequence: Sequence) -> None:
        """Let others find the sequence's full blocks, all of whose tokens must be its own."""
        if sequence.names is not None and sequence.state is not None and sequence.publishes:
            sequence.names.publish(self.pool, sequence.tokens, sequence.state, sequence.origin)

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's KV away; it is computed again when its turn comes."""
        sequence.draft = []
        if sequence.state is not None:
            sequence.state.release()
            sequence.state = None
        sequence.origin = Origin()
        if sequence.names is not None:
            sequence.names.restart()

    def states(self) -> list[PagedState]:
        """The KV of all live sequences."""
        return [sequence.state for sequence in self._active.values() if sequence.state is not None]

    def check_integrity(self, others: Iterable[PagedState] = ()) -> None:
        """Raise `EngineError` if a KV block is lost, held twice or free while held. `others` hold blocks too."""
        self.pool.check_integrity([*self.states(), *self.held.states(), *others])

    def _names_of(self, job: Job) -> PrefixNames | None:
        """Hashed once, whoever asks first."""
        if job.names is None:
            job.names = self._name_blocks(job)
        return job.names

    def _find_prefix(self, sequence: Sequence, point: str) -> tuple[str, list[int]]:
        """Blocks that it may start from, and the point at which they were computed: its own, or where it runs now."""
        if sequence.names is None:
            return point, []
        points = dict.fromkeys((sequence.job.point, point))
        return sequence.names.lookup(self.pool, sequence.tokens, reusable(sequence), tuple(points))


def open_sequence(job: Job) -> Sequence:
    """The sequence with which a request begins."""
    tokens = list(job.request.prompt_ids)
    match job.request.work:
        case "generate":
            return Generation(job, tokens)
        case "prefill":
            return Sequence(job, tokens)
        case "choose":
            return ChoicePrompt(job, tokens)
        case "logits":
            return Reading(job, tokens)
        case "embed":
            return Embedding(job, tokens)

"""The loop: accept, admit, plan, run, emit.

One `step()` computes one step of the model for as many sequences as fit, and returns what came out of it. The engine
speaks token ids; text, grammars and stop strings reach it through protocols. It starts no thread and reads no clock but
the one it is given. `submit` and `cancel` may be called from other threads than `step`; everything else may not.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from haomiao.engine import scheduler
from haomiao.engine.account import Letterhead, make_receipt
from haomiao.engine.admission import Limits, check_request
from haomiao.engine.batch import Share, make_batch, reusable, rows_wanted, shape_of, view_of
from haomiao.engine.cost import CostModel, StepShape
from haomiao.engine.held import HeldSequences
from haomiao.engine.prefix import PrefixChain
from haomiao.engine.random import fresh_seed
from haomiao.engine.request import FINISH_REASONS, DoneEvent, EngineRequest, Event, TokenEvent
from haomiao.engine.scheduler import SchedulerState, SequenceView, StepPlan
from haomiao.engine.sequence import Generation, Job, Progress, Reading, Rows, Sequence, open_sequence
from haomiao.engine.state import BlockPool, PagedState
from haomiao.errors import CancelledError, DeadlineError, EngineError, HaomiaoError, KvExhaustedError, OverloadError
from haomiao.types import Executor, Observer, StepResult


class Engine:
    """Serves requests on one executor."""

    def __init__(
        self,
        executor: Executor,
        *,
        eos_ids: SequenceOf[int] = (),
        max_context: int,
        prefix_cache: bool = True,
        model_key: str = "",
        name: str = "",
        point: str | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        observers: SequenceOf[Observer] = (),
        cost: CostModel | None = None,
        errors: Mapping[str, float] | None = None,
        max_requests: int = 1024,
    ) -> None:
        """`model_key` identifies the weights: prefix blocks of another key are never used. `name` and `errors` (the
        artifact's mean KL by point) go on receipts. `max_requests` are queued or running before `OverloadError`."""
        self.executor = executor
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.limits = Limits(executor.vocab_size, max_context, executor.kv_blocks, tuple(executor.points))
        self.point = point if point is not None else executor.points[0]
        self.pool = BlockPool(executor.kv_blocks, executor.kv_bytes_per_block, executor.copy_blocks)
        self.held = HeldSequences()
        self.model_key = model_key
        self._prefix_cache = prefix_cache
        self._clock = clock
        self._observers = tuple(observers)
        self._cost = cost
        self._letterhead = Letterhead(
            name, int(getattr(executor, "threads", 0)), str(getattr(executor, "isa", "")), dict(errors or {})
        )
        self._max_requests = max_requests
        self._max_rows = int(getattr(executor, "max_logit_rows", executor.max_step_tokens))
        self._max_sequences = int(getattr(executor, "max_sequences", executor.max_step_tokens))
        self._ids = itertools.count(1)
        self._keys = itertools.count(1)
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[int] = deque()
        self._active: dict[int, Sequence] = {}  # by key, in order of arrival
        self._jobs: dict[int, Job] = {}
        self._events: list[Event] = []

    # ---- the face -------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> int:
        """Queue a request and return its id. Raises what `admission.check_request` does, and `OverloadError`."""
        check_request(request, self.limits)
        if len(self._jobs) + len(self._inbox) >= self._max_requests:
            raise OverloadError(f"{self._max_requests} requests are queued or running already")
        now = self._clock()
        seed = request.sampling.seed
        job = Job(
            id=next(self._ids),
            request=request,
            point=request.point or self.point,
            arrival_ns=now if request.arrival_ns is None else request.arrival_ns,
            seed=fresh_seed() if seed is None else seed,
            eos_ids=self.eos_ids,
            vocab_size=self.executor.vocab_size,
        )
        self._inbox.append(job)
        return job.id

    def cancel(self, request_id: int) -> None:
        """End a request; everything it holds is free after the next `settle` or `step`. Unknown ids are ignored."""
        self._cancelled.append(request_id)

    def step(self) -> list[Event]:
        """Compute one step and return what happened. An empty list means that nothing was ready to be told."""
        now = self._clock()
        self._accept(now)
        self._admit(now)
        step_plan = self._plan(now)
        if step_plan.spans:
            shares = self._prepare(step_plan, now)
            result = self._run(step_plan.point, shares)
            if result is not None:
                self._emit(shares, result)
        return self._take_events()

    def settle(self) -> list[Event]:
        """Take submissions and cancellations in without computing anything."""
        self._accept(self._clock())
        return self._take_events()

    @property
    def busy(self) -> bool:
        """True while requests are queued or running."""
        return bool(self._active or self._inbox or self._cancelled)

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that hold KV, and those that wait for it; may be asked from any thread."""
        active = list(self._active.values())
        running = sum(1 for sequence in active if sequence.state is not None)
        return running, len(active) - running + len(self._inbox)

    def run_until(self, *request_ids: int) -> list[Event]:
        """Step until these requests have ended (all, if none is named), and return every event on the way."""
        events: list[Event] = []
        waiting = set(request_ids)
        while self.busy and (waiting or not request_ids):
            events += self.step()
            waiting &= {job.id for job in (*self._jobs.values(), *self._inbox)}
        return events

    def score_options(
        self,
        prompt_ids: SequenceOf[int],
        options: SequenceOf[SequenceOf[int]],
        *,
        normalize: bool = False,
        point: str | None = None,
    ) -> list[float]:
        """Natural-log probability of each option, and of its end, after the prompt. The prompt is computed once, the
        options run together as forked sequences. Steps until the scores are there; raises what the request fails with.
        """
        request = EngineRequest(
            prompt_ids,
            work="choose",
            options=tuple(tuple(option) for option in options),
            normalize=normalize,
            point=point,
        )
        request_id = self.submit(request)
        for event in self.run_until(request_id):
            if isinstance(event, DoneEvent) and event.request_id == request_id:
                if event.error is not None:
                    raise event.error
                return event.scores or []
        raise EngineError("the choice ended without a word")

    def open_session(self) -> int:
        """A memory of one sequence between requests (`EngineRequest.session`)."""
        return self.held.open()

    def close_session(self, session: int) -> None:
        """Forget it; a request that runs in it goes on alone."""
        self.held.close(session)

    def check_integrity(self) -> None:
        """Raise `EngineError` if a KV block is lost, held twice or free while held."""
        live = [sequence.state for sequence in self._active.values() if sequence.state is not None]
        self.pool.check_integrity([*live, *self.held.states()])

    def close(self) -> None:
        """Give everything back and close the executor; idempotent."""
        for sequence in self._active.values():
            if sequence.state is not None:
                sequence.state.release()
        self._active.clear()
        self._jobs.clear()
        self._inbox.clear()
        self.held.close_all()
        self.executor.close()

    # ---- accept ---------------------------------------------------------------------------------------------------

    def _accept(self, now: int) -> None:
        """Take in what other threads submitted and cancelled."""
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        for job in [job for job in self._jobs.values() if job.id in cancelled]:
            self._fail(job, CancelledError("the request was cancelled"), now)
        while self._inbox:
            job = self._inbox.popleft()
            if job.id in cancelled:
                self._refuse(job, CancelledError("the request was cancelled"), now)
                continue
            try:
                sequence = open_sequence(job)
                self._remember(sequence)
            except Exception as error:
                self._refuse(job, _as_error(error), now)
                continue
            self._jobs[job.id] = job
            self._enter(sequence)

    def _refuse(self, job: Job, error: HaomiaoError, now: int) -> None:
        """End a request that never became a sequence."""
        self._finish(DoneEvent(job.id, 0, make_receipt(self._letterhead, job, None, now, error=error), error=error))

    def _enter(self, sequence: Sequence, past: Sequence | None = None) -> None:
        """Take a sequence in; one that branched off shares its past's KV."""
        if past is not None and past.state is not None:
            sequence.state = past.state.fork()
            sequence.chain = None if past.chain is None else past.chain.fork()
            sequence.last_served_ns = past.last_served_ns
            sequence.schedule = [replace(entry) for entry in past.schedule]
        sequence.key = next(self._keys)
        sequence.job.open += 1
        self._active[sequence.key] = sequence

    def _remember(self, sequence: Sequence) -> None:
        """Give the sequence the names of its blocks, and start from what the request's session holds."""
        job = sequence.job
        if self._prefix_cache:
            sequence.chain = PrefixChain(
                model_key=self.model_key,
                point=job.point,
                kv_type=self.executor.kv_type,
                salt=job.request.salt,
            )
        if job.request.session is not None:
            limit = reusable(sequence)
            sequence.state = self.held.take(job.request.session, job.id, job.point, sequence.tokens, limit)
            job.cached_tokens = sequence.length

    # ---- admit ----------------------------------------------------------------------------------------------------

    def _admit(self, now: int) -> None:
        """End what has no time left. (Admission by predicted time belongs here.)"""
        for sequence in list(self._active.values()):
            deadline = sequence.job.request.deadline_ns
            if deadline is None or sequence.key not in self._active:
                continue
            if now + self._next_step_ns(sequence) < deadline:
                continue
            try:
                progress = sequence.close_early()
            except Exception as error:
                self._fail(sequence.job, _as_error(error), now)
                continue
            if progress is not None:
                self._tell(sequence, progress, now)
            elif now >= deadline:
                self._fail(sequence.job, DeadlineError("the budget was spent before the first token"), now)

    def _next_step_ns(self, sequence: Sequence) -> float:
        if self._cost is None:
            return 0.0
        shape = StepShape(sequence.job.point, decode_tokens=1, context_tokens=sequence.length, logit_rows=1)
        return self._cost.bound(shape) or 0.0

    # ---- plan -----------------------------------------------------------------------------------------------------

    def _plan(self, now: int) -> StepPlan:
        """Ask the scheduler; make room and ask again while KV is what is missing."""
        while self._active:
            state = SchedulerState(
                tuple(self._view(sequence) for sequence in self._active.values()),
                self.pool.available,
                self.executor.max_step_tokens,
                self._max_rows,
                self._max_sequences,
            )
            step_plan = scheduler.plan(now, state, self._cost)
            if step_plan.blocked and self.held.drop_oldest():
                continue
            for key in step_plan.preempt:
                self._preempt(self._active[key])
            if step_plan.spans:
                return step_plan
            if not step_plan.preempt:  # the most urgent one is alone, and still does not fit
                most_urgent = min(state.sequences, key=scheduler.urgency)
                job = self._active[most_urgent.key].job
                self._fail(job, KvExhaustedError(f"{self.pool.blocks} KV blocks are too few for this request"), now)
        return StepPlan()

    def _view(self, sequence: Sequence) -> SequenceView:
        return view_of(sequence, self.pool, self._find_prefix(sequence) if sequence.state is None else [])

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if sequence.chain is None:
            return []
        return sequence.chain.lookup(self.pool, sequence.tokens, reusable(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's KV away; it is computed again when its turn comes."""
        if sequence.state is not None:
            sequence.state.release()
            sequence.state = None
        if sequence.chain is not None:
            sequence.chain.restart()

    # ---- run ------------------------------------------------------------------------------------------------------

    def _prepare(self, step_plan: StepPlan, now: int) -> list[Share]:
        """Make room for the tokens of the step. A sequence for which there is none after all waits for the next plan:
        a cached prefix that it was to start from may have been that of a sequence which just lost its KV."""
        planned = [(self._active[span.key], span.tokens) for span in step_plan.spans]
        for sequence, _ in planned:  # prefixes are held before anything is allocated, which could evict them
            if sequence.state is None:
                sequence.state = PagedState(self.pool, self._find_prefix(sequence))
                if sequence.job.started_ns is None:
                    sequence.job.cached_tokens = sequence.length
        shares: list[Share] = []
        for sequence, tokens in planned:
            rows = rows_wanted(sequence, tokens)
            try:
                sequence.kv.append(tokens)
            except KvExhaustedError:
                self._preempt(sequence)
                continue
            if sequence.job.started_ns is None:
                sequence.job.started_ns = now
            sequence.last_served_ns = now
            shares.append(Share(sequence, tokens, rows))
        return shares

    def _run(self, point: str, shares: list[Share]) -> StepResult | None:
        """Run the step. If the executor fails, every request of the step fails, and no other."""
        if not shares:
            return None
        batch = make_batch(point, shares)
        try:
            result = self.executor.step(batch)
        except BaseException as error:
            for share in shares:
                share.sequence.cut(share.tokens)
            if not isinstance(error, Exception):  # an interrupt: nothing was computed, and everything can go on
                raise
            for job in {share.sequence.job.id: share.sequence.job for share in shares}.values():
                self._fail(job, _as_error(error), self._clock())
            return None
        self._notify(lambda observer: observer.on_step(batch, result))
        if self._cost is not None:
            self._cost.observe(shape_of(point, shares), result.elapsed_ns)
        return result

    # ---- emit -----------------------------------------------------------------------------------------------------

    def _emit(self, shares: list[Share], result: StepResult) -> None:
        """Hand every sequence its logits, and tell what became of it."""
        now = self._clock()
        row = 0
        for index, share in enumerate(shares):
            sequence, logits, argmax = share.sequence, result.logits, result.argmax
            first, row = row, row + share.rows
            if sequence.state is None:
                continue  # its request failed a moment ago, with another sample
            rows = Rows(sequence.length - share.rows, logits[first:row], argmax[first:row]) if share.rows else None
            try:
                sequence.account(sequence.job.point, share.tokens)
                if sequence.chain is not None:
                    sequence.chain.publish(self.pool, sequence.tokens, sequence.state)
                branches = sequence.branches()
                for branch in branches:
                    self._enter(branch, past=sequence)
                for each in (sequence, *branches):
                    self._tell(each, each.consume(rows), now)
            except Exception as error:
                self._fail(sequence.job, _as_error(error), now)
            except BaseException:  # an interrupt: this request is half told, and the rest of the step not looked at
                for later in shares[index + 1 :]:
                    later.sequence.cut(later.tokens)
                self._fail(sequence.job, CancelledError("the request was interrupted"), now)
                raise

    def _tell(self, sequence: Sequence, progress: Progress, now: int) -> None:
        """Turn a sequence's progress into events, and let it go if it ended."""
        job, detail = sequence.job, progress.detail
        if progress.token_ids or progress.text:
            if sequence.first_token_ns is None:
                sequence.first_token_ns = now
            logprobs = None if job.request.sampling.logprobs is None else progress.logprobs
            self._events.append(
                TokenEvent(job.id, sequence.sample, progress.token_ids, progress.text, logprobs, job.point)
            )
        if detail is None:
            return
        self._leave(sequence)
        generated = isinstance(sequence, Generation)
        if not generated and job.open:
            return  # a choice ends with its last option
        self._finish(
            DoneEvent(
                job.id,
                sequence.sample if generated else 0,
                make_receipt(self._letterhead, job, sequence, now, detail=detail),
                finish_reason=FINISH_REASONS[detail],
                finish_detail=detail,
                scores=job.scores if job.request.work == "choose" else None,
                logits=sequence.logits if isinstance(sequence, Reading) else None,
                prompt_logprobs=sequence.prompt_logprobs if isinstance(sequence, Generation) else None,
            )
        )

    def _fail(self, job: Job, error: HaomiaoError, now: int) -> None:
        """End a request with an error: one event for each of its samples that is still open."""
        told: set[int] = set()
        for sequence in [sequence for sequence in self._active.values() if sequence.job is job]:
            self._leave(sequence)
            sample = sequence.sample if isinstance(sequence, Generation) else 0
            if sample not in told:
                told.add(sample)
                receipt = make_receipt(self._letterhead, job, sequence, now, error=error)
                self._finish(DoneEvent(job.id, sample, receipt, error=error))

    def _leave(self, sequence: Sequence) -> None:
        """Let a sequence go: its KV is given back, or left to the session it ran in."""
        job, state = sequence.job, sequence.state
        del self._active[sequence.key]
        sequence.state = None
        job.open -= 1
        if state is not None:
            kept = sequence.leaves_kv and self.held.give(job.request.session, job.id, job.point, sequence.tokens, state)
            if not kept:
                state.release()
        if not job.open:
            self._jobs.pop(job.id, None)
            self.held.leave(job.request.session, job.id)

    def _finish(self, event: DoneEvent) -> None:
        self._events.append(event)
        self._notify(lambda observer: observer.on_finish(event.receipt))

    def _notify(self, tell: Callable[[Observer], None]) -> None:
        """Tell the observers. One that fails is logged; no request suffers for it."""
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:
                logging.getLogger(__name__).exception("the observer %s failed", type(observer).__name__)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _as_error(error: Exception) -> HaomiaoError:
    """What a user may see of an exception: ours as it is, anything else as an internal one."""
    if isinstance(error, HaomiaoError):
        return error
    failure = EngineError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure

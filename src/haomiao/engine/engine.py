"""The loop: accept, admit, plan, run, emit.

One `step()` computes one step of the model for as many sequences as fit, and returns what came out of it. The engine
speaks token ids; text, grammars and stop strings reach it through protocols. It starts no thread and reads no clock but
the one it is given. `submit` and `cancel` may be called from other threads than `step`; everything else may not.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

from haomiao.engine import scheduler
from haomiao.engine.account import Letterhead
from haomiao.engine.admission import Limits, check_request
from haomiao.engine.batch import Share, make_batch, shape_of
from haomiao.engine.cost import CostModel, StepShape
from haomiao.engine.held import HeldSequences
from haomiao.engine.prefix import PrefixChain
from haomiao.engine.random import fresh_seed
from haomiao.engine.reporter import Reporter
from haomiao.engine.request import DoneEvent, EngineRequest, Event
from haomiao.engine.roster import Roster
from haomiao.engine.scheduler import SchedulerState, StepPlan
from haomiao.engine.sequence import Job, Rows, Sequence
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.state import BlockPool
from haomiao.errors import CancelledError, DeadlineError, EngineError, KvExhaustedError, OverloadError
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
        speculator: Speculator | None = None,
    ) -> None:
        """`model_key` identifies the weights: prefix blocks of another key are never used. `name` and `errors` (the
        artifact's mean KL by point) go on receipts. `max_requests` are queued or running before `OverloadError`.
        `speculator` drafts tokens; it is closed with the engine."""
        self.executor = executor
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.limits = Limits(executor.vocab_size, max_context, executor.kv_blocks, tuple(executor.points))
        self.point = point if point is not None else executor.points[0]
        self.pool = BlockPool(executor.kv_blocks, executor.kv_bytes_per_block, executor.copy_blocks)
        self.model_key = model_key
        self._prefix_cache = prefix_cache
        self._clock = clock
        self._cost = cost
        self._speculator = speculator or Speculator(())
        self._roster = Roster(self.pool, self._make_chain, self._speculator.release)
        letterhead = Letterhead(
            name, int(getattr(executor, "threads", 0)), str(getattr(executor, "isa", "")), dict(errors or {})
        )
        self._reporter = Reporter(self._roster, letterhead, observers)
        self._max_requests = max_requests
        self._max_rows = int(getattr(executor, "max_logit_rows", executor.max_step_tokens))
        self._max_sequences = int(getattr(executor, "max_sequences", executor.max_step_tokens))
        self._ids = itertools.count(1)
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[int] = deque()

    # ---- the face -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> HeldSequences:
        """What sessions remember."""
        return self._roster.held

    def submit(self, request: EngineRequest) -> int:
        """Queue a request and return its id. Raises what `admission.check_request` does, and `OverloadError`."""
        check_request(request, self.limits)
        self._speculator.check(request.speculate)
        if len(self._roster.jobs) + len(self._inbox) >= self._max_requests:
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
        self._speculator.propose(now, self._roster, self.executor.max_step_tokens)
        step_plan = self._plan(now)
        shares = self._roster.make_room(step_plan, now)
        result = self._run(step_plan.point, shares)
        if result is not None:
            self._emit(shares, result)
        return self._reporter.take()

    def settle(self) -> list[Event]:
        """Take submissions and cancellations in without computing anything."""
        self._accept(self._clock())
        return self._reporter.take()

    @property
    def busy(self) -> bool:
        """True while requests are queued or running."""
        return bool(len(self._roster) or self._inbox or self._cancelled)

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that hold KV, and those that wait for it; may be asked from any thread."""
        active = list(self._roster)
        running = sum(1 for sequence in active if sequence.state is not None)
        return running, len(active) - running + len(self._inbox)

    def run_until(self, *request_ids: int) -> list[Event]:
        """Step until these requests have ended (all, if none is named), and return every event on the way."""
        events: list[Event] = []
        waiting = set(request_ids)
        while self.busy and (waiting or not request_ids):
            events += self.step()
            waiting &= {job.id for job in (*self._roster.jobs.values(), *self._inbox)}
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
        self._roster.check_integrity()

    def close(self) -> None:
        """Give everything back and close the executor; idempotent."""
        self._inbox.clear()
        self._roster.clear()
        self._speculator.close()
        self.executor.close()

    def _make_chain(self, job: Job) -> PrefixChain | None:
        """Names for the prefix blocks of a request."""
        if not self._prefix_cache:
            return None
        return PrefixChain(
            model_key=self.model_key, point=job.point, kv_type=self.executor.kv_type, salt=job.request.salt
        )

    # ---- accept ---------------------------------------------------------------------------------------------------

    def _accept(self, now: int) -> None:
        """Take in what other threads submitted and cancelled."""
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        for job in [job for job in self._roster.jobs.values() if job.id in cancelled]:
            self._reporter.fail(job, CancelledError("the request was cancelled"), now)
        while self._inbox:
            job = self._inbox.popleft()
            if job.id in cancelled:
                self._reporter.refuse(job, CancelledError("the request was cancelled"), now)
                continue
            try:
                self._roster.open(job)
            except Exception as error:
                self._reporter.refuse(job, error, now)

    # ---- admit ----------------------------------------------------------------------------------------------------

    def _admit(self, now: int) -> None:
        """End what has no time left. (Admission by predicted time belongs here.)"""
        for sequence in list(self._roster):
            deadline = sequence.job.request.deadline_ns
            if deadline is None or sequence not in self._roster:
                continue
            if now + self._next_step_ns(sequence) < deadline:
                continue
            try:
                progress = sequence.close_early()
            except Exception as error:
                self._reporter.fail(sequence.job, error, now)
                continue
            if progress is not None:
                self._reporter.tell(sequence, progress, now)
            elif now >= deadline:
                late = DeadlineError("the budget was spent before the first token")
                self._reporter.fail(sequence.job, late, now)

    def _next_step_ns(self, sequence: Sequence) -> float:
        if self._cost is None:
            return 0.0
        shape = StepShape(sequence.job.point, decode_tokens=1, context_tokens=sequence.length, logit_rows=1)
        return self._cost.bound(shape) or 0.0

    # ---- plan -----------------------------------------------------------------------------------------------------

    def _plan(self, now: int) -> StepPlan:
        """Ask the scheduler; make room and ask again while KV is what is missing."""
        while len(self._roster):
            state = SchedulerState(
                tuple(self._roster.view(sequence) for sequence in self._roster),
                self.pool.available,
                self.executor.max_step_tokens,
                self._max_rows,
                self._max_sequences,
            )
            step_plan = scheduler.plan(now, state, self._cost)
            if step_plan.blocked and self.held.drop_oldest():
                continue
            for key in step_plan.preempt:
                self._roster.preempt(self._roster[key])
            if step_plan.spans:
                return step_plan
            if not step_plan.preempt:  # the most urgent one is alone, and still does not fit
                most_urgent = min(state.sequences, key=scheduler.urgency)
                shed = KvExhaustedError(f"{self.pool.blocks} KV blocks are too few for this request")
                self._reporter.fail(self._roster[most_urgent.key].job, shed, now)
        return StepPlan()

    # ---- run ------------------------------------------------------------------------------------------------------

    def _run(self, point: str, shares: list[Share]) -> StepResult | None:
        """Run the step. If the executor fails, every request of the step fails, and no other."""
        if not shares:
            return None
        try:
            self._speculator.fill(point, shares)
            batch = make_batch(point, shares)
            result = self.executor.step(batch)
        except BaseException as error:
            for share in shares:
                share.sequence.cut(share.tokens)
            if not isinstance(error, Exception):  # an interrupt: nothing was computed, and everything can go on
                raise
            for job in {share.sequence.job.id: share.sequence.job for share in shares}.values():
                self._reporter.fail(job, error, self._clock())
            return None
        self._reporter.stepped(batch, result)
        if self._cost is not None:
            self._cost.observe(shape_of(point, shares), result.elapsed_ns)
        self._speculator.observe(point, shares, result.elapsed_ns)
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
                branches = sequence.branches()
                for branch in branches:
                    self._roster.enter(branch, past=sequence)
                for each in (sequence, *branches):
                    progress = each.consume(rows)
                    self._roster.publish(each)  # now that it holds nothing but what stands
                    self._reporter.tell(each, progress, now)
            except Exception as error:
                self._reporter.fail(sequence.job, error, now)
            except BaseException:  # an interrupt: this request is half told, and the rest of the step not looked at
                for later in shares[index + 1 :]:
                    later.sequence.cut(later.tokens)
                self._reporter.fail(sequence.job, CancelledError("the request was interrupted"), now)
                raise
        self._speculator.settle(shares[0].sequence.job.point, shares)

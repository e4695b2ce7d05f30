"""The loop: accept, admit, plan, run, emit.

`submit` accepts and admits: what cannot be served, or not in time, is refused there and then. One `step()` ends what
has no time left, computes one step of the model for as many sequences as fit, and returns what came out of it. The
engine speaks token ids; text, grammars and stop strings reach it through protocols. It starts no thread and reads no
clock but the one it is given. `submit` and `cancel` may be called from other threads than `step`; nothing else may.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf

from haomiao.engine import alike, scheduler
from haomiao.engine.account import Letterhead
from haomiao.engine.admission import Limits, check_request
from haomiao.engine.ahead import RefusedPrompts
from haomiao.engine.batch import Share, make_batch, shape_of, work_of
from haomiao.engine.budgets import Budgets
from haomiao.engine.choice import ways
from haomiao.engine.cost import LearningCost, StepShape
from haomiao.engine.emission import Emission, take_back
from haomiao.engine.forecast import Work
from haomiao.engine.haste import Haste
from haomiao.engine.held import HeldSequences
from haomiao.engine.monitor import Monitor
from haomiao.engine.prefix import PrefixChain, PrefixNames
from haomiao.engine.random import fresh_seed
from haomiao.engine.rehearsal import Rehearsal
from haomiao.engine.reporter import Reporter
from haomiao.engine.request import EngineRequest, Event
from haomiao.engine.roster import Roster
from haomiao.engine.scheduler import SchedulerState, StepPlan
from haomiao.engine.sequence import Job
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.state import BlockPool
from haomiao.errors import (
    BudgetError,
    CancelledError,
    HaomiaoError,
    KvExhaustedError,
    OverloadError,
)
from haomiao.types import Executor, Observer, StepResult

MAX_GAP_NS = 5_000_000
"""Time between two rounds that counts as theirs; a caller that takes longer is not the machine's slowness."""


class Engine:
    """Serves requests on one executor."""

    def __init__(
        self,
        executor: Executor,
        *,
        eos_ids: SequenceOf[int] = (),
        final_ids: Iterable[int] = (),
        max_context: int,
        prefix_cache: bool = True,
        model_key: str = "",
        name: str = "",
        point: str | None = None,
        points: SequenceOf[str] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        observers: SequenceOf[Observer] = (),
        cost: LearningCost | None = None,
        errors: Mapping[str, float] | None = None,
        max_requests: int = 1024,
        speculator: Speculator | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        """`final_ids` are tokens that are a whole answer (codes of labels): a choice among options that end with them
        needs no score of their end, and so, if each is one token, one row of logits. `model_key` identifies the
        weights: prefix blocks of another key are never used. `name` and `errors` (the artifact's mean KL by point) go
        on receipts. `point` is where requests run, `points` are those that a budget may lower them to (default: all of
        the executor's). `max_requests` are queued or running before `OverloadError`. `speculator` drafts tokens,
        `monitor` measures the live error; they are closed with the engine."""
        self.executor = executor
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self._final_ids = frozenset(final_ids)
        hidden_size = int(getattr(executor, "hidden_size", 0))
        self.limits = Limits(executor.vocab_size, max_context, executor.kv_blocks, tuple(executor.points), hidden_size)
        self.point = point if point is not None else executor.points[0]
        self.pool = BlockPool(executor.kv_blocks, executor.kv_bytes_per_block, executor.copy_blocks)
        self.model_key = model_key
        self._prefix_cache = prefix_cache
        self._clock = clock
        self.cost = cost
        self.budgets = Budgets(
            executor.points,
            default=self.point,
            throttled=executor.points if points is None else points,
            errors=errors or {},
            max_step_tokens=executor.max_step_tokens,
            cost=cost,
        )
        self._round: tuple[StepShape, int, int] | None = None  # the last step: its shape, its beginning, its end
        self._speculator = speculator or Speculator(())
        self.monitor = monitor or Monitor(0.0)
        self.monitor.attach(executor, self.pool, self.budgets.forbid)
        self._rehearsal = Rehearsal(executor, self.pool, cost, clock)
        self._refused_prompts = RefusedPrompts()
        self.on_waiting: Callable[[], None] = lambda: None
        """Called, from any thread, when there is something new for `idle`; it must not wait."""
        self._looked = False  # the monitor took time in the last step
        self._roster = Roster(self.pool, self._name_blocks, self._speculator.release)
        letterhead = Letterhead(
            name,
            int(getattr(executor, "threads", 0)),
            str(getattr(executor, "isa", "")),
            dict(errors or {}),
            None if cost is None else cost.coverage,
        )
        self._reporter = Reporter(self._roster, letterhead, observers, self.budgets.ended)
        self._haste = Haste(self._roster, self._reporter, self.budgets, cost)
        self._emission = Emission(self._roster, self._reporter, self._speculator, self.monitor, clock)
        self._max_requests = max_requests
        self._max_rows = int(getattr(executor, "max_logit_rows", executor.max_step_tokens))
        self._draws = bool(getattr(executor, "draws", False))
        self._max_sequences = int(getattr(executor, "max_sequences", executor.max_step_tokens))
        self._ids = itertools.count(1)
        self._inbox: deque[Job] = deque()
        self._arrived: list[int] = []  # taken in, and not yet in the picture of the load that admission stands on
        self._refused: deque[tuple[Job, HaomiaoError]] = deque()
        self._cancelled: deque[int] = deque()

    # ---- the face -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> HeldSequences:
        """What sessions remember."""
        return self._roster.held

    def submit(self, request: EngineRequest) -> int:
        """Queue a request and return its id.

        Raises what `admission.check_request` does, `OverloadError` if the queue is full, and for a budget that cannot
        be kept in any of its `choice.ways` `BudgetError` (not even by an idle machine) or `OverloadError` (not beside
        the others); these two carry the least predicted time, and the observers get their receipt.
        """
        refusals: list[tuple[Job, HaomiaoError]] = []
        for way in ways(request):
            job = self._accept(way)
            try:
                self.budgets.describe(job)
                job.cached_tokens = self._roster.cached(job)
                self.budgets.admit(job, self._clock())
            except (BudgetError, OverloadError) as error:
                refusals.append((job, error))
            else:
                self._inbox.append(job)
                return job.id
        least = min(refusals, key=lambda refusal: refusal[1].predicted_ms or math.inf)
        self._refused.append(least)
        self._look_again(*least)
        raise least[1]

    def cancel(self, request_id: int) -> None:
        """End a request; everything it holds is free after the next `settle` or `step`. Unknown ids are ignored."""
        self._cancelled.append(request_id)

    def step(self) -> list[Event]:
        """Compute one step and return what happened. An empty list means that nothing was ready to be told."""
        self._advance()
        return self._reporter.take()

    def _advance(self) -> None:
        now = self._clock()
        self._learn(now)
        self._take_in(now)
        self._haste.hasten(now)
        works = self._works()
        self._steer(now, works)
        self._speculator.propose(now, self._roster, self.executor.max_step_tokens)
        step_plan = self._plan(now, works)
        shares = self._roster.make_room(step_plan, now)
        shape = shape_of(step_plan.point, shares)
        self._announce(shape, shares, works, now)
        result = self._run(step_plan.point, shares)
        drafted = any(share.sequence.draft for share in shares)
        if result is not None:
            self._emission.emit(step_plan.point, shares, result)
            if not drafted and not self._looked:  # drafting rounds and shadow runs are not the step's own time
                self._round = shape, now, max(self._clock(), now + result.elapsed_ns)
        if not len(self._roster):
            self._announce(shape, [], [], self._clock())

    def settle(self) -> list[Event]:
        """Take submissions and cancellations in without computing anything."""
        now = self._clock()
        self._take_in(now)
        self.budgets.publish(now, self._works())
        return self._reporter.take()

    def idle(self) -> bool:
        """Do a little of what can wait, at most a step or two. False if there is nothing to do, or something is
        asked."""
        if len(self._roster.jobs) + len(self._inbox) > len(self._reporter.own) or self._cancelled:
            return False
        self._begin_ahead()
        if self.busy:
            self._advance()  # what it has to tell, of others who come meanwhile, is told by the next step
            return True
        return self.monitor.work() or self._rehearsal.work()

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

    def open_session(self) -> int:
        """A memory of one sequence between requests (`EngineRequest.session`)."""
        return self.held.open()

    def close_session(self, session: int) -> None:
        """Forget it; a request that runs in it goes on alone."""
        self.held.close(session)

    def forbid(self, points: Iterable[str]) -> None:
        """Keep the throttle off these points (`Budgets.forbid`)."""
        self.budgets.forbid(points)

    def check_integrity(self) -> None:
        """Raise `EngineError` if a KV block is lost, held twice or free while held."""
        self._roster.check_integrity(self.monitor.states())

    def close(self) -> None:
        """Give everything back and close the executor; idempotent."""
        self._inbox.clear()
        self._roster.clear()
        self._speculator.close()
        self.monitor.close()
        self.executor.close()

    def _name_blocks(self, job: Job) -> PrefixNames | None:
        """Names for the prefix blocks of a request, at whatever point they are computed."""
        if not self._prefix_cache:
            return None
        return PrefixNames(
            lambda point: PrefixChain(
                model_key=self.model_key, point=point, kv_type=self.executor.kv_type, salt=job.request.salt
            )
        )

    # ---- accept ---------------------------------------------------------------------------------------------------

    def _accept(self, request: EngineRequest) -> Job:
        """A job out of a request that contradicts nothing."""
        check_request(request, self.limits)
        self._speculator.check(request.speculate)
        if len(self._roster.jobs) + len(self._inbox) >= self._max_requests:
            raise OverloadError(f"{self._max_requests} requests are queued or running already", retry_after_ms=1000.0)
        now = self._clock()
        seed = request.sampling.seed
        ends_itself = request.work == "choose" and all(option[-1] in self._final_ids for option in request.options)
        return Job(
            id=next(self._ids),
            request=request,
            points=(request.point or self.point,),
            arrival_ns=now if request.arrival_ns is None else request.arrival_ns,
            seed=fresh_seed() if seed is None else seed,
            eos_ids=() if ends_itself else self.eos_ids,
            vocab_size=self.executor.vocab_size,
        )

    def _look_again(self, job: Job, error: HaomiaoError) -> None:
        """A request was refused: what would let its like in later is done while there is time."""
        if error.predicted_ms is None:  # time was not the reason
            return
        doubted = (isinstance(error, BudgetError) or not self.busy) and self._rehearsal.doubt(job.points[-1])
        if self._refused_prompts.note(job) or doubted:
            self.on_waiting()

    def _begin_ahead(self) -> None:
        """Take in the beginning that refused prompts have in common, as a request of nobody's, if it is due."""
        request = None if self._reporter.own else self._refused_prompts.take()
        if request is None:
            return
        with contextlib.suppress(HaomiaoError):  # another time
            job = self._accept(request)
            self.budgets.describe(job)
            job.cached_tokens = self._roster.cached(job)
            self.budgets.admit(job, self._clock())
            self._reporter.own.add(job.id)
            self._inbox.append(job)

    def _take_in(self, now: int) -> None:
        """Take in what other threads submitted and cancelled."""
        self._begin_ahead()
        while self._refused:
            self._reporter.refused(*self._refused.popleft(), now)
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        for job in [job for job in self._roster.jobs.values() if job.id in cancelled]:
            self._reporter.fail(job, CancelledError("the request was cancelled"), now)
        while self._inbox:
            job = self._inbox.popleft()
            if job.id in cancelled:
                self._reporter.refuse(job, CancelledError("the request was cancelled"), now)
            else:
                try:
                    self._roster.open(job)
                except Exception as error:
                    self._reporter.refuse(job, error, now)
            self._arrived.append(job.id)

    # ---- plan -----------------------------------------------------------------------------------------------------

    def _steer(self, now: int, works: list[Work]) -> None:
        """Set the throttle, and with it the point of everybody."""
        self.budgets.steer(now, works)
        for sequence in self._roster:
            sequence.point = self.budgets.point_of(sequence.job)

    def _plan(self, now: int, works: list[Work]) -> StepPlan:
        """Ask the scheduler; make room and ask again while KV is what is missing."""
        waiting = set() if self.budgets.gear.guests else {work.key for work in works if work.guest}
        while len(self._roster):
            state = SchedulerState(
                tuple(
                    self._roster.view(sequence, sequence.point, waits=sequence.key in waiting)
                    for sequence in self._roster
                ),
                self.pool.available,
                self.executor.max_step_tokens,
                self._max_rows,
                self._max_sequences,
                self.budgets.chunk_tokens(),
                self.budgets.tightest_ns,
            )
            step_plan = alike.plan(now, state, self.cost, self._roster)
            if step_plan.blocked and (self.monitor.give_way() or self.held.drop_oldest()):
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

    def _works(self) -> list[Work]:
        """What every sequence still needs; nothing is counted where nothing is known about time."""
        return [] if self.cost is None else [work_of(sequence) for sequence in self._roster]

    def _spare_ns(self) -> float:
        """What the monitor may take now without any budget suffering."""
        return 0.0 if self._inbox else self._haste.spare_ns(self._clock())

    def _announce(self, shape: StepShape, shares: list[Share], works: list[Work], now: int) -> None:
        """Show admission the load as it will be when the step has ended."""
        if self.cost is None:
            return
        computed = {
            share.sequence.key: share.tokens + sum(each.tokens for each in share.branches)
            for share in shares
            if share.parent is None
        }
        after = [work.after(computed[work.key]) if work.key in computed else work for work in works]
        self.budgets.publish(now, after, self._arrived, (self.cost.predict(shape) or 0.0) if shares else 0.0)
        self._arrived.clear()

    def _learn(self, now: int) -> None:
        """Tell the cost model what the last round took, up to this one if somebody waited meanwhile."""
        if self.cost is not None and self._round is not None:
            shape, begun, ended = self._round
            if len(self._roster):
                ended = max(ended, min(now, ended + MAX_GAP_NS))
            self.cost.observe(shape, ended - begun)
        self._round = None

    # ---- run ------------------------------------------------------------------------------------------------------

    def _run(self, point: str, shares: list[Share]) -> StepResult | None:
        """Run the step. If the executor fails, every request of the step fails, and no other."""
        if not shares:
            return None
        try:
            self._speculator.fill(point, shares)
            batch = make_batch(point, shares, self._draws)
            result = self.executor.step(batch)
            self._looked = self.monitor.stepped(point, shares, batch, result, self._spare_ns)
        except BaseException as error:
            take_back(shares)
            if not isinstance(error, Exception):  # an interrupt: nothing was computed, and everything can go on
                raise
            for job in {share.sequence.job.id: share.sequence.job for share in shares}.values():
                self._reporter.fail(job, error, self._clock())
            return None
        self._reporter.stepped(batch, result)
        self._speculator.observe(point, shares, result.elapsed_ns)
        return result

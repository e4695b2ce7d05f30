"""Time, between the pure functions and the loop: what each request may give up, admission, the throttle, what was kept.

Admission may be asked from any thread while a step runs: it stands on a picture of the load that the loop publishes,
and on what was admitted since. Reads no clock; knows no executor beyond its points and sizes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from haomiao.engine import throttle
from haomiao.engine.admission import admit, ladder_of, permitted
from haomiao.engine.batch import work_of_new
from haomiao.engine.cost import COVERAGE, LearningCost, StepShape
from haomiao.engine.forecast import NEVER, Machine, Work, forecast
from haomiao.engine.lengths import AnswerLengths
from haomiao.engine.promises import Promises
from haomiao.engine.request import EngineRequest, FinishDetail
from haomiao.engine.scheduler import FLOOR_TOKENS
from haomiao.engine.sequence import Job
from haomiao.engine.sequence import Sequence as Live
from haomiao.engine.throttle import Gear

LEAST_TOKENS = 16
"""Tokens of an answer that is worth having, unless the request says otherwise."""
CLOSING_TOKENS = 12
"""With time for so many tokens left, an answer looks for the end of a sentence."""
REVIEW_STEPS = 4
"""Steps between two looks at the throttle while nobody comes or goes."""
MANY = 1 << 30
TIGHTEST = 64
"""Latest requests whose tightest budget decides how long a step may make others wait."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The load as it was when the loop last looked: `works` go on from `free_ns`, when the running step ends."""

    free_ns: int = 0
    works: tuple[Work, ...] = ()


class Budgets:
    """The budgets of one engine."""

    def __init__(
        self,
        points: Sequence[str],
        *,
        default: str,
        throttled: Sequence[str],
        errors: Mapping[str, float],
        max_step_tokens: int,
        cost: LearningCost | None,
    ) -> None:
        """`points` are those of the executor, `throttled` those that a budget may be lowered to."""
        self.ladder = ladder_of(points)
        self.promises = Promises(COVERAGE if cost is None else cost.coverage)
        self.gear = Gear()
        self._default = default
        self._lowest = ladder_of(throttled)[-1] if throttled else default
        self._errors = dict(errors)
        self._max_step_tokens = max_step_tokens
        self._cost = cost
        self._lengths = AnswerLengths()
        self._lock = threading.Lock()
        self._outlook = Outlook()
        self._since: dict[int, Work] = {}  # admitted, and not in the outlook yet, by job
        self._tightest: deque[int] = deque(maxlen=TIGHTEST)
        self._chunk: int | None = None
        self._reviewed: tuple[int, frozenset[int]] = (0, frozenset())
        self._rested_ns = 0
        self._forbidden: frozenset[str] = frozenset()

    # ---- admit ----------------------------------------------------------------------------------------------------

    def describe(self, job: Job) -> None:
        """Note on the job at which points it may run and how long an answer to expect. Raises `BudgetError`."""
        request = job.request
        top, bottom = permitted(request, self.ladder, self._default, self._lowest, self._errors)
        job.top, job.bottom, job.points = top, bottom, self.ladder[top : bottom + 1]
        if request.work == "generate":
            most = request.sampling.max_tokens
            job.least = min(most, request.sampling.min_tokens or self._shortest(request) or LEAST_TOKENS)
            job.expected = max(job.least, self._lengths.expect(most))

    def admit(self, job: Job, now: int) -> None:
        """Let the job in and note what it was promised. Raises `BudgetError`, `OverloadError`; nothing changed then."""
        if self._cost is None:
            return
        work = work_of_new(job)
        with self._lock:
            others = [*self._outlook.works, *self._since.values()]
            free = max(now, self._outlook.free_ns)
            if not others:
                self._cost.rest(now - max(self._outlook.free_ns, self._rested_ns))
                self._rested_ns = now
            if not work.guest:
                self._tightest.append(work.due_ns - work.arrival_ns)
                self._chunk = None
                steps = 1 + work.decode
                found = admit(
                    now,
                    work,
                    others,
                    self._machine(),
                    self._cost,
                    self.gear.level,
                    free_ns=free,
                    stretch=self.promises.stretch(steps),
                    floor_ns=self._floor(others),
                )
                if found is not None:
                    job.promised_ns, job.forecast_ns = found
                    job.admitted_ns = now
            elif (
                job.request.work in ("generate", "choose")
                and not self.promises.knows(1 + work.decode)
                and all(other.guest for other in others)
            ):
                done = forecast(free, [*others, work], self._machine(), self._cost, self.gear.level)
                if done is not None and done[work.key].end_ns < NEVER:
                    job.forecast_ns, job.admitted_ns = done[work.key].end_ns, now
            self._since[job.id] = work

    def _shortest(self, request: EngineRequest) -> int | None:
        """Tokens of the shortest answer that a grammar allows, at most what is worth having without one."""
        if request.constraint is None:
            return None
        try:
            closing = len(request.constraint.fork().tokens_to_close())
        except Exception:  # it will say so again when it is needed; until then nothing shorter is known
            return None
        return min(max(1, closing), LEAST_TOKENS)

    # ---- steer ----------------------------------------------------------------------------------------------------

    def steer(self, now: int, works: Sequence[Work]) -> Gear:
        """Where the throttle stands for the next step; looked at anew when somebody came or went, or a while passed."""
        if self._cost is None or all(work.guest for work in works):
            self.gear = Gear()
            return self.gear
        since, known = self._reviewed
        keys = frozenset(work.key for work in works)
        if keys == known and since < REVIEW_STEPS:
            self._reviewed = since + 1, known
            return self.gear
        self._reviewed = 1, keys
        self.gear = throttle.choose(now, works, self._machine(), self._cost, self.gear, self._floor(works))
        return self.gear

    def forbid(self, points: Iterable[str]) -> None:
        """Run at none of these points any more, but for requests that ask for exactly that one. The most accurate point
        is never forbidden; an empty set allows all again."""
        self._forbidden = frozenset(points)

    def point_of(self, job: Job) -> str:
        """Where the job runs in the present gear."""
        level = min(max(self.gear.level, job.top), job.bottom)
        while level and self.ladder[level] in self._forbidden and self.ladder[level] != job.request.point:
            level -= 1
        return self.ladder[level]

    def spare_ns(self, now: int, works: Sequence[Work]) -> float:
        """Nanoseconds that may be taken from everybody now without any budget suffering: the least slack that is
        forecast in the present gear. Infinite where nobody has a budget, 0 where nothing is known about time."""
        budgeted = [work for work in works if not work.guest]
        if not budgeted:
            return math.inf
        if self._cost is None:
            return 0.0
        done = forecast(now, works, self._machine(), self._cost, self.gear.level, floor_ns=self._floor(works))
        if done is None:
            return 0.0
        slack = [work.deadline_ns - done[work.key].end_ns for work in budgeted if work.deadline_ns is not None]
        slack += [work.first_ns - done[work.key].first_ns for work in budgeted if work.first_ns is not None]
        return float(max(0, min(slack)))

    def chunk_tokens(self) -> int | None:
        """Prefill tokens of one step, at most: a quarter of the tightest budget seen lately; None without budgets."""
        return None if self._cost is None or not self._tightest else self._machine().chunk_tokens

    @property
    def tightest_ns(self) -> int:
        """The tightest budget seen lately; 0 before the first."""
        return min(self._tightest, default=0)

    def tokens_left(self, now: int, sequence: Live, round_ns: float) -> int:
        """Tokens that the sequence has time for before its deadline, if rounds are expected to take `round_ns`.

        A step that must not end late is given its bound, a few steps the bound of a few."""
        deadline = sequence.job.request.deadline_ns
        if deadline is None or self._cost is None:
            return MANY if deadline is None or now < deadline else 0
        if now + round_ns * self._cost.margin(round_ns) >= deadline:
            return 0
        return max(1, int((deadline - now) / max(1.0, round_ns * self._cost.margin(CLOSING_TOKENS * round_ns))))

    def publish(self, now: int, works: Sequence[Work], arrived: Iterable[int] = (), step_ns: float = 0.0) -> None:
        """Renew the picture of the load: `works` go on in `step_ns`; `arrived` are jobs that are among them now."""
        with self._lock:
            self._outlook = Outlook(now + int(step_ns), tuple(works))
            for job_id in arrived:
                self._since.pop(job_id, None)

    # ---- learn ----------------------------------------------------------------------------------------------------

    def ended(self, job: Job, sequence: Live, now: int, detail: FinishDetail | None) -> None:
        """A sample ended."""
        params = job.request.sampling
        if job.request.work == "generate" and detail is not None:
            self._lengths.record(
                params.max_tokens, sequence.produced, whole=detail not in ("max_tokens", "budget_exhausted")
            )
        if job.forecast_ns is None:
            return
        if sequence.sample and job.request.work == "generate":  # the first sample speaks for all; a choice has options
            return
        whole = detail in ("done", "single_prefill") or sequence.produced >= job.expected
        actual, forecast = now - job.admitted_ns, job.forecast_ns - job.admitted_ns
        if job.promised_ns is None:
            self.promises.learn(job.expected, forecast, actual, whole=whole)
        else:
            self.promises.record(job.expected, forecast, actual, kept=now <= job.promised_ns, whole=whole)

    # ---- sizes ----------------------------------------------------------------------------------------------------

    def _machine(self) -> Machine:
        if self._chunk is None:
            self._chunk = self._size_chunk()
        return Machine(self.ladder, self._max_step_tokens, self._chunk, self.tightest_ns)

    def _size_chunk(self) -> int:
        """Prefill tokens that take a quarter of the tightest budget; a floor keeps prefill efficient."""
        if self._cost is None or not self._tightest:
            return self._max_step_tokens
        point, limit = self.ladder[-1], min(self._tightest) / 4
        low, high = min(FLOOR_TOKENS, self._max_step_tokens), self._max_step_tokens
        while low < high:
            middle = (low + high + 1) // 2
            expected = self._cost.predict(StepShape(point, 0, middle, middle * middle // 2))
            low, high = (middle, high) if expected is None or expected <= limit else (low, middle - 1)
        return low

    def _floor(self, works: Sequence[Work]) -> int:
        """Nanoseconds of the step that those without a budget get now and then."""
        guests = [work for work in works if work.guest]
        if self._cost is None or not guests:
            return 0
        prefill = FLOOR_TOKENS if any(work.prefill for work in guests) else 0
        decode = sum(work.width for work in guests if not work.prefill)
        point = self.ladder[min(work.top for work in guests)]
        context = sum(work.length for work in guests)
        shape = StepShape(point, decode, prefill, context * max(1, prefill), decode + bool(prefill), len(guests))
        return int(self._cost.bound(shape) or 0)

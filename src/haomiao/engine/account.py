"""Receipts: the account of what one answer took. Arithmetic on times that others noted; knows no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from haomiao.engine.request import FinishDetail
from haomiao.engine.sequence import Job, Sequence
from haomiao.errors import BudgetError, DeadlineError, HaomiaoError, OverloadError
from haomiao.types import Outcome, Receipt, ScheduleEntry


@dataclass(frozen=True, slots=True)
class Letterhead:
    """What is the same on every receipt of an engine."""

    model: str = ""
    threads: int = 0
    isa: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Mean KL to `full` by point, as measured for the artifact."""
    coverage: float | None = None
    """The share of stated bounds that is to hold."""


def make_receipt(
    head: Letterhead,
    job: Job,
    sequence: Sequence | None,
    now: int,
    *,
    detail: FinishDetail | None = None,
    error: HaomiaoError | None = None,
) -> Receipt:
    """The account of one sample that ends at `now`; `sequence` is None if the request never became one."""
    arrival, deadline = job.arrival_ns, job.request.deadline_ns
    started = job.started_ns if job.started_ns is not None else now
    first = sequence.first_token_ns if sequence is not None else None
    schedule = list(sequence.schedule) if sequence is not None else []
    predicted = None if job.promised_ns is None else (job.promised_ns - arrival) / 1e6
    if error is not None and error.predicted_ms is not None:
        predicted = error.predicted_ms
    return Receipt(
        budget_ms=None if deadline is None else (deadline + job.request.delivery_ns - arrival) / 1e6,
        predicted_ms=predicted,
        coverage=None if predicted is None else head.coverage,
        queue_ms=(started - arrival) / 1e6,
        prefill_ms=((now if first is None else first) - started) / 1e6,
        decode_ms=0.0 if first is None else (now - first) / 1e6,
        total_ms=(now - arrival) / 1e6,
        ttft_ms=None if first is None else (first - arrival) / 1e6,
        prompt_tokens=len(job.request.prompt_ids),
        cached_tokens=job.cached_tokens,
        completion_tokens=sequence.produced if sequence is not None else 0,
        schedule=schedule,
        step_kl=sum(sequence.step_kls) / len(sequence.step_kls) if sequence is not None and sequence.step_kls else None,
        drafted_tokens=sequence.drafted if sequence is not None else 0,
        accepted_tokens=sequence.accepted if sequence is not None else 0,
        estimated_error=_estimated_error(head.errors, schedule),
        outcome=_outcome(job, schedule, first, now, detail, error),
        seed=job.seed if job.request.work == "generate" else None,
        model=head.model,
        threads=head.threads,
        isa=head.isa,
    )


def _estimated_error(errors: Mapping[str, float], schedule: list[ScheduleEntry]) -> float | None:
    """Mean over the tokens computed; None if a point that was run was never measured."""
    tokens = sum(entry.tokens for entry in schedule)
    if not tokens or any(entry.point not in errors for entry in schedule):
        return None
    return sum(errors[entry.point] * entry.tokens for entry in schedule) / tokens


def _outcome(
    job: Job,
    schedule: list[ScheduleEntry],
    first: int | None,
    now: int,
    detail: FinishDetail | None,
    error: HaomiaoError | None,
) -> Outcome | None:
    deadline, ttft = job.request.deadline_ns, job.request.ttft_deadline_ns
    if not job.budgeted:
        return None
    if error is not None:
        if isinstance(error, (BudgetError, OverloadError)):
            return "refused"
        return "missed" if isinstance(error, DeadlineError) else None
    late = (deadline is not None and now > deadline) or (ttft is not None and first is not None and first > ttft)
    if late or (detail == "budget_exhausted" and job.request.on_budget == "refuse"):
        return "missed"
    if detail == "budget_exhausted":
        return "truncated"
    if detail == "single_prefill":
        return "met_single_prefill"
    return "met_lower_point" if any(entry.point != job.point for entry in schedule) else "met"

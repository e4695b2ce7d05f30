"""What a run under load was worth: the arithmetic on its records. Measures nothing.

Everything is divided by *all offered* requests, refused and failed ones included, so that neither delaying nor turning
away can be taken for success. Deadlines count from when a request was due, not from when the client came to send it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from haomiao.measure.load import Record, Run
from haomiao.measure.mix import Mix, RequestClass
from haomiao.metrics.statistics import percentile

VOID_LAG_MS, VOID_LAG_SHARE = 2.0, 0.1
"""A run whose 99th percentile of send lag is above both, the milliseconds and the share of the shortest budget, says
nothing about the server. What is below is in the server's time, since that counts from when a request was due."""
REFUSALS = (422, 429, 503)
WHOLE = ("stop", "length", "tool_calls", "content_filter")


def deadline_ms(record: Record, kind: RequestClass) -> float | None:
    """When the whole answer is due, on the trace's clock; None without a budget."""
    return None if kind.budget_ms is None else record.offer.due_ms + kind.budget_ms


def is_refused(record: Record) -> bool:
    """Turned away: by the server before it began, or by a proxy before it."""
    return record.status in REFUSALS


def is_whole(record: Record) -> bool:
    """An answer arrived to its end."""
    return record.status == 200 and record.error is None and record.code is None and record.finish in WHOLE


def is_on_time(record: Record, kind: RequestClass) -> bool:
    """A whole answer, ended before its deadline."""
    limit = deadline_ms(record, kind)
    return is_whole(record) and (limit is None or record.end_ms <= limit)


def is_truncated(record: Record) -> bool:
    """The server cut the answer short to keep its budget."""
    outcome = (record.receipt or {}).get("outcome")
    return record.detail == "budget_exhausted" or outcome == "truncated"


def score(record: Record, kind: RequestClass) -> float:
    """What the client could use by the deadline, 0 to 1.

    A choice: 1 if one of the options arrived in time. Text: 1 if it came to its own end (or its full length) in time,
    else the share of its tokens that did, whoever cut it: the same partial credit for every server.
    """
    limit = deadline_ms(record, kind)
    if record.status != 200:
        return 0.0
    if kind.options:
        return float(is_on_time(record, kind) and record.text.strip() in {option.strip() for option in kind.options})
    if is_on_time(record, kind) and not is_truncated(record) and record.finish == "stop":
        return 1.0
    if not record.token_ms:
        return 0.0
    in_time = sum(1 for moment in record.token_ms if limit is None or moment <= limit)
    # a piece of a stream may hold several tokens
    return min(1.0, in_time * max(record.tokens, len(record.token_ms)) / len(record.token_ms) / kind.max_tokens)


def is_right(record: Record) -> bool | None:
    """Whether the answer is the expected one; None where nothing is expected or nothing came."""
    if record.offer.expect is None or not is_whole(record):
        return None
    return record.text.strip() == record.offer.expect.strip()


def lag_limit_ms(mix: Mix) -> float:
    """The send lag that makes a run void."""
    budgets = [budget for kind in mix.classes for budget in (kind.budget_ms, kind.ttft_ms) if budget is not None]
    return max(VOID_LAG_MS, VOID_LAG_SHARE * min(budgets, default=0.0))


def summarize_load(run: Run, mix: Mix) -> dict[str, Any]:
    """The report: all requests together, every class, and whether the run is void."""
    kinds = {kind.name: kind for kind in mix.classes}
    lags = [record.lag_ms for record in run.records]
    lag = _percentiles(lags, (50, 99, 100))
    seconds = max(run.elapsed_ms, 1e-6) / 1e3
    report = {
        "workload": mix.name,
        "elapsed_s": seconds,
        "offered_per_s": _offered_rate(run.records),
        "send_lag_ms": lag,
        "void": lag is None or lag["p99"] > lag_limit_ms(mix),
        **_summary(run.records, kinds),
        "classes": {},
    }
    report["goodput_per_s"] = report["on_time"] * len(run.records) / seconds
    for kind in mix.classes:
        mine = [record for record in run.records if record.offer.kind == kind.name]
        if mine:
            report["classes"][kind.name] = {"budget_ms": kind.budget_ms, **_summary(mine, kinds)}
    return report


def _summary(records: Sequence[Record], kinds: dict[str, RequestClass]) -> dict[str, Any]:
    offered = len(records)
    pairs = [(record, kinds[record.offer.kind]) for record in records]
    whole = [record for record in records if is_whole(record)]
    refused = [record for record in records if is_refused(record)]
    admitted = [(record, kind) for record, kind in pairs if record.status == 200]
    late = [
        record.end_ms - limit
        for record, kind in admitted
        if (limit := deadline_ms(record, kind)) is not None and record.end_ms > limit
    ]
    rights = [right for record in records if (right := is_right(record)) is not None]
    return {
        "offered": offered,
        "on_time": sum(is_on_time(*pair) for pair in pairs) / offered,
        "useful": sum(score(*pair) for pair in pairs) / offered,
        "right": sum(rights) / len(rights) if rights else None,
        "refused": len(refused) / offered,
        "truncated": sum(is_truncated(record) for record in whole) / offered,
        "expired": sum(record.status == 504 for record in records) / offered,
        "failed": sum(_failed(record) for record in records) / offered,
        "late_among_admitted": len(late) / len(admitted) if admitted else None,
        "lateness_ms": _percentiles(late, (50, 99, 100)),
        "notice_ms": _percentiles([record.end_ms - record.sent_ms for record in refused], (50, 99, 100)),
        "notice_share_of_budget_p99": _notice_share(pairs),
        "ttft_ms": _percentiles([r.token_ms[0] - r.sent_ms for r in records if r.token_ms], (50, 90, 99)),
        "itl_ms": _percentiles(_gaps(records), (50, 90, 99)),
        "e2e_ms": _percentiles([record.end_ms - record.sent_ms for record in whole], (50, 90, 99)),
        "receipts": _receipts(records),
    }


def _failed(record: Record) -> bool:
    """Neither an answer, a refusal, nor a client that hung up."""
    if record.error == "gave up" or is_refused(record) or record.status == 504:
        return False
    return not is_whole(record)


def _gaps(records: Sequence[Record]) -> list[float]:
    return [after - before for r in records for before, after in zip(r.token_ms, r.token_ms[1:], strict=False)]


def _notice_share(pairs: Sequence[tuple[Record, RequestClass]]) -> float | None:
    shares = [
        (record.end_ms - record.sent_ms) / kind.budget_ms
        for record, kind in pairs
        if is_refused(record) and kind.budget_ms
    ]
    return percentile(shares, 99) if shares else None


def _receipts(records: Sequence[Record]) -> dict[str, Any] | None:
    """What the receipts claim, against each other and against the client's clock; None if there are none.

    `coverage`: the share whose actual time stayed inside the predicted bound. `tightness`: median of bound / actual.
    `clock_error_ms`: the client's time from last byte sent to last byte received, less the receipt's total.
    """
    found = [(record, record.receipt) for record in records if record.receipt and is_whole(record)]
    if not found:
        return None
    bounds = [
        (receipt["predicted_ms"], receipt["total_ms"])
        for _, receipt in found
        if receipt.get("predicted_ms") is not None and receipt.get("total_ms")
    ]
    clocks = [
        record.end_ms - record.sent_ms - receipt["total_ms"] for record, receipt in found if receipt.get("total_ms")
    ]
    outcomes: dict[str, int] = {}
    points: dict[str, int] = {}
    for _, receipt in found:
        outcome = str(receipt.get("outcome"))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        for entry in receipt.get("schedule") or ():
            points[str(entry["point"])] = points.get(str(entry["point"]), 0) + int(entry["tokens"])
    return {
        "count": len(found),
        "coverage": sum(actual <= bound for bound, actual in bounds) / len(bounds) if bounds else None,
        "tightness": percentile([bound / actual for bound, actual in bounds], 50) if bounds else None,
        "clock_error_ms": _percentiles(clocks, (1, 50, 99)),
        "outcomes": outcomes,
        "tokens_by_point": points,
    }


def _offered_rate(records: Sequence[Record]) -> float | None:
    """Requests a second that the trace asked for."""
    span = max(record.offer.due_ms for record in records) - min(record.offer.due_ms for record in records)
    return 1e3 * (len(records) - 1) / span if span > 0 else None


def _percentiles(values: Sequence[float], which: Sequence[int]) -> dict[str, float] | None:
    return {"max" if q == 100 else f"p{q}": percentile(values, q) for q in which} if values else None

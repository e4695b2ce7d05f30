"""What is refused when it is submitted: requests that contradict themselves, the model or the size of the KV pool, and
budgets that cannot be kept.

Every refusal is one line that names the numbers. A budget is admitted if at the cheapest permitted point the least that
is worth having fits, with everything admitted before still holding. Pure functions; time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haomiao.engine.cost import Cost
from haomiao.engine.forecast import NEVER, Finish, Machine, Work, forecast
from haomiao.engine.request import WORKS, EngineRequest
from haomiao.engine.state import blocks_for
from haomiao.engine.validate import MAX_LOGPROBS, validate
from haomiao.errors import (
    BudgetError,
    ContextLengthError,
    InputError,
    KvExhaustedError,
    OverloadError,
    UnavailableError,
)
from haomiao.types import KV_BLOCK_TOKENS, POINTS

MAX_OPTIONS = 1024
LEAST_STRETCH = 0.5
"""However wide forecasts were lately, no more of one is disbelieved when it is judged by a budget."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit."""

    vocab_size: int
    max_context: int
    kv_blocks: int
    points: tuple[str, ...]
    hidden_size: int = 0
    """Width of the hidden states that the executor can return; 0 if it cannot."""


def check_request(request: EngineRequest, limits: Limits) -> None:
    """Raise unless an idle engine can serve the request: `InputError`, `ContextLengthError`, `KvExhaustedError`, or
    `UnavailableError` for embeddings where there are no hidden states."""
    if request.work not in WORKS:
        raise InputError(f"work must be one of {', '.join(WORKS)}, not {request.work!r:.40}", param="work")
    if request.work == "embed" and not limits.hidden_size:
        raise UnavailableError("this model gives no embeddings: its executor returns no hidden states", param="model")
    if request.point is not None and request.point not in limits.points:
        known = ", ".join(limits.points)
        raise InputError(f"this model has the points {known}, not {request.point!r}", param="point")
    if request.min_point is not None and request.min_point not in limits.points:
        known = ", ".join(limits.points)
        raise InputError(f"this model has the points {known}, not {request.min_point!r:.40}", param="min_point")
    if request.on_budget not in ("degrade", "truncate", "refuse"):
        raise InputError(
            f"on_budget must be degrade, truncate or refuse, not {request.on_budget!r:.40}", param="on_budget"
        )
    if request.max_kl is not None and not (_is_number(request.max_kl) and request.max_kl >= 0):
        raise InputError(f"max_kl must be a number of at least 0, not {request.max_kl!r:.40}", param="max_kl")
    if not isinstance(request.salt, bytes):
        raise InputError("salt must be bytes", param="salt")
    check_tokens("prompt", request.prompt_ids, limits.vocab_size)
    requested = 0
    if request.work == "generate":
        validate(request.sampling, limits.vocab_size, limits.max_context)
        requested = request.sampling.max_tokens
        if request.sampling.stop and request.stop is None:
            raise InputError("stop strings need a tokenizer, and this model has none", param="stop")
    if request.work == "choose":
        requested = _check_options(request, limits)
    if request.prompt_logprobs is not None and not 0 <= request.prompt_logprobs <= MAX_LOGPROBS:
        raise InputError(f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}", param="prompt_logprobs")
    _check_room(len(request.prompt_ids), requested, limits)


def ladder_of(points: Sequence[str]) -> tuple[str, ...]:
    """Points from the most accurate to the cheapest."""
    return tuple(sorted(points, key=list(POINTS).index))


def permitted(
    request: EngineRequest, ladder: Sequence[str], default: str, lowest: str, errors: Mapping[str, float]
) -> tuple[int, int]:
    """Indexes in `ladder` of the most accurate and of the cheapest point that a request may run at.

    It begins at its own point, or `default`. Only a budget that may be degraded is lowered, no further than `lowest`,
    its `min_point` and its `max_kl`; `max_kl` lifts a request that named no point to where it holds. Raises
    `BudgetError` if no point is accurate enough, or was measured at all.
    """
    top = ladder.index(request.point or default)
    bottom = top
    if request.on_budget == "degrade" and (request.deadline_ns is not None or request.ttft_deadline_ns is not None):
        bottom = max(top, ladder.index(lowest))
    if request.min_point is not None:
        floor = ladder.index(request.min_point)
        top = min(top, floor) if request.point is None else top
        if top > floor:
            raise InputError(f"point {ladder[top]} is below min_point {request.min_point}", param="min_point")
        bottom = min(bottom, floor)
    if request.max_kl is None:
        return top, bottom
    fine = [errors.get(point, float("inf")) <= request.max_kl for point in ladder]
    while bottom > top and not fine[bottom]:
        bottom -= 1
    while request.point is None and top > 0 and not fine[top]:
        top = bottom = top - 1
    if not fine[top]:
        known = ", ".join(f"{point} {errors[point]:.4g}" for point in ladder if point in errors)
        raise BudgetError(
            f"no permitted point keeps a mean KL of {request.max_kl:g} nats per token; "
            f"measured for this model: {known or 'none'}",
            param="max_kl",
        )
    return top, bottom


def admit(
    now: int,
    work: Work,
    others: Sequence[Work],
    machine: Machine,
    cost: Cost,
    level: int,
    *,
    free_ns: int,
    stretch: float = 1.0,
    floor_ns: int = 0,
) -> tuple[int, int] | None:
    """The predicted bound on a work's end and the forecast under it, as absolute times; None if nothing is known about
    time, or it has no budget. `others` was admitted before and goes on from `free_ns`, when the step that runs now
    ends; those of them without a budget get `floor_ns` now and then and else wait. `level` is where the throttle
    stands. `stretch` is what such requests took beyond their forecast, at the stated coverage: what is promised is the
    forecast times that, and where forecasts were too wide the budget is judged by the same. (Where they were too narrow
    it is not: that was company which came later, and who comes later is refused if it would break a promise.)

    Raises `BudgetError` if not even an idle machine could keep the budget, `OverloadError` if only the load forbids it.
    """
    if work.guest:
        return None
    cheapest, begun = len(machine.ladder) - 1, max(now, free_ns)
    before = [other for other in others if not other.guest]
    alone = forecast(work.arrival_ns, [work], machine, cost.idle(), cheapest, least=True)
    loaded = forecast(begun, [*before, work], machine, cost, cheapest, least=True, floor_ns=floor_ns)
    if alone is None or loaded is None:
        return None
    if not alone[work.key].keeps(work):
        needed = _late_by(work, alone[work.key].first_ns, alone[work.key].end_ns)
        raise BudgetError(
            f"{_budget(work)} cannot be kept: even an idle machine needs {needed / 1e6:.1f} ms",
            param="budget_ms" if work.deadline_ns is not None else "ttft_ms",
            predicted_ms=needed / 1e6,
        )
    finish = loaded[work.key].sooner(now, max(stretch, LEAST_STRETCH))
    if not finish.keeps(work) or _breaks(before, loaded, machine, cost, begun, floor_ns):
        needed = min(_late_by(work, finish.first_ns, finish.end_ns), NEVER >> 8)
        raise OverloadError(
            f"{_budget(work)} cannot be kept now, beside {len(others)} other requests: "
            f"it would take {needed / 1e6:.1f} ms",
            predicted_ms=needed / 1e6,
            retry_after_ms=_retry_after(now, work, before, loaded, finish.end_ns),
        )
    forecast_ns = _whole(begun, work, others, before, machine, cost, level, floor_ns)
    if forecast_ns is None:
        return None
    end = now + int((forecast_ns - now) * stretch) if forecast_ns < NEVER else NEVER
    if work.deadline_ns is not None and work.least < work.decode:
        end, forecast_ns = min(end, work.deadline_ns), min(forecast_ns, work.deadline_ns)  # it is cut there
    return max(end, now), forecast_ns


def _whole(
    begun: int,
    work: Work,
    others: Sequence[Work],
    before: Sequence[Work],
    machine: Machine,
    cost: Cost,
    level: int,
    floor_ns: int,
) -> int | None:
    """When all of the work is done: in the present gear, or in the first lower one that keeps its budget, since the
    throttle will go there for it: first without guests (`before` are the `others` without them), then at lower points.
    None if nothing is known about time."""
    companies = [(others, 0), (before, floor_ns)] if len(before) < len(others) else [(others, 0)]
    end = None
    for lower in range(work.at(level), work.bottom + 1):
        for company, floor in companies:
            done = forecast(begun, [*company, work], machine, cost, lower, floor_ns=floor)
            if done is None:
                return None
            end = done[work.key].end_ns
            if done[work.key].keeps(work):
                return end
    return end


def _breaks(
    others: Sequence[Work],
    loaded: Mapping[int, Finish],
    machine: Machine,
    cost: Cost,
    begun: int,
    floor_ns: int,
) -> bool:
    """True if one of the others misses its budget only because of the work."""
    late = [other for other in others if not loaded[other.key].keeps(other)]
    if not late:
        return False
    cheapest = len(machine.ladder) - 1
    without = forecast(begun, others, machine, cost, cheapest, least=True, floor_ns=floor_ns)
    return without is not None and any(without[other.key].keeps(other) for other in late)


def _late_by(work: Work, first_ns: int, end_ns: int) -> int:
    """Nanoseconds from arrival that the budget would have to be: to the end, or to the first token if that is late."""
    if (
        work.first_ns is not None
        and first_ns > work.first_ns
        and (work.deadline_ns is None or end_ns <= work.deadline_ns)
    ):
        return first_ns - work.arrival_ns
    return end_ns + work.delivery_ns - work.arrival_ns


def _retry_after(now: int, work: Work, others: Sequence[Work], loaded: Mapping[int, Finish], end_ns: int) -> float:
    """Milliseconds after which a request like this one may find room: as many as it would be late, else until the first
    of the others is done."""
    late = end_ns - (work.deadline_ns or work.due_ns)
    if late <= 0:
        ends = [loaded[other.key].end_ns for other in others]
        late = min((end for end in ends if end > now), default=now) - now
    return round(min(max(late / 1e6, 50.0), 60_000.0), 1)


def _budget(work: Work) -> str:
    if work.deadline_ns is not None:
        return f"a budget of {(work.deadline_ns + work.delivery_ns - work.arrival_ns) / 1e6:.1f} ms"
    return f"a first token within {(work.due_ns - work.arrival_ns) / 1e6:.1f} ms"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_tokens(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise `InputError` unless `token_ids` are at least one id of the vocabulary, all of type int."""
    if not len(token_ids):
        raise InputError(f"the {name} is empty", param=name)
    for token_id in token_ids:
        if type(token_id) is not int:
            raise InputError(f"the {name} holds {token_id!r}, which is not a token id", param=name)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"the {name} holds {wrong}; token ids are 0 to {vocab_size - 1}", param=name)


def _check_options(request: EngineRequest, limits: Limits) -> int:
    """Returns the tokens of the longest option."""
    if not 0 < len(request.options) <= MAX_OPTIONS:
        raise InputError(f"a choice needs 1 to {MAX_OPTIONS} options, not {len(request.options)}", param="options")
    for option in request.options:
        check_tokens("option", option, limits.vocab_size)
    return max(len(option) for option in request.options)


def _check_room(prompt: int, requested: int, limits: Limits) -> None:
    if prompt + requested > limits.max_context:
        asked = f" and {requested} more are requested" if requested else ""
        raise ContextLengthError(
            f"the prompt has {prompt} tokens{asked}, {prompt + requested} in all; "
            f"the context holds {limits.max_context}: shorten the prompt, lower max_tokens or raise max_context",
            param="prompt" if prompt >= limits.max_context else "max_tokens",
        )
    needed = blocks_for(prompt + requested)
    if needed > limits.kv_blocks:
        raise KvExhaustedError(
            f"the request needs KV for {prompt + requested} tokens; "
            f"there is KV for {limits.kv_blocks * KV_BLOCK_TOKENS}: raise kv_memory or ask for fewer tokens"
        )

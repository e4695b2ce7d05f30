"""The scheduler with invented times and views: order, chunks, preemption, points, and that nothing starves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.cost import CostModel, StepShape
from haomiao.engine.scheduler import PATIENCE_NS, SchedulerState, SequenceView, Span, StepPlan, plan
from haomiao.engine.state import blocks_for

MS = 1_000_000


def view(key: int, pending: int = 1, **fields: object) -> SequenceView:
    given_fields: dict[str, object] = {"point": "int8", "arrival_ns": key, "decoding": pending == 1}
    if fields.get("length"):
        given_fields |= {"running": True, "blocks_alone": blocks_for(int(fields["length"]))}  # type: ignore[call-overload]
    return SequenceView(key=key, pending=pending, **{**given_fields, **fields})  # type: ignore[arg-type]


def state(
    *views: SequenceView, free: int = 100, tokens: int = 64, rows: int = 64, sequences: int = 64
) -> SchedulerState:
    return SchedulerState(views, free, tokens, rows, sequences)


def spans(step: StepPlan) -> list[tuple[int, int]]:
    return [(span.key, span.tokens) for span in step.spans]


def test_nothing_to_do() -> None:
    assert plan(0, state()) == StepPlan()


def test_decode_first_then_prefill_fills_the_step() -> None:
    step = plan(0, state(view(1, 100), view(2, 1, length=40), view(3, 1, length=40), view(4, 50)))
    assert spans(step) == [(2, 1), (3, 1), (1, 62)]
    assert step.point == "int8" and not step.preempt and not step.blocked


def test_deadlines_go_earliest_first_then_arrival() -> None:
    views = (view(1, 30), view(2, 30, deadline_ns=900), view(3, 30, deadline_ns=500), view(4, 30))
    assert [key for key, _ in spans(plan(0, state(*views, tokens=200)))] == [3, 2, 1, 4]
    assert spans(plan(0, state(*views, tokens=40))) == [(3, 30), (2, 10)]


def test_limits_on_rows_and_sequences() -> None:
    scoring = view(1, 50, rows_from=10)
    assert spans(plan(0, state(scoring, rows=8))) == [(1, 18)]
    assert spans(plan(0, state(replace(scoring, length=10, running=True), rows=8))) == [(1, 8)]
    many = [view(key, 1, length=3) for key in range(1, 9)]
    assert len(plan(0, state(*many, sequences=3)).spans) == 3
    assert len(plan(0, state(*many, rows=5)).spans) == 5


def test_a_step_runs_at_one_point_and_points_take_turns() -> None:
    first = view(1, 1, length=9, point="int8", last_served_ns=20)
    second = view(2, 1, length=9, point="int4", last_served_ns=10)
    assert plan(30, state(first, second)).point == "int4"
    assert plan(30, state(first, replace(second, last_served_ns=30))).point == "int8"
    urgent = replace(first, deadline_ns=100, last_served_ns=30)
    assert plan(30, state(urgent, second)).point == "int8", "a deadline has the first word"
    assert plan(30, state(urgent, replace(second, last_served_ns=30 - PATIENCE_NS))).point == "int4", "nobody starves"


def test_the_least_urgent_lose_their_kv() -> None:
    old = view(1, 1, length=64)
    middle = view(2, 1, length=64)
    young = view(3, 1, length=64)
    step = plan(0, state(old, middle, young, free=1))
    assert spans(step) == [(1, 1), (2, 1)] and step.preempt == (3,)
    deadline = view(4, 40, deadline_ns=50)
    step = plan(0, state(old, middle, deadline, free=0))
    assert 2 in step.preempt and (4, 40) in spans(step), "a deadline takes KV from what has none"


def test_a_prompt_starts_only_if_all_of_it_fits() -> None:
    running = view(1, 1, length=40)
    waiting = view(2, 100)
    step = plan(0, state(running, waiting, free=3, tokens=32))
    assert spans(step) == [(1, 1)] and step.blocked and not step.preempt
    assert spans(plan(0, state(running, waiting, free=4, tokens=32))) == [(1, 1), (2, 31)]
    begun = view(2, 100, length=32, decoding=False)
    assert spans(plan(0, state(running, begun, free=1, tokens=65))) == [(1, 1), (2, 32)], "what began takes what fits"


def test_what_starts_takes_its_cached_prefix_out_of_the_pool() -> None:
    cached = view(1, 32, length=32, running=False, blocks_alone=0, claim=1, decoding=False)
    assert plan(0, state(cached, free=1)).blocked
    assert spans(plan(0, state(cached, free=2))) == [(1, 32)]


def test_a_shared_tail_needs_one_block_more() -> None:
    forked = view(1, 1, length=33, tail_shared=True)
    assert forked.blocks_needed(1) == 1 and view(1, 1, length=33).blocks_needed(1) == 0
    assert view(1, 1, length=64, tail_shared=True).blocks_needed(1) == 1


def test_when_nothing_fits_the_most_urgent_is_left_alone() -> None:
    shared = [view(key, 1, length=40, tail_shared=True, blocks_alone=0) for key in (1, 2, 3)]
    step = plan(0, state(*shared, free=0))
    assert step == StepPlan("int8", (), (2, 3), True)
    assert plan(0, state(view(1, 100), free=2)) == StepPlan("int8", (), (), True), "the engine sheds it"


def fitted(nanoseconds_per_token: int) -> CostModel:
    cost = CostModel()
    for tokens in range(1, 65):
        shape = StepShape("int8", decode_tokens=1, prefill_tokens=tokens)
        cost.observe(shape, MS + nanoseconds_per_token * tokens)
    return cost


def test_prefill_is_cut_to_the_tightest_inter_token_budget() -> None:
    cost = fitted(MS // 10)
    talking = view(1, 1, length=9, itl_ns=3 * MS)
    reading = view(2, 500, length=1, decoding=False)
    (_, chunk) = spans(plan(0, state(talking, reading), cost))[1]
    assert 15 <= chunk <= 20, "1 ms + 0.1 ms a token within 3 ms"
    impatient = replace(talking, itl_ns=MS // 2)
    assert spans(plan(0, state(impatient, reading), cost)) == [(1, 1), (2, 1)], "at least one token, so that it ends"
    assert spans(plan(0, state(replace(talking, itl_ns=None), reading), cost))[1] == (2, 63)
    assert spans(plan(0, state(talking, reading), CostModel()))[1] == (2, 63), "an unfitted model bounds nothing"


def test_who_goes_before_all_that_may_come_is_not_cut_for_them() -> None:
    """A chunk lets the next request in soon; one that is due later than this one would not go before it."""
    urgent, lax = view(1, 40, deadline_ns=50), view(2, 40, deadline_ns=900)
    cut = replace(state(urgent, lax), chunk_tokens=8)
    assert spans(plan(0, cut)) == [(1, 8)]
    assert spans(plan(0, replace(cut, tightest_ns=49))) == [(1, 8)]
    assert spans(plan(0, replace(cut, tightest_ns=50))) == [(1, 40)], "and nothing of the other beside it"
    assert spans(plan(0, replace(cut, tightest_ns=50, max_step_tokens=30))) == [(1, 30)]
    assert spans(plan(0, replace(cut, tightest_ns=900))) == [(1, 40), (2, 24)]
    nobodys = replace(state(view(1, 40)), chunk_tokens=8, tightest_ns=50)
    assert spans(plan(0, nobodys)) == [(1, 8)], "what has no deadline is cut"


# ---- properties -----------------------------------------------------------------------------------------------------

VIEWS = st.builds(
    lambda key, pending, length, deadline, point, itl, served, rows: view(
        key,
        pending,
        length=length,
        deadline_ns=deadline,
        point=point,
        itl_ns=itl,
        last_served_ns=served,
        rows_from=rows,
    ),
    key=st.integers(1, 10**6),
    pending=st.integers(1, 200),
    length=st.integers(0, 200),
    deadline=st.none() | st.integers(0, 10**9),
    point=st.sampled_from(["int8", "int4"]),
    itl=st.none() | st.integers(1, 10**7),
    served=st.integers(0, 10**9),
    rows=st.none() | st.integers(0, 300),
)


@given(
    views=st.lists(VIEWS, max_size=8, unique_by=lambda each: each.key),
    free=st.integers(0, 20),
    tokens=st.integers(1, 128),
    rows=st.integers(1, 128),
    now=st.integers(0, 2 * 10**9),
)
@settings(max_examples=400, deadline=None)
def test_every_plan_is_sound(views: list[SequenceView], free: int, tokens: int, rows: int, now: int) -> None:
    before = state(*views, free=free, tokens=tokens, rows=rows)
    cost = fitted(MS // 10)
    step = plan(now, before, cost)
    assert (
        step == plan(now, before, cost) == plan(now, state(*reversed(views), free=free, tokens=tokens, rows=rows), cost)
    )
    known = {each.key: each for each in views}
    served = [span.key for span in step.spans]
    assert len(set(served)) == len(served) and not set(served) & set(step.preempt)
    assert all(known[key].running for key in step.preempt)
    assert all(known[key].point == step.point for key in served)
    assert sum(span.tokens for span in step.spans) <= tokens
    assert all(1 <= span.tokens <= known[span.key].pending for span in step.spans)
    assert sum(known[span.key].rows(span.tokens) for span in step.spans) <= rows
    gained = sum(known[key].blocks_alone for key in step.preempt)
    assert not step.spans or sum(known[s.key].blocks_needed(s.tokens) for s in step.spans) <= free + gained
    if views and not step.spans:
        assert step.blocked
    if views and free + sum(each.blocks_alone for each in views) >= 60:
        assert step.spans, "there is room, so something runs"


@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    blocks=st.integers(4, 10),
    tokens=st.integers(1, 64),
)
@settings(max_examples=150, deadline=None)
def test_everything_that_fits_alone_ends(lengths: list[tuple[int, int, bool]], blocks: int, tokens: int) -> None:
    """A small simulation: (prompt, answer, deadline) sequences on few blocks all come to their end."""
    live = {
        key: {"tokens": prompt, "answer": answer, "kv": 0, "deadline": deadline, "served": 0}
        for key, (prompt, answer, deadline) in enumerate(lengths, 1)
    }
    now, steps = 0, 0
    while live:
        steps += 1
        assert steps < 3000, "no progress"
        now += 10 * MS
        held = sum(blocks_for(int(each["kv"])) for each in live.values())
        views = [
            SequenceView(
                key=key,
                point="int8",
                pending=int(each["tokens"]) - int(each["kv"]),
                decoding=int(each["tokens"]) - int(each["kv"]) == 1,
                arrival_ns=key,
                deadline_ns=key * 1000 if each["deadline"] else None,
                last_served_ns=int(each["served"]),
                length=int(each["kv"]),
                running=each["kv"] > 0,
                blocks_alone=blocks_for(int(each["kv"])),
            )
            for key, each in live.items()
        ]
        step = plan(now, state(*views, free=blocks - held, tokens=tokens))
        for key in step.preempt:
            live[key]["kv"] = 0
        for span in step.spans:
            each = live[span.key]
            each["kv"] = int(each["kv"]) + span.tokens
            each["served"] = now
            if each["kv"] == each["tokens"]:
                each["tokens"] = int(each["tokens"]) + 1
                each["answer"] = int(each["answer"]) - 1
                if not each["answer"]:
                    del live[span.key]


def test_a_floor_under_requests_without_a_budget() -> None:
    """A stream of deadline requests that could fill every step still lets the others in."""
    waiting = view(1, 64)
    served = 0
    last = 0
    for tick in range(100):
        now = tick * 10 * MS
        urgent = view(100 + tick, 64, deadline_ns=now + 1, arrival_ns=now)
        step = plan(now, state(replace(waiting, last_served_ns=last), urgent))
        if Span(1, 64) in step.spans:
            served, last = served + 1, now
    assert served == 3, "once in a quarter of a second"

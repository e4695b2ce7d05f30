"""Budgets end to end, on an invented machine: a clock that steps move, costs that are noisy inside their bounds.

What is promised here: no admitted request is missed while steps stay inside their bounds, nothing starves, a cancelled
request is gone within a step, and what the wall clock does is nobody's business.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.cost import Cost, StepShape
from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest, TokenEvent
from haomiao.errors import BudgetError, DeadlineError, OverloadError
from haomiao.types import StepBatch, StepResult
from tests.engine.fakes import (
    VOCAB,
    Clock,
    FakeExecutor,
    LetterMatcher,
    PatternConstraint,
    ask,
    done_of,
    make_engine,
    prompt_of,
    tokens_of,
)

MS = 1_000_000
RATES = {"int8": 1.0, "int4": 0.5}


class Times:
    """`LearningCost` of the invented machine: 1 ms a step, 50 us a token, half of it at int4, bounds 1.3 times that.

    It notices a slower machine at once, as the real one does after a few steps."""

    coverage = 0.99

    def __init__(self) -> None:
        self.slowness = 1.0
        self.observed: list[float] = []

    def predict(self, shape: StepShape) -> float | None:
        return self.slowness * RATES[shape.point] * (MS + MS / 20 * shape.tokens)

    def bound(self, shape: StepShape) -> float | None:
        return (self.predict(shape) or 0.0) * 1.3

    def margin(self, nanoseconds: float) -> float:
        return 1.3

    def idle(self) -> Cost:
        calm = Times()
        return calm

    def rest(self, nanoseconds: float) -> None:
        self.observed.append(-nanoseconds)

    def observe(self, shape: StepShape, nanoseconds: float) -> None:
        self.observed.append(nanoseconds)


class Machine(FakeExecutor):
    """An executor whose steps move the clock by what they cost, times a noise."""

    def __init__(self, clock: Clock, times: Times, noise: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self.clock, self.times, self.noise = clock, times, noise

    def step(self, batch: StepBatch) -> StepResult:
        result = super().step(batch)
        elapsed = int(self.times.slowness * RATES[batch.point] * (MS + MS / 20 * batch.tokens) * self.noise())
        self.clock.now += elapsed
        return StepResult(result.logits, result.argmax, elapsed)


def world(noise: Callable[[], float] = lambda: 1.0, **options: Any) -> tuple[Engine, Clock, Times]:
    clock, times = Clock(), Times()
    machine = Machine(clock, times, noise, **options)
    return make_engine(machine, clock=clock, cost=times, errors={"int8": 0.001, "int4": 0.02}), clock, times


def within(clock: Clock, milliseconds: float) -> int:
    return clock.now + int(milliseconds * MS)


def points_of(events: Sequence[Any], request_id: int) -> list[str]:
    return [each.point for each in events if isinstance(each, TokenEvent) and each.request_id == request_id]


def test_who_has_no_budget_teaches_what_forecasts_are_worth() -> None:
    """Two dozen of a class, and no more: from then on those teach that have budgets. Nothing was promised to them."""
    engine, _, _ = world()
    promises = engine.budgets.promises
    for number in range(40):
        assert promises.stretch(1) == 1.0 if number < 24 else 0.7 < promises.stretch(1) < 0.85
        engine.submit(ask(prompt_of(20, seed=number), work="choose", options=((1, 2), (3, 4))))
        engine.run_until()
    assert promises.knows(1) and not promises.knows(10) and promises.stated == 0


# ---- one request ----------------------------------------------------------------------------------------------------


def test_a_budget_that_fits_runs_at_the_accurate_point() -> None:
    engine, clock, times = world()
    request_id = engine.submit(ask(prompt_of(20), max_tokens=10, ignore_eos=True, deadline_ns=within(clock, 40)))
    receipt = done_of(engine.run_until(), request_id).receipt
    assert receipt.outcome == "met" and [entry.point for entry in receipt.schedule] == ["int8"]
    assert receipt.predicted_ms == pytest.approx(1.3 * (2 + 9 * 1.05))
    assert receipt.total_ms <= receipt.predicted_ms <= 40
    assert receipt.coverage == 0.99
    engine.settle()
    assert engine.budgets.promises.stated == engine.budgets.promises.kept == 1
    assert len(times.observed) >= 9


def test_an_answer_that_has_a_way_to_go_ends_earlier() -> None:
    """Its receipt names the budget that was given, and so does a refusal the one that would do."""
    engine, clock, _ = world()
    way = {"delivery_ns": 10 * MS, "deadline_ns": within(clock, 30)}
    request_id = engine.submit(ask(prompt_of(20), max_tokens=200, ignore_eos=True, **way))
    receipt = done_of(engine.run_until(), request_id).receipt
    assert receipt.budget_ms == 40 and receipt.outcome == "truncated"
    assert 20 < receipt.total_ms <= 30 and (receipt.predicted_ms or 0) <= 30
    whole = {"max_tokens": 20, "ignore_eos": True, "on_budget": "refuse"}
    with pytest.raises(BudgetError, match=r"a budget of 15\.0 ms") as refused:
        engine.submit(ask(prompt_of(20), delivery_ns=10 * MS, deadline_ns=within(clock, 5), **whole))
    enough = refused.value.predicted_ms or 0.0
    with pytest.raises(BudgetError):
        engine.submit(ask(prompt_of(20), delivery_ns=10 * MS, deadline_ns=within(clock, enough - 10.1), **whole))
    kept = engine.submit(ask(prompt_of(20), delivery_ns=10 * MS, deadline_ns=within(clock, enough - 9.9), **whole))
    assert done_of(engine.run_until(), kept).receipt.outcome in ("met", "met_lower_point")


def test_a_tight_budget_lowers_the_point_before_the_answer() -> None:
    engine, clock, _ = world()
    request = {"max_tokens": 20, "ignore_eos": True}
    tight = engine.submit(ask(prompt_of(20), deadline_ns=within(clock, 20), **request))
    done = done_of(engine.run_until(), tight)
    assert done.receipt.outcome == "met_lower_point" and done.receipt.completion_tokens == 20
    assert done.receipt.schedule[0].point == "int4", "and goes up where the rest fits at int8"
    assert 0.001 < (done.receipt.estimated_error or 0) <= 0.02
    cut = engine.submit(ask(prompt_of(20), deadline_ns=within(clock, 20), min_point="int8", min_tokens=5, **request))
    done = done_of(engine.run_until(), cut)
    assert done.receipt.outcome == "truncated" and done.finish_detail == "budget_exhausted"
    assert [entry.point for entry in done.receipt.schedule] == ["int8"] and done.receipt.total_ms <= 20
    for how in ({"on_budget": "refuse"}, {"on_budget": "truncate", "max_tokens": 40, "min_tokens": 40}):
        with pytest.raises(BudgetError):
            engine.submit(ask(prompt_of(20), deadline_ns=within(clock, 20), **{**request, **how}))
    whole = engine.submit(ask(prompt_of(20), deadline_ns=within(clock, 40), on_budget="refuse", **request))
    assert done_of(engine.run_until(), whole).receipt.outcome == "met"


def test_a_neighbour_in_the_middle_of_an_answer_moves_the_throttle() -> None:
    engine, clock, times = world()
    request_id = engine.submit(ask(prompt_of(20), max_tokens=100, ignore_eos=True, deadline_ns=within(clock, 150)))
    events = [event for _ in range(20) for event in engine.step()]
    times.slowness = 2.0
    events += engine.run_until()
    receipt = done_of(events, request_id).receipt
    assert [entry.point for entry in receipt.schedule][:2] == ["int8", "int4"], "the receipt shows the switch"
    assert receipt.outcome == "met_lower_point" and receipt.total_ms <= 150 and receipt.completion_tokens == 100
    assert set(points_of(events, request_id)) == {"int8", "int4"}, "and so does every token"


def test_a_forbidden_point_is_left_at_once() -> None:
    engine, clock, _ = world()
    request_id = engine.submit(ask(prompt_of(20), max_tokens=20, ignore_eos=True, deadline_ns=within(clock, 22)))
    events = [event for _ in range(3) for event in engine.step()]
    engine.forbid({"int4"})
    events += engine.run_until()
    schedule = [entry.point for entry in done_of(events, request_id).receipt.schedule]
    assert schedule == ["int4", "int8"]
    explicit = engine.submit(ask(prompt_of(5), max_tokens=3, point="int4"))
    assert set(points_of(engine.run_until(), explicit)) == {"int4"}
    engine.forbid(())
    again = engine.submit(ask(prompt_of(20), max_tokens=20, ignore_eos=True, deadline_ns=within(clock, 20)))
    assert "int4" in points_of(engine.run_until(), again)


def test_the_schedule_fixes_the_bits_and_reuse_does_not() -> None:
    """After a switch nothing is published: whoever comes next computes what its own points would have given."""
    engine, clock, times = world(max_step_tokens=512)
    moved = engine.submit(ask(prompt_of(40), max_tokens=90, ignore_eos=True, deadline_ns=within(clock, 140)))
    events = [event for _ in range(10) for event in engine.step()]
    times.slowness = 2.0
    events += engine.run_until()
    times.slowness = 1.0
    assert len(done_of(events, moved).receipt.schedule) > 1
    answer = tokens_of(events, moved)
    follow = [*prompt_of(40), *answer, 5, 6]
    for point in ("int8", "int4"):
        again = ask(follow, max_tokens=6, ignore_eos=True, point=point)
        request_id = engine.submit(again)
        fresh = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
        assert tokens_of(engine.run_until(), request_id) == tokens_of(fresh.run_until(fresh.submit(again)), 1)
    engine.check_integrity()


def test_a_session_that_was_lowered_is_not_reused_at_another_point() -> None:
    engine, clock, _ = world(max_step_tokens=512)
    session = engine.open_session()
    first = engine.submit(
        ask(prompt_of(40), max_tokens=20, ignore_eos=True, session=session, deadline_ns=within(clock, 22))
    )
    answer = tokens_of(engine.run_until(), first)
    follow = [*prompt_of(40), *answer, 7]
    plain = engine.submit(ask(follow, max_tokens=5, session=session))
    events = engine.run_until()
    assert done_of(events, plain).receipt.cached_tokens == 0, "it was computed at int4"
    fresh = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    assert tokens_of(events, plain) == tokens_of(fresh.run_until(fresh.submit(ask(follow, max_tokens=5))), 1)


def test_a_grammar_closes_and_a_sentence_ends() -> None:
    class Stops:
        """Letters divisible by 7 end a sentence."""

        def is_complete(self, token_ids: Sequence[int]) -> bool:
            return token_ids[-1] % 7 == 0

        def mask(self) -> np.ndarray:
            words = np.zeros((VOCAB + 31) // 32, dtype=np.uint32)
            words[0] |= np.uint32(1 << 7 | 1 << 14)
            return words

    engine, clock, _ = world()
    ended = 0
    for seed in range(12):
        request = ask(
            prompt_of(10, seed), max_tokens=200, ignore_eos=True, deadline_ns=within(clock, 40), close=Stops()
        )
        request_id = engine.submit(request)
        events = engine.run_until()
        done, tokens = done_of(events, request_id), tokens_of(events, request_id)
        assert done.receipt.outcome == "truncated" and tokens[-1] % 7 == 0 and done.receipt.total_ms <= 40
        ended += tokens[-1] not in (7, 14)
    assert ended, "some end by themselves"
    pattern = PatternConstraint([(1, 2, 3)] * 60)
    request_id = engine.submit(
        ask(prompt_of(10), max_tokens=200, constraint=pattern, deadline_ns=within(clock, 20), stop=LetterMatcher)
    )
    done = done_of(engine.run_until(), request_id)
    assert done.receipt.outcome == "truncated" and done.receipt.completion_tokens == 60


def test_time_that_runs_out_in_the_queue_is_never_a_success() -> None:
    engine, clock, _ = world()
    request_id = engine.submit(ask(prompt_of(20), max_tokens=4, deadline_ns=within(clock, 20)))
    clock.now += 30 * MS
    done = done_of(engine.run_until(), request_id)
    assert isinstance(done.error, DeadlineError) and done.finish_reason is None and done.receipt.outcome == "missed"
    late = engine.submit(
        ask(prompt_of(20), max_tokens=30, ignore_eos=True, deadline_ns=within(clock, 60), on_budget="refuse")
    )
    events = [event for _ in range(4) for event in engine.step()]
    clock.now += 80 * MS
    done = done_of([*events, *engine.run_until()], late)
    assert done.finish_detail == "budget_exhausted" and done.receipt.outcome == "missed"
    engine.check_integrity()


def test_refusals_say_what_it_would_take_and_leave_nothing() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.receipts: list[Any] = []

        def on_step(self, batch: Any, result: Any) -> None: ...

        def on_finish(self, receipt: Any) -> None:
            self.receipts.append(receipt)

    clock, times, watcher = Clock(), Times(), Watcher()
    machine = Machine(clock, times, lambda: 1.0)
    engine = make_engine(machine, clock=clock, cost=times, observers=(watcher,))
    with pytest.raises(BudgetError) as impossible:
        engine.submit(ask(prompt_of(60), max_tokens=20, deadline_ns=within(clock, 2)))
    assert impossible.value.status == 422 and 12 < (impossible.value.predicted_ms or 0) < 14
    whole = {"max_tokens": 40, "on_budget": "refuse", "ignore_eos": True}
    busy = [engine.submit(ask(prompt_of(60, 1), deadline_ns=within(clock, 64), **whole))]
    with pytest.raises(OverloadError) as overloaded:
        engine.submit(ask(prompt_of(60, 7), deadline_ns=within(clock, 64), **whole))
    assert overloaded.value.status == 429 and (overloaded.value.retry_after_ms or 0) > 0
    assert len(machine.batches) == 0, "refused before anything was computed"
    events = engine.run_until()
    assert done_of(events, busy[0]).receipt.outcome == "met"
    refused = [receipt for receipt in watcher.receipts if receipt.outcome == "refused"]
    assert len(refused) == 2 and all(receipt.predicted_ms > receipt.budget_ms for receipt in refused)
    engine.submit(ask(prompt_of(60, 8), deadline_ns=within(clock, 64), **whole))
    assert engine.pool.available == engine.pool.blocks or engine.pool.cached


def test_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock, _ = world()
    request_id = engine.submit(ask(prompt_of(20), max_tokens=10, ignore_eos=True, deadline_ns=within(clock, 40)))
    events = engine.step()
    for jump in (1e9, -1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: int(jump * 1e9))
        events += engine.step()
    assert done_of([*events, *engine.run_until()], request_id).receipt.outcome == "met"


# ---- many -----------------------------------------------------------------------------------------------------------

ASKED = st.fixed_dictionaries(
    {
        "gap": st.floats(0, 40),
        "prompt": st.integers(1, 120),
        "tokens": st.integers(1, 40),
        "budget": st.none() | st.floats(2, 400),
        "how": st.sampled_from(["degrade", "degrade", "truncate", "refuse"]),
        "work": st.sampled_from(["generate", "generate", "generate", "choose", "finite"]),
        "seed": st.integers(0, 9),
    }
)


def request_of(asked: dict[str, Any], clock: Clock) -> EngineRequest:
    budget = asked["budget"]
    fields: dict[str, Any] = {"deadline_ns": None if budget is None else within(clock, budget)}
    fields["on_budget"] = asked["how"]
    prompt = prompt_of(asked["prompt"], asked["seed"])
    if asked["work"] == "choose":
        options = tuple(tuple(prompt_of(size, size)) for size in (1, 2, 3))
        return EngineRequest(prompt, work="choose", options=options, **fields)
    if asked["work"] == "finite" and budget is not None:  # chosen where there is no time to generate it
        pattern = [(1, 2), *[(3,)] * 9]
        fields |= {"constraint": PatternConstraint(pattern), "all_answers": lambda: [*itertools.product(*pattern)]}
        return ask(prompt, max_tokens=40, **{**fields, "deadline_ns": within(clock, 3 + budget / 20)})
    return ask(prompt, max_tokens=asked["tokens"], ignore_eos=asked["seed"] % 2 == 0, **fields)


@given(asked=st.lists(ASKED, min_size=1, max_size=14), seed=st.integers(0, 2**16), chunk=st.sampled_from([32, 128]))
@settings(max_examples=60, deadline=None)
def test_no_admitted_request_is_missed_while_steps_stay_inside_their_bounds(
    asked: list[dict[str, Any]], seed: int, chunk: int
) -> None:
    rng = np.random.default_rng(seed)
    engine, clock, _ = world(lambda: float(rng.uniform(0.6, 1.3)), max_step_tokens=chunk, kv_blocks=128)
    events: list[Any] = []
    admitted: dict[int, EngineRequest] = {}
    longest = 1.3 * (1 + chunk / 20)
    for each in asked:
        arrives = within(clock, each["gap"])
        while engine.busy and clock.now < arrives:
            events += engine.step()
        clock.now = max(clock.now, arrives)
        request = request_of(each, clock)
        try:
            admitted[engine.submit(request)] = request
        except (BudgetError, OverloadError) as refused:
            assert refused.predicted_ms is not None and request.deadline_ns is not None
    idle = clock.now
    while engine.busy:
        events += engine.step()
        engine.check_integrity()
    assert clock.now - idle < 60_000 * MS, "everything came to its end"
    for request_id, request in admitted.items():
        done = done_of(events, request_id)
        if request.deadline_ns is None:
            assert done.error is None and done.receipt.outcome is None, "whoever has no budget is served all the same"
            continue
        budget = done.receipt.budget_ms or 0
        assert done.error is None, f"an admitted request of {budget} ms failed: {done.error}"
        assert done.receipt.total_ms <= budget + max(5.0, longest)
        if request.on_budget == "refuse":
            assert done.finish_detail != "budget_exhausted"


@pytest.mark.parametrize("seed", range(3))
def test_nothing_starves_beside_a_stream_of_budgets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine, clock, _ = world(lambda: float(rng.uniform(0.8, 1.2)), kv_blocks=256)
    patient = engine.submit(ask(prompt_of(100), max_tokens=4, ignore_eos=True))
    events: list[Any] = []
    for number in range(2000):
        if any(isinstance(event, DoneEvent) and event.request_id == patient for event in events):
            break
        with contextlib.suppress(OverloadError):
            engine.submit(ask(prompt_of(40, number), max_tokens=12, ignore_eos=True, deadline_ns=within(clock, 25)))
        events = engine.step()
    else:
        pytest.fail("the request without a budget never ended")
    assert clock.now < 6_000 * MS


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_cancel_frees_everything_within_one_step(steps: int) -> None:
    engine, clock, _ = world()
    before = engine.pool.available
    ids = [
        engine.submit(ask(prompt_of(70, seed), max_tokens=50, ignore_eos=True, deadline_ns=within(clock, 500)))
        for seed in range(3)
    ]
    for _ in range(steps):
        engine.step()
    for request_id in ids:
        engine.cancel(request_id)
    events = engine.settle()
    assert sum(isinstance(event, DoneEvent) for event in events) == 3 and engine.pool.available == before
    assert not engine.busy
    again = engine.submit(ask(prompt_of(70), max_tokens=4, deadline_ns=within(clock, 500)))
    assert done_of(engine.run_until(), again).receipt.outcome == "met", "admission forgot them"

"""A beginning that prompts have in common, and that none of them has the time to compute: computed ahead."""

from __future__ import annotations

from typing import Any

import pytest

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent
from haomiao.errors import BudgetError, OverloadError
from haomiao.types import KV_BLOCK_TOKENS, Receipt
from tests.engine.fakes import Clock, ask, done_of, make_engine, prompt_of
from tests.engine.test_deadlines import Machine, Times, within

RULES = prompt_of(3 * KV_BLOCK_TOKENS + 7)
"""At int4, with bounds: 0.65 ms a step and 32.5 us a token; so 4 ms for these and 1 ms for the rest of a question."""
OPTIONS = ((1,), (2,))


def engine_with(**options: Any) -> tuple[Engine, Clock]:
    clock, times = Clock(), Times()
    machine = Machine(clock, times, lambda: 1.0)
    return make_engine(machine, clock=clock, cost=times, errors={"int8": 0.001, "int4": 0.02}, **options), clock


def question(number: int, clock: Clock, **fields: Any) -> Any:
    fields = {"deadline_ns": within(clock, 3.0), **fields}
    return ask([*RULES, *prompt_of(5, seed=number)], work="choose", options=OPTIONS, **fields)


def submit(engine: Engine, clock: Clock, number: int, **fields: Any) -> int | None:
    """None if it was refused."""
    try:
        return engine.submit(question(number, clock, **fields))
    except BudgetError as refused:
        assert "even an idle machine" in str(refused)
        return None


def rest(engine: Engine) -> int:
    """Idle until there is nothing to do; how often there was something."""
    for count in range(100):
        if not engine.idle():
            return count
    pytest.fail("it never rests")


def test_the_third_that_begins_alike_is_let_in() -> None:
    engine, clock = engine_with()
    woken: list[int] = []
    engine.on_waiting = lambda: woken.append(clock.now)
    assert submit(engine, clock, 1) is None
    rest(engine)
    assert engine.pool.cached == 0, "one refusal says nothing of those to come"
    assert submit(engine, clock, 2) is None and woken
    assert rest(engine) and engine.pool.cached == 3
    request_id = submit(engine, clock, 3)
    assert request_id is not None
    events = engine.run_until()
    done = done_of(events, request_id)
    assert done.error is None and done.receipt.outcome is not None and done.receipt.cached_tokens == 96
    assert {event.request_id for event in events} == {request_id}
    engine.check_integrity()


def test_nothing_is_told_of_it() -> None:
    receipts: list[Receipt] = []

    class Watch:
        def on_step(self, batch: object, result: object) -> None:
            pass

        def on_finish(self, receipt: Receipt) -> None:
            receipts.append(receipt)

    engine, clock = engine_with(observers=(Watch(),))
    told: list[DoneEvent] = []
    for number in range(4):
        submit(engine, clock, number)
        while engine.busy:
            told += [event for event in engine.step() if isinstance(event, DoneEvent)]
        rest(engine)
    engine.settle()
    assert [receipt.outcome for receipt in receipts].count("refused") == 2
    assert len(receipts) == 4 and len(told) == 2, "two refused, two answered, and none for what nobody asked"


def test_it_waits_for_those_who_asked() -> None:
    engine, clock = engine_with()
    for number in (1, 2):
        submit(engine, clock, number)
    talk = engine.submit(ask(prompt_of(20, seed=9), max_tokens=30, ignore_eos=True, deadline_ns=within(clock, 40)))
    events = engine.run_until(talk)
    assert done_of(events, talk).receipt.outcome in ("met", "met_lower_point")
    assert not any(event.request_id != talk for event in events)
    rest(engine)
    assert submit(engine, clock, 3) is not None


def test_what_is_no_matter_of_time_or_not_shared_is_not_computed() -> None:
    engine, clock = engine_with()
    for number in (1, 2):
        with pytest.raises(BudgetError):
            engine.submit(question(number, clock, max_kl=1e-9))
    assert rest(engine) == 0
    for number in (1, 2, 3):
        with pytest.raises(BudgetError):
            prompt = prompt_of(120, seed=50 + number)
            engine.submit(ask(prompt, work="choose", options=OPTIONS, deadline_ns=within(clock, 2)))
    for salt in (b"one", b"two"):
        submit(engine, clock, 1, salt=salt)
    rest(engine)
    assert engine.pool.cached == 0, "prompts that differ, or are of different owners"
    assert submit(engine, clock, 2, salt=b"two") is None
    rest(engine)
    assert submit(engine, clock, 3, salt=b"two") is not None and submit(engine, clock, 3, salt=b"one") is None


def test_of_long_beginnings_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a prompt is bounded; the rest is found by those that are refused after."""
    monkeypatch.setattr("haomiao.engine.ahead.KEPT_BLOCKS", 2)
    engine, clock = engine_with()
    for number, cached in ((1, 0), (2, 2), (3, 2), (4, 3)):
        assert submit(engine, clock, number, deadline_ns=within(clock, 1.5)) is None
        rest(engine)
        assert engine.pool.cached == cached
        assert all(len(names) <= 2 for names in engine._refused_prompts._seen.values())
    assert submit(engine, clock, 5) is not None


def test_a_full_engine_forgets_it() -> None:
    engine, clock = engine_with(max_requests=1)
    for number in (1, 2):
        submit(engine, clock, number)
    waiting = engine.submit(ask(prompt_of(4), max_tokens=2))
    with pytest.raises(OverloadError):
        engine.submit(ask(prompt_of(4), max_tokens=2))
    engine.run_until(waiting)
    rest(engine)
    assert engine.pool.cached == 0

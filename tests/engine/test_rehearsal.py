"""A machine that was measured in a bad minute: what keeps every request out is measured again."""

from __future__ import annotations

import numpy as np
import pytest

from haomiao.engine.calibrate import calibrate, rehearse
from haomiao.engine.cost import CostModel
from haomiao.engine.engine import Engine
from haomiao.engine.rehearsal import PAUSE_NS
from haomiao.errors import BudgetError
from tests.engine.fakes import Clock, FakeExecutor, ask, done_of, make_engine, prompt_of
from tests.engine.test_deadlines import Machine, Times, within

MS = 1_000_000


def measured(slower: float) -> tuple[Engine, Clock, CostModel]:
    """An engine whose machine was `slower` times slower while it was measured than it is now."""
    clock, times, cost, noise = Clock(), Times(), CostModel(), np.random.default_rng(0)
    machine = Machine(clock, times, lambda: float(noise.uniform(0.95, 1.05)), max_step_tokens=64, kv_blocks=64)
    engine = make_engine(machine, clock=clock, cost=cost)
    times.slowness = slower
    rounds = [rehearse(machine, engine.pool, point, clock) for point in ("int8", "int4") for _ in range(12)]
    cost.calibrate([step for each in rounds for step in each])
    times.slowness = 1.0
    return engine, clock, cost


def test_it_lets_in_again_what_a_bad_measurement_kept_out() -> None:
    engine, clock, _ = measured(10.0)
    doubts: list[int] = []
    engine.on_waiting = lambda: doubts.append(clock.now)
    refused = 0
    for _ in range(20):  # 1 ms a step and 20 tokens of 50 us: 2 ms, or half of it at int4
        request = ask(prompt_of(20), max_tokens=1, deadline_ns=within(clock, 6))
        try:
            request_id = engine.submit(request)
            break
        except BudgetError:
            refused += 1
        while engine.busy:
            engine.step()
        assert engine.idle() and not engine.idle(), "one doubt, one rehearsal"
        clock.now += PAUSE_NS
    else:
        pytest.fail("it is refused for good")
    assert 1 <= refused == len(doubts) <= 8
    assert done_of(engine.run_until(), request_id).receipt.outcome in ("met", "met_lower_point")
    engine.check_integrity()


def test_it_is_seldom_and_only_where_time_was_the_reason() -> None:
    engine, clock, cost = measured(1.0)

    def refuse(**fields: object) -> None:
        with pytest.raises(BudgetError):
            engine.submit(ask(prompt_of(20), max_tokens=1, deadline_ns=within(clock, 0.2), **fields))
        engine.settle()

    refuse(max_kl=1e-9)
    assert not engine.idle(), "no machine is quick enough for an accuracy that was never measured"
    seen = cost.counters()["steps"]
    refuse()
    assert engine.idle() and cost.counters()["steps"] > seen
    refuse()
    assert not engine.idle(), "too soon"
    clock.now += PAUSE_NS
    refuse()
    engine.submit(ask(prompt_of(4), max_tokens=1))
    assert not engine.idle(), "somebody asks"
    engine.run_until()
    assert engine.idle() and not engine.idle()
    with pytest.raises(BudgetError, match="even an idle machine needs 1"):
        clock.now += PAUSE_NS
        engine.submit(ask(prompt_of(20), max_tokens=1, deadline_ns=within(clock, 0.2)))


def test_without_room_or_a_cost_model_nothing_is_rehearsed() -> None:
    clock = Clock()
    engine = make_engine(FakeExecutor(kv_blocks=1), clock=clock, cost=CostModel())
    assert len(rehearse(engine.executor, engine.pool, "int8", clock)) == 5, "the last one is known when the next begins"
    held = engine.pool.allocate(1)
    assert rehearse(engine.executor, engine.pool, "int8", clock) == []
    assert calibrate(engine.executor, engine.pool, ["int8"], max_context=64, seconds=0.0) == []
    engine.pool.drop(held)
    blind = make_engine(FakeExecutor(), clock=clock)
    assert not blind.idle()

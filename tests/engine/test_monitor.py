"""The monitor: what it measures is what it says, and nobody who is served notices."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.driver import Driver
from haomiao.engine.engine import Engine
from haomiao.engine.idle import IdleWorker
from haomiao.engine.monitor import ENOUGH, Monitor, Tally
from haomiao.engine.throttle import Gear
from haomiao.errors import InputError
from haomiao.metrics.divergence import kl_divergence
from haomiao.types import StepBatch
from tests.engine.fakes import Clock, ask, done_of, make_engine, prompt_of, tokens_of
from tests.engine.speculating import LikeMinded, run, speculating
from tests.engine.test_deadlines import Machine, Times

MS = 1_000_000


def watched(rate: float = 1.0, executor: LikeMinded | None = None, **options: Any) -> Engine:
    limit = options.pop("limit", None)
    monitor = Monitor(rate, limit=limit, clock=lambda: 0)
    return make_engine(executor or LikeMinded(), monitor=monitor, **options)


def true_kl(executor: LikeMinded, tokens: list[int], positions: list[int]) -> list[float]:
    """KL of the rows at `positions` when everything before was computed at int4."""
    found = []
    for position in positions:
        history = np.array([[token, 1] for token in tokens[: position + 1]], np.int64)
        served = executor.logits_of(history)
        history[-1, 1] = 0
        accurate = executor.logits_of(history)
        found.append(float(kl_divergence(accurate[None], served[None])[0]))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_step_kl_is_that_of_single_steps_over_the_served_kv(temperature: float) -> None:
    executor = LikeMinded()
    engine = watched(executor=executor)
    prompt = prompt_of(40)
    request = ask(prompt, max_tokens=30, point="int4", temperature=temperature, seed=1, ignore_eos=True)
    events = engine.run_until(engine.submit(request))
    answer = tokens_of(events, 1)
    expected = true_kl(executor, [*prompt, *answer], list(range(40, 69)))
    receipt = done_of(events, 1).receipt
    assert receipt.step_kl == pytest.approx(np.mean(expected), rel=1e-5), (
        "all but the prompt's chunk, which is too long"
    )
    figures = engine.monitor.step_figures()["int4"]
    assert figures.samples == 29 and figures.kl.low <= figures.kl.estimate <= figures.kl.high
    assert figures.kl.estimate == pytest.approx(np.mean(expected), rel=1e-5)
    assert engine.monitor.as_dict()["step_kl"]["int4"]["samples"] == 29
    engine.check_integrity()


@given(
    rate=st.sampled_from([0.3, 1.0]), kv_blocks=st.sampled_from([10, 16, 64]), step_tokens=st.sampled_from([7, 64]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), kind=st.sampled_from(["suffix", "self"]),
    points=st.lists(st.sampled_from(["int4", "int8"]), min_size=4, max_size=4),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_nobody_who_is_served_notices(
    rate: float, kv_blocks: int, step_tokens: int, lengths: list[int], kind: str, points: list[str]
) -> None:
    """Tokens, logprobs and KV are those without a monitor, with speculation, samples, preemption and idle work
    between."""
    requests = [
        ask(prompt_of(length, length), max_tokens=20, temperature=0.5 * (index % 2), seed=index, point=points[index],
            logprobs=1 if index == 1 else None, n=1 + (index == 2))
        for index, length in enumerate(lengths)
    ]  # fmt: skip
    options: dict[str, Any] = {"kv_blocks": kv_blocks, "max_step_tokens": step_tokens}
    expected = run(make_engine(LikeMinded(**options)), requests, [2] * 4, Clock())
    engine = speculating(kind, LikeMinded(**options), monitor=Monitor(rate, clock=lambda: 0))
    assert run(engine, requests, [2] * 4, Clock()) == expected
    while engine.idle():
        engine.check_integrity()
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


def test_replay_kl_is_that_of_whole_answers_with_their_own_kv() -> None:
    executor = LikeMinded()
    engine = watched(executor=executor)
    prompt = prompt_of(70)
    events = engine.run_until(engine.submit(ask(prompt, max_tokens=30, point="int4", ignore_eos=True)))
    receipt = done_of(events, 1).receipt
    assert receipt.replay_kl is None and engine.monitor.waiting
    engine.submit(ask(prompt_of(5), max_tokens=3))
    assert not engine.idle(), "somebody asks"
    engine.run_until()
    steps = 0
    while engine.idle():
        engine.check_integrity()
        steps += 1
    tokens = [*prompt, *tokens_of(events, 1)]
    history = np.array([[token, 1] for token in tokens], np.int64)
    kls = []
    for position in range(69, 99):
        served, accurate = history[: position + 1], history[: position + 1].copy()
        accurate[:, 1] = 0
        rows = [executor.logits_of(each)[None] for each in (accurate, served)]
        kls.append(float(kl_divergence(*rows)[0]))
    assert receipt.replay_kl == pytest.approx(np.mean(kls), rel=1e-5)
    assert engine.monitor.replay_figures()["int4"].samples == 1 and steps >= 3
    assert engine.pool.available == engine.pool.blocks


def test_a_replay_gives_way_to_whoever_needs_its_kv() -> None:
    engine = watched(executor=LikeMinded(kv_blocks=12))
    events = engine.run_until(engine.submit(ask(prompt_of(100), max_tokens=10, point="int4", ignore_eos=True)))
    assert engine.idle() and list(engine.monitor.states())
    second = engine.submit(ask(prompt_of(330, 2), max_tokens=20, ignore_eos=True))
    later = engine.run_until(second)
    assert len(tokens_of(later, second)) == 20 and not list(engine.monitor.states())
    assert done_of(events, 1).receipt.replay_kl is None
    engine.check_integrity()


def test_shadow_work_waits_where_a_budget_might_suffer() -> None:
    """On an invented machine whose costs are known: 1 ms a step, and bounds of 1.3 times that."""
    for budget_ms, looked_at in ((9.0, False), (1000.0, True)):
        clock = Clock()
        times = Times()
        machine = Machine(clock, times, lambda: 1.0)
        engine = make_engine(machine, clock=clock, cost=times, monitor=Monitor(1.0, clock=clock))
        deadline = clock.now + int(budget_ms * MS)
        request = ask(prompt_of(5), max_tokens=10, point="int4", deadline_ns=deadline, ignore_eos=True)
        done = done_of(engine.run_until(engine.submit(request)), 1)
        assert done.receipt.outcome == "met" and done.finish_detail == "max_tokens"
        assert (done.receipt.step_kl is not None) == looked_at
        assert (engine.monitor.skipped > 0) != looked_at
        slowest = max(spent for spent in times.observed)
        assert slowest <= 0.5 * MS * (1 + 1 / 20 * 5) + 1, "a shadow run is not taken for a slow step"


def test_spare_time() -> None:
    engine = make_engine(cost=Times())
    assert engine._spare_ns() == math.inf and engine.idle() is False
    now = engine._clock()
    engine.submit(ask(prompt_of(4), max_tokens=10, deadline_ns=now + 3_600_000 * MS))
    assert engine._spare_ns() == 0.0, "nobody has looked at that one yet"
    engine.settle()
    assert 0 < engine._spare_ns() < 3_600_000 * MS - 10 * MS
    engine.submit(ask(prompt_of(4), max_tokens=10, itl_ns=2 * MS))
    engine.settle()
    assert engine._spare_ns() <= 2 * MS
    blind = make_engine()
    blind.submit(ask(prompt_of(4), max_tokens=10, deadline_ns=blind._clock() + 3_600_000 * MS))
    blind.settle()
    assert blind._spare_ns() == 0.0, "nothing is known about time"


def test_the_limit_takes_points_away_and_gives_them_back() -> None:
    executor = LikeMinded(agreement=2.0)
    engine = watched(executor=executor, limit=0.05)
    told: list[frozenset[str]] = []
    engine.monitor._forbid = told.append
    engine.run_until(engine.submit(ask(prompt_of(40), max_tokens=ENOUGH + 4, point="int4", ignore_eos=True)))
    assert told == [frozenset({"int4"})] and engine.monitor.forbidden == {"int4"}
    executor.agreement = 1e-6  # the text became easy
    engine.run_until(engine.submit(ask(prompt_of(40, 3), max_tokens=430, point="int8", ignore_eos=True)))
    engine.run_until(engine.submit(ask(prompt_of(40, 4), max_tokens=430, point="int8", ignore_eos=True)))
    engine.run_until(engine.submit(ask(prompt_of(40, 5), max_tokens=430, point="int8", ignore_eos=True)))
    assert told[-1] == frozenset(), "at the most accurate point the forbidden one is still looked at"


def test_the_limit_reaches_the_throttle() -> None:
    engine = watched(limit=0.05)
    engine.monitor._forbid(frozenset({"int4"}))
    job = engine._accept(ask(prompt_of(4), max_tokens=4))
    engine.budgets.describe(job)
    engine.budgets.gear = Gear(level=1)
    assert engine.budgets.point_of(job) == "int8"
    engine.monitor._forbid(frozenset())
    assert engine.budgets.point_of(job) == ("int4" if job.bottom else "int8")


def test_a_shadow_that_fails_ends_the_watching_and_nothing_else() -> None:
    executor = LikeMinded()
    engine = watched(executor=executor)

    def fail(batch: StepBatch) -> None:
        if batch.point == "int8":
            raise RuntimeError("broken")

    executor.before_step = fail
    events = engine.run_until(engine.submit(ask(prompt_of(20), max_tokens=9, point="int4", ignore_eos=True)))
    assert len(tokens_of(events, 1)) == 9 and engine.monitor.rate == 0.0
    engine.check_integrity()


def test_numbers_out_of_range() -> None:
    for options in ({"rate": 1.5}, {"rate": -0.1}, {"rate": True}, {"rate": math.nan}):
        with pytest.raises(InputError, match="monitor_rate"):
            Monitor(**options)
    for limit in (-1.0, "x", math.nan):
        with pytest.raises(InputError, match="max_kl"):
            Monitor(limit=limit)  # type: ignore[arg-type]


def test_few_samples_decide_nothing() -> None:
    tally = Tally()
    for _ in range(ENOUGH - 1):
        tally.add(1.0, 0.0)
    assert tally.bounds() is None
    tally.add(1.0, 0.0)
    assert tally.bounds() == (1.0, 1.0) and tally.figures().top1.estimate == 0.0


def test_the_idle_worker_works_and_ends() -> None:
    engine = watched()
    driver = Driver(engine)
    worker = IdleWorker(driver)
    engine.monitor.on_waiting = worker.wake
    ticket = driver.submit(ask(prompt_of(20), max_tokens=9, point="int4", ignore_eos=True))
    receipt = None
    while events := ticket.wait():
        receipt = next((event.receipt for event in events if hasattr(event, "receipt")), receipt)
    patience = time.monotonic() + 60
    while receipt is not None and receipt.replay_kl is None and time.monotonic() < patience:
        time.sleep(0.01)
    assert receipt is not None and receipt.replay_kl is not None and receipt.replay_kl > 0
    worker.close()
    worker.close()
    driver.close()
    assert worker._thread is not None and not worker._thread.is_alive()


def test_an_idle_worker_that_is_closed_while_it_looks_ends() -> None:
    """`close` may come between the look that finds nothing and the sleep that follows."""

    class Looking:
        def alone(self, _: object) -> bool:
            if not closing.is_alive():
                closing.start()
            while not (worker._closed.is_set() and worker._work.is_set()):
                time.sleep(0.001)
            return False

    worker = IdleWorker(Looking())  # type: ignore[arg-type]
    closing = threading.Thread(target=worker.close, daemon=True)
    worker.wake()
    assert worker._thread is not None
    worker._thread.join(20)
    assert not worker._thread.is_alive()
    closing.join(20)


def test_on_the_embedded_model(tmp_path: Path) -> None:
    """Real kernels: the answer is the same, and the live error is of the order that the artifact states."""
    pytest.importorskip("haomiao.engine.executors.native", reason="the native executor is not built")
    from haomiao.api import LLM

    prompt = "The history of the city begins with"
    with LLM(point="int4", threads=1, max_context=256, speculate="off") as plain:
        expected = plain.generate(prompt, max_tokens=60, ignore_eos=True)
    with LLM(point="int4", threads=1, max_context=256, monitor_rate=1.0, max_kl=10.0) as llm:
        found = llm.generate(prompt, max_tokens=60, ignore_eos=True)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        patience = time.monotonic() + 60
        while found.receipt.replay_kl is None and time.monotonic() < patience:
            time.sleep(0.02)
        figures = llm.monitor.as_dict()
    assert expected.receipt.step_kl is None and found.receipt.step_kl is not None
    assert 0 < found.receipt.step_kl < 0.5 and 0 < (found.receipt.replay_kl or 0) < 1.0
    assert figures["step_kl"]["int4"]["kl"]["estimate"] == pytest.approx(found.receipt.step_kl)
    assert figures["replay_kl"]["int4"]["samples"] == 1 and figures["forbidden"] == []

"""Threads that share an engine: they share steps, nobody waits for ever, and a cancelled request frees its KV."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from haomiao.engine.driver import Driver, Ticket
from haomiao.engine.request import DoneEvent, Event
from haomiao.errors import CancelledError, EngineError, InputError
from tests.engine.fakes import FakeExecutor, ask, make_engine, prompt_of, tokens_of


def finish(ticket: Ticket) -> list[Event]:
    events: list[Event] = []
    while found := ticket.wait():
        events += found
    return events


def alone(prompt: list[int], **options: Any) -> list[int]:
    engine = make_engine()
    return tokens_of(engine.run_until(engine.submit(ask(prompt, **options))), 1)


def test_threads_share_steps_and_get_their_own_answers() -> None:
    executor = FakeExecutor()
    driver = Driver(make_engine(executor))
    prompts = [prompt_of(5 + seed, seed) for seed in range(8)]
    answers: dict[int, list[int]] = {}
    start = threading.Barrier(len(prompts))

    def work(index: int) -> None:
        start.wait()
        for _ in range(3):
            ticket = driver.submit(ask(prompts[index], max_tokens=20, temperature=0.8, seed=index))
            answers[index] = tokens_of(finish(ticket), ticket.request_id)
            assert ticket.done

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for index, prompt in enumerate(prompts):
        assert answers[index] == alone(prompt, max_tokens=20, temperature=0.8, seed=index)
    driver.alone(lambda engine: engine.check_integrity())
    computed = sum(len(batch.past) for batch in executor.batches)
    assert len(executor.batches) < computed, "several sequences in a step"


def test_a_cancelled_request_frees_its_kv_at_once() -> None:
    engine = make_engine(prefix_cache=False)
    driver = Driver(engine)
    ticket = driver.submit(ask(prompt_of(40), max_tokens=50, ignore_eos=True))
    assert ticket.wait()
    ticket.cancel()
    ticket.cancel()
    assert engine.pool.available == engine.pool.blocks and not engine.busy
    assert ticket.done and ticket.wait() == []


def test_cancel_from_another_thread_wakes_the_waiting_one() -> None:
    executor = FakeExecutor()
    driver = Driver(make_engine(executor, max_context=10_000))
    ticket = driver.submit(ask(prompt_of(4), max_tokens=1500, ignore_eos=True))
    seen = threading.Event()

    def consume() -> None:
        while ticket.wait():
            seen.set()

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    assert seen.wait(30)
    ticket.cancel()
    thread.join(30)
    assert not thread.is_alive()
    driver.alone(lambda engine: engine.settle())
    driver.alone(lambda engine: engine.check_integrity())
    assert driver.alone(lambda engine: engine.pool.available == engine.pool.blocks or engine.pool.cached > 0)


def test_errors_end_the_ticket() -> None:
    executor = FakeExecutor()
    driver = Driver(make_engine(executor))

    def fail(batch: Any) -> None:
        raise RuntimeError("broken")

    executor.before_step = fail
    ticket = driver.submit(ask(prompt_of(4), n=3))
    (event,) = finish(ticket)
    assert isinstance(event, DoneEvent) and isinstance(event.error, EngineError) and "broken" in str(event.error)


def test_an_interrupt_leaves_the_others_running() -> None:
    executor = FakeExecutor()
    driver = Driver(make_engine(executor))
    first = driver.submit(ask(prompt_of(4), max_tokens=5))
    second = driver.submit(ask(prompt_of(6), max_tokens=5))

    def interrupt(batch: Any) -> None:
        executor.before_step = None
        raise KeyboardInterrupt

    executor.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        first.wait()
    first.cancel()
    assert tokens_of(finish(second), second.request_id) == alone(prompt_of(6), max_tokens=5)


def test_closing_ends_everything() -> None:
    engine = make_engine()
    driver = Driver(engine)
    ticket = driver.submit(ask(prompt_of(4)))
    driver.close()
    driver.close()
    with pytest.raises(InputError, match="closed"):
        ticket.wait()
    with pytest.raises(InputError, match="closed"):
        driver.submit(ask(prompt_of(4)))
    ticket.cancel()
    assert engine.executor.closed  # type: ignore[attr-defined]


def test_cancel_before_the_first_step() -> None:
    engine = make_engine()
    request_id = engine.submit(ask(prompt_of(4)))
    engine.cancel(request_id)
    (event,) = engine.step()
    assert isinstance(event, DoneEvent) and isinstance(event.error, CancelledError) and not engine.busy

"""What cannot be served and what goes wrong: refused by name, ended alone, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest

from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.errors import (
    CancelledError,
    ContextLengthError,
    InputError,
    KvExhaustedError,
    OverloadError,
)
from tests.engine.fakes import (
    VOCAB,
    FakeExecutor,
    LetterMatcher,
    alone,
    ask,
    collected,
    done_of,
    make_engine,
    prompt_of,
)


def test_what_cannot_be_served_is_refused_by_name() -> None:
    engine = make_engine(FakeExecutor(kv_blocks=4), max_context=200)
    with pytest.raises(ContextLengthError) as caught:
        engine.submit(ask(prompt_of(150), max_tokens=60))
    message = str(caught.value)
    assert "150" in message and "60" in message and "210" in message and "200" in message
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ContextLengthError, match="201 tokens"):
        engine.submit(EngineRequest(prompt_of(201), work="logits"))
    with pytest.raises(KvExhaustedError, match="KV for 160 tokens; there is KV for 128"):
        engine.submit(ask(prompt_of(100), max_tokens=60))
    for prompt, words in (([], "empty"), ([VOCAB], "61"), ([-1], "-1"), ([True], "True"), ([1.0], "1.0")):
        with pytest.raises(InputError, match=words):
            engine.submit(EngineRequest(prompt))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="points int8, int4, not 'full'"):
        engine.submit(ask([1], point="full"))
    with pytest.raises(InputError, match="temperature"):
        engine.submit(ask([1], max_tokens=5, temperature=-1.0))
    for options in ((), ((),), ((VOCAB,),)):
        with pytest.raises(InputError, match="option"):
            engine.submit(EngineRequest([1], work="choose", options=options))
    with pytest.raises(InputError, match="work"):
        engine.submit(EngineRequest([1], work="dance"))  # type: ignore[arg-type]
    assert not engine.busy


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_requests=2)
    engine.submit(ask([1]))
    engine.submit(ask([1]))
    with pytest.raises(OverloadError, match="2 requests"):
        engine.submit(ask([1]))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_frees_everything_within_one_step(steps: int) -> None:
    engine = make_engine(FakeExecutor(max_step_tokens=40), prefix_cache=False)
    going = engine.submit(ask(prompt_of(100, 1), max_tokens=30, n=2, ignore_eos=True))
    staying = ask(prompt_of(20, 2), max_tokens=10)
    other = engine.submit(staying)
    events = [event for _ in range(steps) for event in engine.step()]
    engine.cancel(going)
    engine.cancel(going)
    engine.cancel(99)
    events += engine.step()
    done = [event for event in events if isinstance(event, DoneEvent) and event.request_id == going]
    assert done and all(isinstance(event.error, CancelledError) for event in done)
    engine.check_integrity()
    events += engine.run_until()
    assert collected(events, other) == alone(staying)
    assert engine.pool.available == engine.pool.blocks


def test_an_executor_that_fails_ends_the_requests_of_that_step_only() -> None:
    executor = FakeExecutor(max_step_tokens=30)
    engine = make_engine(executor)
    first = engine.submit(ask(prompt_of(30), max_tokens=4))
    later = ask(prompt_of(30, 3), max_tokens=4)
    second = engine.submit(later)

    def fail(batch: Any) -> None:
        executor.before_step = None
        raise InputError("a batch that contradicts itself")

    executor.before_step = fail
    events = engine.run_until()
    assert isinstance(done_of(events, first).error, InputError)
    assert collected(events, second) == alone(later)
    assert engine.pool.available == engine.pool.blocks
    engine.check_integrity()


def test_an_interrupt_inside_a_step_loses_nothing() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    request = ask(prompt_of(50), max_tokens=10)
    request_id = engine.submit(request)
    events = engine.step()

    def interrupt(batch: Any) -> None:
        executor.before_step = None
        raise KeyboardInterrupt

    executor.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    events += engine.run_until()
    assert collected(events, request_id) == alone(request)


def test_an_interrupt_while_telling_ends_one_request_and_keeps_the_others() -> None:
    class Rude(LetterMatcher):
        pushes = 0

        def push(self, token_id: int) -> str:
            Rude.pushes += 1
            if Rude.pushes == 4:
                raise KeyboardInterrupt
            return super().push(token_id)

    engine = make_engine()
    before = ask(prompt_of(40, 1), max_tokens=12)
    after = ask(prompt_of(40, 3), max_tokens=12)
    ids = [engine.submit(before), engine.submit(ask(prompt_of(40, 2), max_tokens=12, stop=Rude)), engine.submit(after)]
    events = []
    with pytest.raises(KeyboardInterrupt):
        while True:
            events += engine.step()
    engine.check_integrity()
    events += engine.run_until()
    assert isinstance(done_of(events, ids[1]).error, CancelledError)
    assert collected(events, ids[0]) == alone(before)
    assert collected(events, ids[2]) == alone(after)


def test_kv_exhaustion_sheds_one_and_preempts_the_others() -> None:
    engine = make_engine(FakeExecutor(kv_blocks=5), prefix_cache=False)
    requests = [ask(prompt_of(40, seed), max_tokens=60, ignore_eos=True) for seed in range(4)]
    ids = [engine.submit(request) for request in requests]
    with pytest.raises(KvExhaustedError):
        engine.submit(ask(prompt_of(150), max_tokens=60))
    events = engine.run_until()
    for request, request_id in zip(requests, ids, strict=True):
        assert collected(events, request_id) == alone(request)
    steps = [done_of(events, each).receipt.schedule[0].tokens for each in ids]
    assert max(steps) > 99, "somebody was computed again"
    engine.check_integrity()

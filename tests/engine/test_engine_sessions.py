"""Sessions over the loop: only what changed is computed, and nothing leaks."""

from __future__ import annotations

from dataclasses import replace

from haomiao.engine.request import EngineRequest
from tests.engine.fakes import (
    FakeExecutor,
    PatternConstraint,
    alone,
    answer,
    ask,
    collected,
    done_of,
    make_engine,
    prompt_of,
)


def test_a_session_computes_only_what_changed() -> None:
    executor = FakeExecutor(max_step_tokens=512)
    engine = make_engine(executor, prefix_cache=False)
    session = engine.open_session()
    prompt = prompt_of(70)
    engine.run_until(engine.submit(EngineRequest(prompt[:50], work="prefill", session=session)))
    engine.run_until(engine.submit(EngineRequest(prompt, work="prefill", session=session)))
    request = ask(prompt, max_tokens=6, session=session)
    events = engine.run_until(engine.submit(request))
    assert [batch.tokens for batch in executor.batches[:3]] == [50, 20, 1], (
        "the first token costs one step of one token"
    )
    assert collected(events, 3) == alone(ask(prompt, max_tokens=6))
    corrected = [*prompt[:60], 5, 5, 5]
    before = len(executor.batches)
    events = engine.run_until(engine.submit(ask(corrected, max_tokens=6, session=session)))
    assert executor.batches[before].tokens == 3 and done_of(events, 4).receipt.cached_tokens == 60
    assert collected(events, 4) == alone(ask(corrected, max_tokens=6))
    engine.check_integrity()
    engine.close_session(session)
    assert engine.pool.available == engine.pool.blocks


def test_sessions_are_misused_by_name_and_give_way_when_room_is_short() -> None:
    engine = make_engine(FakeExecutor(kv_blocks=4), prefix_cache=False)
    session = engine.open_session()
    engine.run_until(engine.submit(EngineRequest(prompt_of(90), work="prefill", session=session)))
    assert engine.pool.available == 1
    request = ask(prompt_of(90, 3), max_tokens=5)
    assert answer(engine, engine.submit(request)) == alone(request)
    assert engine.pool.available == 4, "the session's KV was taken"
    again = ask(prompt_of(90), max_tokens=5, session=session)
    assert answer(engine, engine.submit(again)) == alone(ask(prompt_of(90), max_tokens=5))
    first, second = (engine.submit(ask([1, 2], max_tokens=3, session=session)) for _ in range(2))
    unknown = engine.submit(ask([1, 2], max_tokens=3, session=77))
    events = engine.run_until()
    assert done_of(events, first).error is None
    assert "one request at a time" in str(done_of(events, second).error)
    assert "no session 77" in str(done_of(events, unknown).error)
    engine.close_session(session)
    engine.check_integrity()


def test_a_session_that_is_closed_or_cancelled_midway_leaks_nothing() -> None:
    engine = make_engine(FakeExecutor(max_step_tokens=16))
    session = engine.open_session()
    request_id = engine.submit(ask(prompt_of(60), max_tokens=50, session=session, ignore_eos=True))
    engine.step()
    engine.cancel(request_id)
    engine.step()
    engine.check_integrity()
    request_id = engine.submit(ask(prompt_of(60), max_tokens=50, session=session, ignore_eos=True))
    engine.step()
    engine.close_session(session)
    events = engine.run_until()
    assert collected(events, request_id)[0] == alone(ask(prompt_of(60), max_tokens=50, ignore_eos=True))[0]
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    engine.close()
    engine.close()
    assert engine.executor.closed  # type: ignore[attr-defined]


def test_a_prefix_whose_owner_just_lost_its_kv() -> None:
    """The second starts from blocks that the plan takes from the first: room is counted once, and nobody is shed."""
    engine = make_engine(FakeExecutor(kv_blocks=8, max_step_tokens=200))
    common = prompt_of(64, 1)
    requests = [
        ask([*common, *prompt_of(1, 0)], max_tokens=9, point="int4"),
        ask([*common, *prompt_of(2, 1)], max_tokens=6, point="int4"),
        ask(prompt_of(2, 1), max_tokens=2),
        ask([*common, *prompt_of(29, 9)], max_tokens=40, ignore_eos=True),
        ask([*common[:40], *prompt_of(2, 2)], max_tokens=11),
    ]
    ids = [engine.submit(request) for request in requests]
    events = engine.run_until()
    for request, request_id in zip(requests, ids, strict=True):
        assert done_of(events, request_id).error is None
        assert collected(events, request_id) == alone(request)


def test_rows_are_greedy_only_where_nothing_but_the_argmax_is_read() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    plain = ask(prompt_of(40), max_tokens=4, ignore_eos=True)
    others = [
        ask(prompt_of(9), max_tokens=2, temperature=0.7),
        ask(prompt_of(9), max_tokens=2, logprobs=0),
        ask(prompt_of(9), max_tokens=2, logit_bias={3: 1.0}),
        ask(prompt_of(9), max_tokens=2, repetition_penalty=1.1),
        ask(prompt_of(9), max_tokens=2, frequency_penalty=0.1),
        ask(prompt_of(9), max_tokens=2, min_tokens=2),
        replace(ask(prompt_of(9), max_tokens=2), constraint=PatternConstraint([(3, 4), (5, 6)])),
        replace(ask(prompt_of(9), max_tokens=2), prompt_logprobs=1),
        EngineRequest(prompt_of(9), work="logits"),
        EngineRequest(prompt_of(9), work="choose", options=((1, 2), (3,))),
    ]
    engine.run_until(engine.submit(plain))
    assert all(batch.greedy is not None and batch.greedy.all() for batch in executor.batches)
    assert sum(batch.greedy.size for batch in executor.batches if batch.greedy is not None) == 4
    for request in others[:-3]:
        executor.batches.clear()
        engine.run_until(engine.submit(request))
        assert not any(batch.greedy is None or batch.greedy.any() for batch in executor.batches), request
    for request in others[-3:]:
        executor.batches.clear()
        engine.run_until(engine.submit(request))
        assert not any(batch.greedy is None or batch.greedy[:-1].any() for batch in executor.batches), request

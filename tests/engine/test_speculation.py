"""Speculation changes how many steps an answer takes, and nothing else: on a fake executor that sees every mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.request import EngineRequest
from haomiao.errors import CancelledError, EngineError
from haomiao.types import StepBatch
from tests.engine.fakes import (
    Clock,
    ask,
    done_of,
    make_engine,
    prompt_of,
    tokens_of,
)
from tests.engine.speculating import PROPOSERS, REQUESTS, LikeMinded, run, speculating


@given(
    kind=st.sampled_from(PROPOSERS),
    requests=st.lists(REQUESTS, min_size=1, max_size=4),
    step_tokens=st.sampled_from([1, 7, 32, 200]),
    kv_blocks=st.sampled_from([10, 16, 64]),
    prefix_cache=st.booleans(),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
    draft_blocks=st.sampled_from([3, 40]),
    gaps=st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_nothing_but_the_number_of_steps_depends_on_speculation(
    kind: str,
    requests: list[EngineRequest],
    step_tokens: int,
    kv_blocks: int,
    prefix_cache: bool,
    rate: float,
    draft_blocks: int,
    gaps: list[int],
) -> None:
    """Any proposer, any company, temperature, penalties, grammar, stop strings, samples, chunks and preemption."""
    options: dict[str, Any] = {"max_step_tokens": step_tokens, "kv_blocks": kv_blocks}
    clock = Clock()
    plain = make_engine(LikeMinded(**options), prefix_cache=prefix_cache, clock=clock)
    expected = run(plain, requests, gaps, clock)
    known = {index: answers[0][0] for index, answers in enumerate(expected, 1)}
    clock = Clock()
    engine = speculating(
        kind, LikeMinded(**options), rate=rate, known=known, draft_blocks=draft_blocks,
        prefix_cache=prefix_cache, clock=clock,
    )  # fmt: skip
    assert run(engine, requests, gaps, clock) == expected
    if kind == "draft":
        engine.proposer.check_integrity()  # type: ignore[attr-defined]
        assert not engine.proposer._reads  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", PROPOSERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_stand_and_save_steps(kind: str, temperature: float) -> None:
    request = ask(prompt_of(30), max_tokens=120, temperature=temperature, seed=3, ignore_eos=True)
    plain = make_engine(LikeMinded(memory=1, agreement=0.05))
    expected = tokens_of(plain.run_until(plain.submit(request)), 1)
    executor = LikeMinded(memory=1, agreement=0.05)
    engine = speculating(kind, executor, known={1: expected}, rate=1.0)
    events = engine.run_until(engine.submit(request))
    receipt = done_of(events, 1).receipt
    assert tokens_of(events, 1) == expected
    assert receipt.drafted_tokens >= receipt.accepted_tokens > (5 if kind == "suffix" and temperature else 50)
    served = [batch for batch in executor.batches if batch.point == "int8"]
    assert len(served) == 120 - receipt.accepted_tokens
    assert sum(entry.tokens for entry in receipt.schedule) == 30 + 119, "only what stood counts as computed"
    assert sum(entry.steps for entry in receipt.schedule) == len(served)


def test_blocks_are_published_only_when_their_tokens_stand() -> None:
    request = ask(prompt_of(20), max_tokens=60, ignore_eos=True)
    plain = make_engine(LikeMinded())
    answer = tokens_of(plain.run_until(plain.submit(request)), 1)
    engine = speculating("forced", known={1: answer}, rate=0.5)
    while engine.busy or not engine._roster.jobs:
        if not engine.busy:
            engine.submit(request)
        engine.step()
        full = {tuple([*prompt_of(20), *answer][: 32 * (i + 1)]) for i in range(3)}
        assert engine.pool.cached <= len(full)
        if not engine.busy:
            break
    again = engine.run_until(engine.submit(ask([*prompt_of(20), *answer, 7], max_tokens=5, ignore_eos=True)))
    fresh = make_engine(LikeMinded(), prefix_cache=False)
    expected = fresh.run_until(fresh.submit(ask([*prompt_of(20), *answer, 7], max_tokens=5, ignore_eos=True)))
    assert tokens_of(again, 2) == tokens_of(expected, 1)
    assert done_of(again, 2).receipt.cached_tokens == 64, "the answer's blocks are found"


@pytest.mark.parametrize("kind", PROPOSERS)
def test_sessions_keep_what_stood(kind: str) -> None:
    answers = []
    for engine in (make_engine(LikeMinded()), speculating(kind, known={1: [1] * 30})):
        session = engine.open_session()
        first = tokens_of(engine.run_until(engine.submit(ask(prompt_of(50), max_tokens=30, session=session))), 1)
        longer = ask([*prompt_of(50), *first, 5, 6], max_tokens=30, session=session)
        second = tokens_of(engine.run_until(engine.submit(longer)), 2)
        engine.check_integrity()
        engine.close_session(session)
        engine.check_integrity()
        answers.append((first, second))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", PROPOSERS)
def test_cancelling_and_failing_lose_nothing(kind: str) -> None:
    engine = speculating(kind, known={1: [1] * 99, 2: [2] * 99})
    first = engine.submit(ask(prompt_of(50), max_tokens=99, ignore_eos=True))
    second = engine.submit(ask(prompt_of(50, 2), max_tokens=99, ignore_eos=True))
    for _ in range(9):
        engine.step()
    engine.cancel(first)
    events = engine.step()
    assert isinstance(done_of(events, first).error, CancelledError)
    engine.check_integrity()

    def fail(batch: StepBatch) -> None:
        raise RuntimeError("the executor broke")

    engine.executor.before_step = fail  # type: ignore[attr-defined]
    events = engine.run_until(second)
    assert isinstance(done_of(events, second).error, EngineError)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


def test_an_interrupt_while_drafting_changes_nothing() -> None:
    request = ask(prompt_of(50), max_tokens=40, ignore_eos=True)
    plain = make_engine(LikeMinded())
    expected = tokens_of(plain.run_until(plain.submit(request)), 1)
    engine = speculating("self")
    executor: Any = engine.executor
    engine.submit(request)
    events, interrupts = [], 0

    def interrupt(batch: StepBatch) -> None:
        if batch.point == "int4" and len(executor.batches) % 5 == 3:
            executor.batches.append(batch)
            raise KeyboardInterrupt

    executor.before_step = interrupt
    while engine.busy:
        try:
            events += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            engine.check_integrity()
    assert interrupts and tokens_of(events, 1) == expected

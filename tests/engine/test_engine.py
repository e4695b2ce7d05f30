"""The loop on a fake executor whose logits depend on all that a sequence can see: same bits in any company."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.request import EngineRequest
from haomiao.errors import (
    ConstraintError,
    DeadlineError,
    EngineError,
    InputError,
)
from haomiao.types import SamplingParams
from tests.engine.fakes import (
    EOS,
    Clock,
    FakeExecutor,
    LetterMatcher,
    PatternConstraint,
    alone,
    answer,
    ask,
    collected,
    done_of,
    letter,
    make_engine,
    prompt_of,
    text_of,
    tokens_of,
)

MS = 1_000_000


# ---- same bits ------------------------------------------------------------------------------------------------------

REQUESTS = st.builds(
    lambda length, seed, start, tokens, temperature, logprobs, point: ask(
        [*prompt_of(64, 1)[:start], *prompt_of(length, seed)],
        max_tokens=tokens,
        temperature=temperature,
        seed=seed,
        logprobs=logprobs,
        point=point,
        repetition_penalty=1.1 if seed % 2 else 1.0,
    ),
    length=st.integers(1, 90),
    seed=st.integers(0, 9),
    start=st.sampled_from([0, 40, 64]),
    tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.9]),
    logprobs=st.sampled_from([None, 2]),
    point=st.sampled_from([None, "int8", "int4"]),
)


@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=5),
    step_tokens=st.sampled_from([1, 7, 32, 200]),
    kv_blocks=st.sampled_from([8, 14, 64]),
    prefix_cache=st.booleans(),
    gaps=st.lists(st.integers(0, 6), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_tokens_and_logprobs_do_not_depend_on_company(
    requests: list[EngineRequest], step_tokens: int, kv_blocks: int, prefix_cache: bool, gaps: list[int]
) -> None:
    """Batch company, prefill cuts, prefix reuse, and preemption where KV is scarce."""
    clock = Clock()
    engine = make_engine(
        FakeExecutor(max_step_tokens=step_tokens, kv_blocks=kv_blocks), prefix_cache=prefix_cache, clock=clock
    )
    events, ids = [], []
    for request, gap in zip(requests, gaps, strict=False):
        ids.append(engine.submit(request))
        for _ in range(gap):
            clock.now += 50 * MS
            events += engine.step()
            engine.check_integrity()
    while engine.busy:
        clock.now += 50 * MS
        events += engine.step()
    engine.check_integrity()
    assert engine.pool.available == kv_blocks
    for request, request_id in zip(requests, ids, strict=True):
        assert collected(events, request_id) == alone(request)


def test_prefix_reuse_changes_the_receipt_and_nothing_else() -> None:
    engine = make_engine()
    request = ask(prompt_of(100), max_tokens=5)
    first = engine.submit(request)
    events = engine.run_until(first)
    second = engine.submit(request)
    events += engine.run_until(second)
    longer = engine.submit(ask([*prompt_of(100), *tokens_of(events, first), 7, 8], max_tokens=3))
    salted = engine.submit(ask(prompt_of(100), max_tokens=5, salt=b"someone else"))
    other_point = engine.submit(ask(prompt_of(100), max_tokens=5, point="int4"))
    events += engine.run_until()
    assert tokens_of(events, first) == tokens_of(events, second) == tokens_of(events, salted)
    cached = [done_of(events, each).receipt.cached_tokens for each in (first, second, longer, salted, other_point)]
    assert cached == [0, 96, 96, 0, 0]
    assert tokens_of(events, other_point) != tokens_of(events, first), "the fake's points differ"


def test_a_prompt_of_whole_blocks_computes_its_last_token_again() -> None:
    engine = make_engine()
    request = ask(prompt_of(64), max_tokens=2)
    first = engine.run_until(engine.submit(request))
    second = engine.run_until(engine.submit(request))
    assert done_of(second, 2).receipt.cached_tokens == 32
    assert tokens_of(first, 1) == tokens_of(second, 2)


def test_the_point_of_reused_blocks_is_never_mixed() -> None:
    """What int4 computed must not be found by int8, although they share weights and KV layout."""
    engine = make_engine()
    engine.run_until(engine.submit(ask(prompt_of(100), max_tokens=2, point="int4")))
    request = ask(prompt_of(100), max_tokens=6, point="int8")
    assert answer(engine, engine.submit(request)) == alone(request)


# ---- samples --------------------------------------------------------------------------------------------------------


@given(
    samples=st.integers(2, 5),
    length=st.integers(1, 70),
    step_tokens=st.sampled_from([3, 64]),
    kv_blocks=st.sampled_from([6, 64]),
)
@settings(max_examples=30, deadline=None)
def test_samples_fork_from_one_prefill(samples: int, length: int, step_tokens: int, kv_blocks: int) -> None:
    request = ask(prompt_of(length), max_tokens=20, temperature=1.0, seed=5, n=samples, logprobs=0)
    engine = make_engine(FakeExecutor(max_step_tokens=step_tokens, kv_blocks=kv_blocks))
    request_id = engine.submit(request)
    events = []
    while engine.busy:
        events += engine.step()
        engine.check_integrity()
    roomy = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    same = roomy.run_until(roomy.submit(request))
    for sample in range(samples):
        assert collected(events, request_id, sample) == collected(same, 1, sample)
        assert done_of(events, request_id, sample).receipt.prompt_tokens == length
    assert len({tuple(tokens_of(events, request_id, sample)) for sample in range(samples)}) > 1
    computed = sum(batch.tokens for batch in roomy.executor.batches)  # type: ignore[attr-defined]
    answered = sum(len(tokens_of(same, 1, sample)) for sample in range(samples))
    assert computed == length + answered - samples, "the prompt was computed once"


def test_seeds_repeat_and_the_receipt_says_which() -> None:
    engine = make_engine()
    request = ask(prompt_of(10), max_tokens=12, temperature=1.0)
    events = engine.run_until(engine.submit(request))
    seed = done_of(events, 1).receipt.seed
    again = ask(prompt_of(10), max_tokens=12, temperature=1.0, seed=seed)
    assert answer(engine, engine.submit(again))[0] == tokens_of(events, 1)
    assert done_of(engine.run_until(engine.submit(request)), 3).receipt.seed != seed


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_max_tokens_and_eos() -> None:
    engine = make_engine(FakeExecutor(eos_bias=5.0))
    ended = engine.submit(ask(prompt_of(5), max_tokens=50))
    forced_on = engine.submit(ask(prompt_of(5), max_tokens=50, ignore_eos=True))
    patient = engine.submit(ask(prompt_of(5), max_tokens=50, min_tokens=20))
    events = engine.run_until()
    done = done_of(events, ended)
    assert (done.finish_reason, done.finish_detail) == ("stop", "eos")
    assert tokens_of(events, ended)[-1] == EOS and tokens_of(events, ended).count(EOS) == 1
    done = done_of(events, forced_on)
    assert (done.finish_reason, done.finish_detail) == ("length", "max_tokens")
    assert len(tokens_of(events, forced_on)) == 50 == done.receipt.completion_tokens
    assert EOS in tokens_of(events, forced_on)
    assert len(tokens_of(events, patient)) > 20 and EOS not in tokens_of(events, patient)[:20]


def test_stop_tokens_and_stop_strings() -> None:
    request = ask(prompt_of(8), max_tokens=30, ignore_eos=True)
    plain, _ = alone(request)
    engine = make_engine()
    by_id = engine.submit(ask(prompt_of(8), max_tokens=30, ignore_eos=True, stop_token_ids=(plain[6],)))
    text = "".join(letter(token) for token in plain)
    stop = text[9:12]
    make = lambda: LetterMatcher((stop,))  # noqa: E731
    by_text = engine.submit(ask(prompt_of(8), max_tokens=30, ignore_eos=True, stop=make))
    never = engine.submit(ask(prompt_of(8), max_tokens=30, ignore_eos=True, stop=lambda: LetterMatcher(("no such",))))
    events = engine.run_until()
    first = plain.index(plain[6])
    assert tokens_of(events, by_id) == plain[: first + 1]
    assert done_of(events, by_id).finish_detail == "stop_token"
    assert text_of(events, by_text) == text[: text.index(stop)]
    assert (done_of(events, by_text).finish_reason, done_of(events, by_text).finish_detail) == ("stop", "stop_string")
    assert text_of(events, never) == text, "what was held back comes out at the end"


def test_stop_strings_without_text_are_refused() -> None:
    request = EngineRequest([1, 2], sampling=SamplingParams(stop=("a",)))
    with pytest.raises(InputError, match="need a tokenizer"):
        make_engine().submit(request)


# ---- constraints ----------------------------------------------------------------------------------------------------


def test_a_constraint_is_honoured_and_forced_tokens_cost_no_step() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    pattern = [(3, 4, 5), (7,), (8,), (9,), (10, 11), (12,)]
    request_id = engine.submit(ask(prompt_of(5), constraint=PatternConstraint(pattern)))
    events = engine.run_until(request_id)
    tokens = tokens_of(events, request_id)
    assert len(tokens) == len(pattern) and all(t in allowed for t, allowed in zip(tokens, pattern, strict=True))
    assert done_of(events, request_id).finish_detail == "constraint_complete"
    assert len(executor.batches) == 2, "the prompt, and one step for 3 forced tokens; the last one is never computed"
    with_logprobs = engine.submit(ask(prompt_of(5), constraint=PatternConstraint(pattern), logprobs=2))
    events = engine.run_until(with_logprobs)
    assert tokens_of(events, with_logprobs) == tokens, "asking for logprobs changes no token"
    assert len(collected(events, with_logprobs)[1]) == len(pattern)


def test_a_constraint_that_fails_ends_its_request_only() -> None:
    engine = make_engine()
    broken = engine.submit(ask(prompt_of(5), constraint=PatternConstraint([(3, 4)] * 9, fail_at=3)))
    stuck = engine.submit(ask(prompt_of(5), constraint=PatternConstraint([(3,), (), (4,)])))
    fine = ask(prompt_of(9), max_tokens=9)
    fine_id = engine.submit(fine)
    events = engine.run_until()
    error = done_of(events, broken).error
    assert isinstance(error, EngineError) and "the grammar broke" in str(error)
    assert isinstance(done_of(events, stuck).error, ConstraintError)
    assert collected(events, fine_id) == alone(fine)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


def test_constraints_and_samples_fork() -> None:
    engine = make_engine()
    constraint = PatternConstraint([tuple(range(1, 40))] * 6)
    request_id = engine.submit(ask(prompt_of(5), constraint=constraint, n=3, temperature=1.0, seed=1))
    events = engine.run_until()
    answers = {tuple(tokens_of(events, request_id, sample)) for sample in range(3)}
    assert len(answers) == 3 and all(len(each) == 6 for each in answers) and not constraint.taken


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_a_deadline_truncates_with_a_reason() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    request_id = engine.submit(ask(prompt_of(5), max_tokens=100, ignore_eos=True, deadline_ns=clock.now + 10 * MS))
    events = []
    while engine.busy:
        events += engine.step()
        clock.now += MS
    done = done_of(events, request_id)
    assert (done.finish_reason, done.finish_detail, done.receipt.outcome) == ("length", "budget_exhausted", "truncated")
    assert done.receipt.budget_ms == 10 and done.receipt.completion_tokens == 10
    assert tokens_of(events, request_id) == alone(ask(prompt_of(5), max_tokens=10, ignore_eos=True))[0]


def test_a_deadline_closes_a_grammar() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    pattern = [(1, 2)] * 20
    request_id = engine.submit(
        ask(prompt_of(5), constraint=PatternConstraint(pattern), deadline_ns=clock.now + 3 * MS, stop=LetterMatcher)
    )
    events = []
    while engine.busy:
        events += engine.step()
        clock.now += MS
    done = done_of(events, request_id)
    assert len(tokens_of(events, request_id)) == 20 == len(text_of(events, request_id))
    assert (done.finish_reason, done.finish_detail, done.receipt.outcome) == ("length", "budget_exhausted", "truncated")


def test_a_deadline_that_passes_in_the_queue_is_an_error() -> None:
    clock = Clock()
    engine = make_engine(FakeExecutor(max_step_tokens=8), clock=clock)
    request_id = engine.submit(ask(prompt_of(50), deadline_ns=clock.now + 2 * MS))
    events = []
    while engine.busy:
        events += engine.step()
        clock.now += MS
    done = done_of(events, request_id)
    assert isinstance(done.error, DeadlineError) and done.receipt.outcome == "missed" and done.finish_reason is None
    assert engine.pool.available == engine.pool.blocks


def test_a_budget_that_is_kept() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    request_id = engine.submit(ask(prompt_of(5), max_tokens=2, deadline_ns=clock.now + MS, arrival_ns=clock.now - MS))
    done = done_of(engine.run_until(), request_id)
    assert done.receipt.outcome == "met" and done.receipt.budget_ms == 2


def test_the_receipt_adds_up() -> None:
    clock = Clock()
    engine = make_engine(
        FakeExecutor(max_step_tokens=16), clock=clock, name="m", errors={"int8": 0.5, "int4": 2.0}, prefix_cache=False
    )
    blocker = engine.submit(ask(prompt_of(16, 3), max_tokens=1))
    request_id = engine.submit(ask(prompt_of(40), max_tokens=5, ignore_eos=True))
    events = []
    while engine.busy:
        start = clock.now
        engine.executor.before_step = lambda batch, start=start: setattr(clock, "now", start + 10 * MS)  # type: ignore[attr-defined]
        events += engine.step()
    receipt = done_of(events, request_id).receipt
    assert done_of(events, blocker).receipt.queue_ms == 0
    assert (receipt.queue_ms, receipt.prefill_ms, receipt.decode_ms, receipt.total_ms) == (10, 30, 40, 80)
    assert receipt.ttft_ms == 40 and receipt.prompt_tokens == 40 and receipt.completion_tokens == 5
    assert [(entry.point, entry.steps, entry.tokens) for entry in receipt.schedule] == [("int8", 7, 44)]
    assert receipt.model == "m" and receipt.estimated_error == 0.5 and receipt.outcome is None
    assert receipt.as_dict()["schedule"][0]["point"] == "int8"


def test_observers_see_steps_and_ends_and_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.receipts: list[Any] = []

        def on_step(self, batch: Any, result: Any) -> None:
            self.steps.append(batch.tokens)

        def on_finish(self, receipt: Any) -> None:
            self.receipts.append(receipt)

    class Broken(Watcher):
        def on_step(self, batch: Any, result: Any) -> None:
            raise ValueError("I broke")

    watcher = Watcher()
    engine = make_engine(observers=(Broken(), watcher))
    engine.submit(ask(prompt_of(30), max_tokens=3, ignore_eos=True))
    engine.run_until()
    assert watcher.steps == [30, 1, 1] and len(watcher.receipts) == 1
    assert "Broken failed" in caplog.text

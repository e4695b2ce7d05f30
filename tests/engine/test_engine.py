"""The loop on a fake executor whose logits depend on all that a sequence can see: same bits in any company."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.engine import Engine
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.errors import (
    CancelledError,
    ConstraintError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    InputError,
    KvExhaustedError,
    OverloadError,
)
from haomiao.types import SamplingParams, StepBatch
from tests.engine.fakes import (
    EOS,
    VOCAB,
    Clock,
    FakeExecutor,
    LetterMatcher,
    PatternConstraint,
    ask,
    done_of,
    letter,
    make_engine,
    prompt_of,
    text_of,
    tokens_of,
)

MS = 1_000_000


def alone(request: EngineRequest, **options: Any) -> tuple[list[int], list[float]]:
    """Tokens and logprobs of a request that has an engine to itself, without prefix reuse."""
    engine = make_engine(FakeExecutor(max_step_tokens=512), prefix_cache=False)
    return answer(engine, engine.submit(request))


def answer(engine: Engine, request_id: int, sample: int = 0) -> tuple[list[int], list[float]]:
    events = engine.run_until(request_id)
    return collected(events, request_id, sample)


def collected(events: list[Any], request_id: int, sample: int = 0) -> tuple[list[int], list[float]]:
    logprobs = [
        entry.logprob
        for event in events
        if not isinstance(event, DoneEvent) and (event.request_id, event.sample) == (request_id, sample)
        for entry in event.logprobs or ()
    ]
    return tokens_of(events, request_id, sample), logprobs


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


# ---- refusals and faults --------------------------------------------------------------------------------------------


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


# ---- other work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_tokens", [1, 16, 512])
def test_logits_of_every_position(step_tokens: int) -> None:
    executor = FakeExecutor(max_step_tokens=step_tokens)
    engine = make_engine(executor)
    prompt = prompt_of(50)
    engine.run_until(engine.submit(ask(prompt, max_tokens=1)))  # fills the prefix cache, which must not be used
    done = done_of(engine.run_until(engine.submit(EngineRequest(prompt, work="logits"))), 2)
    history = np.array([[token, 0] for token in prompt])
    expected = np.stack([executor.logits_of(history[: end + 1]) for end in range(50)])
    assert done.logits is not None and done.logits.dtype == np.float32
    assert (done.logits == expected).all()


def test_a_choice_over_a_cached_prefix_is_one_step() -> None:
    executor = FakeExecutor(max_step_tokens=128)
    engine = make_engine(executor)
    prefix = prompt_of(96)
    engine.run_until(engine.submit(EngineRequest([*prefix, 5], work="prefill")))
    options = tuple(tuple(prompt_of(2, seed)) for seed in range(4))
    prompt = [*prefix, *prompt_of(20, 7)]
    expected = make_engine(FakeExecutor(max_step_tokens=24)).score_options(prompt, options)  # there is no room for it
    executor.batches.clear()
    assert engine.score_options(prompt, options) == expected
    (batch,) = executor.batches
    assert batch.tokens == 20 + 4 * 2 and list(batch.past) == [96, *[116] * 4] and len(batch.logit_rows) == 1 + 4 * 2
    engine.check_integrity()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_choice_whose_only_step_fails_leaves_nothing(error: BaseException) -> None:
    executor = FakeExecutor(max_step_tokens=128)
    engine = make_engine(executor)

    def fail(batch: StepBatch) -> None:
        raise error

    options = tuple(tuple(prompt_of(2, seed)) for seed in range(4))
    executor.before_step = fail
    engine.submit(EngineRequest(prompt_of(50), work="choose", options=options))
    with contextlib.suppress(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    executor.before_step = None
    done = [event for event in engine.run_until() if isinstance(event, DoneEvent)]
    assert (len(done) == 1 and done[0].error is None) == isinstance(error, KeyboardInterrupt)
    assert engine.score_options(prompt_of(50), options) == pytest.approx(
        make_engine(FakeExecutor(max_step_tokens=8)).score_options(prompt_of(50), options)
    )
    engine.check_integrity()


@given(
    length=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    step_tokens=st.sampled_from([1, 5, 512]),
    kv_blocks=st.sampled_from([4, 64]),
    normalize=st.booleans(),
    known_end=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_choice_scores_are_sums_of_logprobs(
    length: int, sizes: list[int], step_tokens: int, kv_blocks: int, normalize: bool, known_end: bool
) -> None:
    prompt = prompt_of(length)
    options = tuple(tuple(prompt_of(size, seed + 10)) for seed, size in enumerate(sizes))
    executor = FakeExecutor(max_step_tokens=step_tokens, kv_blocks=kv_blocks)
    engine = make_engine(executor, eos_ids=(EOS,) if known_end else ())
    request = EngineRequest(prompt, work="choose", options=options, normalize=normalize)
    events = engine.run_until(engine.submit(request))
    scores = done_of(events, 1).scores
    assert make_engine(executor, eos_ids=engine.eos_ids).score_options(prompt, options, normalize=normalize) == scores
    for option, score in zip(options, scores or (), strict=True):
        tokens = [*prompt, *option, *([EOS] if known_end else [])]
        history = np.array([[token, 0] for token in tokens])
        total = 0.0
        for position in range(length, len(tokens)):
            logits = executor.logits_of(history[:position]).astype(np.float64)
            total += logits[tokens[position]] - math.log(np.exp(logits).sum())
        expected = total / (len(tokens) - length) if normalize else total
        assert score == pytest.approx(expected, abs=1e-4)
    engine.check_integrity()
    assert engine.pool.available == kv_blocks
    if step_tokens == 512 and kv_blocks == 64:
        assert len(executor.batches) <= 4, "the options run in one step after the prompt's, twice"


def test_prompt_logprobs() -> None:
    executor = FakeExecutor(max_step_tokens=7)
    engine = make_engine(executor)
    prompt = prompt_of(40)
    engine.run_until(engine.submit(ask(prompt, max_tokens=1)))
    request = ask(prompt, max_tokens=4, prompt_logprobs=2, temperature=0.7, seed=3)
    events = engine.run_until(engine.submit(request))
    entries = done_of(events, 2).prompt_logprobs or []
    assert [entry.token_id for entry in entries] == prompt[1:]
    history = np.array([[token, 0] for token in prompt])
    for index, entry in enumerate(entries):
        logits = executor.logits_of(history[: index + 1]).astype(np.float64)
        exact = logits - math.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(exact[prompt[index + 1]], abs=1e-5)
        assert [token for token, _ in entry.top] == list(np.argsort(-exact)[:2])
    assert tokens_of(events, 2) == alone(ask(prompt, max_tokens=4, temperature=0.7, seed=3))[0]


def test_logprobs_of_all_tokens_sum_to_one() -> None:
    executor = FakeExecutor(vocab_size=18)
    engine = make_engine(executor)
    events = engine.run_until(engine.submit(ask([1, 2, 3], max_tokens=3, logprobs=18, ignore_eos=True)))
    entries = [entry for event in events if not isinstance(event, DoneEvent) for entry in event.logprobs or ()]
    assert len(entries) == 3
    for entry in entries:
        assert sum(math.exp(value) for _, value in entry.top) == pytest.approx(1, abs=1e-6)
        assert entry.top[0] == (entry.token_id, entry.logprob)


# ---- sessions -------------------------------------------------------------------------------------------------------


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

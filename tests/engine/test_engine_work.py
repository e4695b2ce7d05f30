"""Work that is not generation: logits of every position, choices, prompt logprobs."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.batch import work_of_new
from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.types import StepBatch
from tests.engine.fakes import (
    EOS,
    FakeExecutor,
    alone,
    ask,
    done_of,
    make_engine,
    prompt_of,
    score_options,
    tokens_of,
)


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
    expected = score_options(make_engine(FakeExecutor(max_step_tokens=24)), prompt, options)  # there is no room for it
    executor.batches.clear()
    assert score_options(engine, prompt, options) == expected
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
    assert score_options(engine, prompt_of(50), options) == pytest.approx(
        score_options(make_engine(FakeExecutor(max_step_tokens=8)), prompt_of(50), options)
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
    assert score_options(make_engine(executor, eos_ids=engine.eos_ids), prompt, options, normalize=normalize) == scores
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


@given(length=st.integers(1, 70), step_tokens=st.sampled_from([1, 5, 512]), normalize=st.booleans())
@settings(max_examples=20, deadline=None)
def test_options_of_one_token_without_an_end_are_read_off_one_row(
    length: int, step_tokens: int, normalize: bool
) -> None:
    prompt, options = prompt_of(length), ((3,), (9,), (4,), (9,))
    executor = FakeExecutor(max_step_tokens=step_tokens)
    engine = make_engine(executor, eos_ids=())
    rid = engine.submit(EngineRequest(prompt, work="choose", options=options, normalize=normalize))
    scores = done_of(engine.run_until(rid), rid).scores or ()
    logits = executor.logits_of(np.array([[token, 0] for token in prompt])).astype(np.float64)
    exact = logits - math.log(np.exp(logits).sum())
    assert scores == pytest.approx([exact[token] for (token,) in options], abs=1e-5)
    assert scores[1] == scores[3]
    assert len(executor.batches) == -(-length // step_tokens)
    assert engine.pool.available == executor.kv_blocks
    work = work_of_new(engine._accept(EngineRequest(prompt, work="choose", options=options)))
    assert (work.prefill, work.width, work.rows) == (length, 1, 1), "it is promised as one sequence and one row"
    engine.check_integrity()


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

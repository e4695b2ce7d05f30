"""Final hidden states and their mean: the same bits in any company and cut, on every executor, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.request import DoneEvent, EngineRequest
from haomiao.errors import DeadlineError, InputError, UnavailableError
from haomiao.types import F32, Executor
from tests.engine.fakes import Clock, FakeExecutor, ask, done_of, make_engine, prompt_of
from tests.engine.tiny import STORED_AS, Shape, Span, blocks_for, make_batch, make_model
from tests.golden.cases import CASES
from tests.golden.checkpoint import tokens_of as golden_tokens
from tests.models.runs import make_artifact, make_executor, relative_error

native_executor = pytest.importorskip("haomiao.engine.executors.native", reason="the native executor is not built")
BY_NAME = {case.name: case for case in CASES}
SHAPES = [Shape(), Shape(hidden=72, heads=3, kv_heads=3, head_dim=24, bias=True), Shape(norm="layer")]


def tokens_of(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 77, n).astype(np.int32)


def states_of(executor: Executor, tokens: Any, point: str, cuts: tuple[int, ...] = (), company: int = 0) -> F32:
    """Final hidden states of every token, computed in pieces that end at `cuts`, each behind `company` others."""
    found = []
    for begin, end in pairwise([0, *sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]):
        spans = [Span(tokens_of(company, 9), 0, blocks_for(company, 30))] if company else []
        spans.append(Span(tokens[begin:end], begin, blocks_for(len(tokens))))
        batch = make_batch(spans, point, rows=[0] if company else [])
        batch.hidden_rows = np.arange(company, batch.tokens, dtype=np.int32)
        result = executor.step(batch)
        assert result.hidden is not None and result.hidden.dtype == np.float32
        found.append(result.hidden.copy())
    return np.concatenate(found)


# ---- executors ------------------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from(
        [Shape(), Shape(hidden=72, heads=3, kv_heads=3, head_dim=24, bias=True), Shape(norm="layer")]
    ),
    point=st.sampled_from(sorted(STORED_AS)),
    threads=st.integers(1, 3),
    length=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 89), max_size=4),
    company=st.sampled_from([0, 1, 40]),
)
@settings(max_examples=40, deadline=None)
def test_hidden_states_do_not_depend_on_company_cuts_or_threads(
    shape: Shape, point: str, threads: int, length: int, cuts: list[int], company: int
) -> None:
    model, tokens = make_model(shape, STORED_AS[point]), tokens_of(length)

    def executor(count: int) -> Executor:
        made: Executor = native_executor.NativeExecutor(
            model.plan, model.tensors, model.vectors, points=(point,), kv_blocks=40, threads=count, pin=False
        )
        return made

    alone = states_of(executor(1), tokens, point)
    assert alone.shape == (length, shape.hidden)
    found = states_of(executor(threads), tokens, point, tuple(cuts), company)
    np.testing.assert_array_equal(found.view(np.uint32), alone.view(np.uint32))


def test_logits_beside_hidden_states_are_those_without() -> None:
    model = make_model(Shape(), "planes")
    executor = native_executor.NativeExecutor(
        model.plan, model.tensors, model.vectors, points=("int8", "int4"), threads=2, pin=False
    )
    batch = make_batch([Span(tokens_of(40), 0, blocks_for(40))], "int4", rows=[7, 39])
    without = executor.step(batch)
    assert without.hidden is None
    logits, argmax = without.logits.copy(), without.argmax
    beside = executor.step(replace(batch, hidden_rows=np.array([0, 7, 38], np.int32)))
    np.testing.assert_array_equal(beside.logits, logits)
    np.testing.assert_array_equal(beside.argmax, argmax)
    greedy = executor.step(replace(batch, hidden_rows=np.array([1], np.int32), greedy=np.array([True, True])))
    np.testing.assert_array_equal(greedy.argmax, argmax)


@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("name", ["llama-odd-bias", "gemma2-caps", "gpt2-odd", "qwen3-head32", "phi3-short"])
def test_executors_agree(name: str, kind: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    tokens = np.array(golden_tokens(case)[:40], np.int32)
    with make_artifact(case, tmp_path) as artifact:
        theirs, ours = (
            make_executor(each, artifact, max_context=case.max_context, kv_type="f32", kv_blocks=40)
            for each in ("reference", kind)
        )
        assert ours.hidden_size == theirs.hidden_size == case.config.get("hidden_size", case.config.get("n_embd"))
        expected = states_of(theirs, tokens, "full")
        assert relative_error(states_of(ours, tokens, "full", (13,)), expected) <= 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama-odd-bias", "gemma3-v5", "gpt2-odd", "qwen2-tied"])
def test_the_mean_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_goldens import transformers_model

    case = BY_NAME[name]
    tokens = golden_tokens(case)[:40]
    with torch.no_grad():
        answer = transformers_model(case)(torch.tensor([tokens]), output_hidden_states=True)
    wanted = answer.hidden_states[-1][0].mean(0).numpy()
    with make_artifact(case, tmp_path) as artifact:
        engine = make_engine(make_executor("native", artifact, kv_type="f32"), max_context=256)  # type: ignore[arg-type]
        found = embedding_of(engine, EngineRequest(tokens, work="embed"))
    assert relative_error(found, wanted) <= 1e-3


@pytest.mark.parametrize("kind", ["reference", "native", "torch"])
@pytest.mark.parametrize(("rows", "why"), [([3], "outside|within"), ([-1], "outside|within"), ([1, 0], "ascend")])
def test_rows_that_are_not_there_are_refused(kind: str, rows: list[int], why: str, tmp_path: Path) -> None:
    with make_artifact(BY_NAME["llama-odd-bias"], tmp_path) as artifact:
        executor = make_executor(kind, artifact, kv_blocks=2)
        batch = make_batch([Span(tokens_of(3), 0, blocks_for(3))], "full", rows=[2])
        with pytest.raises(InputError, match=why):
            executor.step(replace(batch, hidden_rows=np.array(rows, np.int32)))
        if kind == "native":
            with pytest.raises(InputError, match="int32"):
                executor.step(replace(batch, hidden_rows=np.array([0.5])))
        none = executor.step(replace(batch, hidden_rows=np.array([], np.int32)))
        assert none.logits.shape == (1, executor.vocab_size)


# ---- the engine -----------------------------------------------------------------------------------------------------


def run(engine: Any, request: EngineRequest) -> DoneEvent:
    request_id = engine.submit(request)
    return done_of(engine.run_until(request_id), request_id)


def embedding_of(engine: Any, request: EngineRequest) -> F32:
    done = run(engine, request)
    assert done.embedding is not None and done.finish_detail == "done"
    found: F32 = done.embedding
    return found


def mean_of(prompt: list[int], point: int = 0) -> F32:
    """What the fake's hidden states add up to."""
    history = np.array([(token, point) for token in prompt], np.int64)
    total = np.zeros(FakeExecutor.hidden_size)
    for end in range(1, len(prompt) + 1):
        total += FakeExecutor().hidden_of(history[:end])
    mean: F32 = (total / len(prompt)).astype(np.float32)
    return mean


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    company=st.lists(st.integers(1, 60), max_size=3),
    step_tokens=st.integers(4, 64),
    kv_blocks=st.integers(6, 20),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_depends_on_the_tokens_alone(
    lengths: list[int], company: list[int], step_tokens: int, kv_blocks: int
) -> None:
    """Prefills are cut anywhere, stand beside answers, and lose their KV now and then."""
    engine = make_engine(FakeExecutor(max_step_tokens=step_tokens, kv_blocks=kv_blocks))
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    asked = [engine.submit(ask(prompt, work="embed")) for prompt in prompts]
    for seed, length in enumerate(company):
        engine.submit(ask(prompt_of(length, 50 + seed), max_tokens=8))
    events = engine.run_until()
    for request_id, prompt in zip(asked, prompts, strict=True):
        (done,) = (each for each in events if isinstance(each, DoneEvent) and each.request_id == request_id)
        assert done.embedding is not None
        np.testing.assert_array_equal(done.embedding, mean_of(prompt))
        assert done.receipt.prompt_tokens == len(prompt) and done.receipt.completion_tokens == 0
    engine.check_integrity()
    assert engine.pool.available == kv_blocks


def test_the_prefix_cache_is_neither_read_nor_filled() -> None:
    engine = make_engine()
    prompt = prompt_of(70)
    engine.run_until(engine.submit(ask(prompt, max_tokens=2)))
    cached = engine.pool.cached
    done = run(engine, ask(prompt, work="embed"))
    assert done.receipt.cached_tokens == 0
    np.testing.assert_array_equal(done.embedding, mean_of(prompt))
    embedding_of(engine, ask(prompt_of(70, 3), work="embed"))
    assert engine.pool.cached == cached


def test_embeddings_at_a_point_and_in_time() -> None:
    clock = Clock()
    engine = make_engine(FakeExecutor(), clock=clock)
    np.testing.assert_array_equal(embedding_of(engine, ask([5, 6], work="embed", point="int4")), mean_of([5, 6], 1))
    late = engine.submit(ask(prompt_of(60), work="embed", deadline_ns=clock.now + 5, arrival_ns=clock.now))
    clock.now += 10
    done = done_of(engine.run_until(late), late)
    assert isinstance(done.error, DeadlineError) and done.embedding is None
    engine.check_integrity()


def test_an_executor_without_hidden_states() -> None:
    executor = FakeExecutor()
    executor.hidden_size = 0
    engine = make_engine(executor)
    with pytest.raises(UnavailableError, match="no embeddings"):
        engine.submit(ask([1, 2], work="embed"))
    with pytest.raises(InputError, match="work must be one of generate"):
        engine.submit(ask([1, 2], work="dream"))
    assert run(engine, ask([1, 2], max_tokens=1)).error is None

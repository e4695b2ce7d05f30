"""The native executor: agreement with the reference, bits that depend on nothing but the request."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.executors.reference import ReferenceExecutor
from haomiao.errors import InputError, ModelError
from haomiao.kernels.isa import available
from haomiao.types import KV_BLOCK_TOKENS, Executor
from tests.engine.tiny import (
    KV,
    SHAPES,
    STORED_AS,
    Shape,
    Span,
    assert_same_bits,
    blocks_for,
    make_batch,
    make_model,
    native,
    run_alone,
    run_in_company,
    tokens_of,
)

# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", STORED_AS)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_reference(name: str, point: str) -> None:
    model = make_model(SHAPES[name], STORED_AS[point])
    reference = ReferenceExecutor(
        model.plan, model.tensors, model.vectors, points=(point,), kv_type="f32", kv_blocks=8, max_step_tokens=256
    )
    tokens = tokens_of(70)
    expected = run_alone(reference, tokens, point)
    for isa in available():
        executor = native(model, point, kv_type="f32", isa=isa)
        found = run_alone(executor, tokens, point)
        error = np.abs(found - expected)
        # rounding of activations to int8 or bf16 turns a last-bit difference into a step now and then
        assert np.median(error) <= (2e-5 if point == "full" else 0.02), isa
        assert error.max() <= (2e-3 if point == "full" else 0.6), isa
        executor.close()


@pytest.mark.parametrize("name", SHAPES)
def test_instruction_sets_agree_to_the_bit(name: str) -> None:
    model = make_model(SHAPES[name], "planes")
    results = [run_alone(native(model, "int4", isa=isa), tokens_of(50), "int4") for isa in available()]
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("kv", KV)
def test_argmax_is_the_lowest_of_the_greatest(kv: Any) -> None:
    model = make_model(Shape(vocab=1000), "planes")
    executor = native(model, "int8", "int4", kv_type=kv, threads=3)
    for point in ("int8", "int4"):
        result = executor.step(make_batch([Span(tokens_of(40), 0, blocks_for(40))], point))
        np.testing.assert_array_equal(result.argmax, result.logits.argmax(axis=1))
        assert result.elapsed_ns > 0


def test_points_and_weights_of_other_encodings() -> None:
    model = make_model(Shape(), "int8")
    assert np.isfinite(run_alone(native(model, "int8"), tokens_of(9), "int8")).all()
    with pytest.raises(ModelError, match="point 'full' needs float weights"):
        native(model, "full")
    bf16 = make_model(Shape(), "bf16")
    full, rounded = (run_alone(native(bf16, p), tokens_of(9), p) for p in ("full", "bf16"))
    assert 0 < np.abs(full - rounded).max() < 0.5


# ---- bits depend on the request alone -------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(SHAPES)),
    point=st.sampled_from(sorted(STORED_AS)),
    kv=st.sampled_from(KV),
    threads=st.integers(1, 4),
    length=st.integers(1, 150),
    cuts=st.lists(st.integers(1, 149), max_size=6),
    company=st.lists(st.integers(1, 70), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_neither_company_nor_cuts_nor_threads_change_a_bit(
    name: str, point: str, kv: Any, threads: int, length: int, cuts: list[int], company: list[int], seed: int
) -> None:
    model = make_model(SHAPES[name], STORED_AS[point])
    tokens = tokens_of(length, seed)
    with_one = native(model, point, kv_type=kv, threads=1)
    alone = run_alone(with_one, tokens, point)
    executor = native(model, point, kv_type=kv, threads=threads)
    assert_same_bits(run_alone(executor, tokens, point, tuple(cuts), first_block=9), alone)
    others = [tokens_of(n, seed + i + 1) for i, n in enumerate(company)]
    assert_same_bits(run_in_company(executor, tokens, point, cuts, others), alone)


@given(
    point=st.sampled_from(sorted(STORED_AS)),
    active=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_fewer_threads_change_no_bit(point: str, active: list[int], seed: int) -> None:
    """Another number of the threads for every step of a request, greedy rows among them."""
    model = make_model(Shape(), STORED_AS[point])
    tokens = tokens_of(9 * len(active), seed)
    executor = native(model, point, threads=4, crew=False)
    alone = run_alone(native(model, point, threads=1), tokens, point)
    parts = []
    for index, threads in enumerate(active):
        executor._open().active = threads
        span = Span(tokens[9 * index : 9 * index + 9], 9 * index, blocks_for(len(tokens)))
        rows = executor.step(make_batch([span], point))
        parts.append(rows.logits.copy())
        assert (rows.argmax == parts[-1].argmax(axis=1)).all()
        greedy = make_batch([span], point, rows=[8])
        greedy.greedy = np.ones(1, np.bool_)
        assert executor.step(greedy).argmax[0] == rows.argmax[-1]
    assert_same_bits(np.concatenate(parts), alone)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("kv", KV)
def test_a_long_context_divided_over_threads(kv: Any, threads: int) -> None:
    model = make_model(Shape(layers=1, kv_heads=1), "planes")
    tokens = tokens_of(1700)
    blocks = blocks_for(len(tokens))
    results = []
    for n in (1, threads):
        executor = native(model, "int4", kv_type=kv, threads=n)
        for begin in range(0, 1699, 256):
            end = min(begin + 256, 1699)
            executor.step(make_batch([Span(tokens[begin:end], begin, blocks)], "int4", rows=[]))
        results.append(executor.step(make_batch([Span(tokens[1699:], 1699, blocks)], "int4")).logits.copy())
    assert_same_bits(*results)


@given(rows=st.lists(st.integers(0, 39), min_size=0, max_size=40, unique=True))
@settings(max_examples=20, deadline=None)
def test_logit_rows_are_those_asked_for(rows: list[int]) -> None:
    model = make_model(Shape(), "planes")
    executor = native(model, "int8")
    span = Span(tokens_of(40), 0, blocks_for(40))
    whole = executor.step(make_batch([span], "int8")).logits.copy()
    some = executor.step(make_batch([span], "int8", rows=sorted(rows)))
    assert_same_bits(some.logits.copy(), whole[sorted(rows)])
    assert some.argmax.shape == (len(rows),)


def test_points_may_follow_each_other() -> None:
    model = make_model(Shape(), "planes")
    results = []
    for company in (0, 20):
        executor = native(model, "int8", "int4")
        tokens, blocks = tokens_of(30), blocks_for(30)
        for begin, point in ((0, "int8"), (10, "int4"), (20, "int8")):
            spans = [Span(tokens[begin : begin + 10], begin, blocks)]
            if company:
                spans.append(Span(tokens_of(company, 3), 0, blocks_for(company, 8)))
            logits = executor.step(make_batch(spans, point)).logits[:10].copy()
        results.append(logits)
    assert_same_bits(*results)


def test_copied_blocks_hold_the_same() -> None:
    model = make_model(Shape(), "planes")
    executor = native(model, "int4")
    tokens = tokens_of(50)
    expected = run_alone(executor, tokens, "int4")[-1]
    executor.copy_blocks(np.array([[1, 40], [0, 41]], np.int32))
    span = Span(tokens[-1:], 49, np.array([40, 41], np.int32))
    assert_same_bits(executor.step(make_batch([span], "int4")).logits[0].copy(), expected)


@pytest.mark.parametrize("kv", KV)
@given(
    past=st.integers(0, 70),
    new=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    threads=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_sequences_may_branch_off_within_a_step(kv: Any, past: int, new: int, sizes: list[int], threads: int) -> None:
    """K and V of the prompt's last block go into a block of each branch as well: same bits as one after the other."""
    model = make_model(SHAPES[sorted(SHAPES)[0]], "planes")
    executor = native(model, "int4", kv_type=kv, threads=threads)
    prompt, size = tokens_of(past + new), past + new
    branches = [tokens_of(n, 50 + n) for n in sizes]
    whole = [run_alone(native(model, "int4", kv_type=kv), np.concatenate([prompt, each]), "int4") for each in branches]
    blocks = blocks_for(size)
    if past:
        executor.step(make_batch([Span(prompt[:past], 0, blocks)], "int4"))
    spans, free, full = [Span(prompt[past:], past, blocks)], 8, size // KV_BLOCK_TOKENS
    copies: list[tuple[int, int]] = []
    for each in branches:
        own = np.arange(free, free + -(-(size + len(each)) // KV_BLOCK_TOKENS) - full, dtype=np.int32)
        free += len(own)
        if size % KV_BLOCK_TOKENS:
            executor.copy_blocks(np.array([[blocks[-1], own[0]]], np.int32))
            copies += [(i - past, int(own[0])) for i in range(max(past, full * KV_BLOCK_TOKENS), size)]
        spans.append(Span(each, size, np.concatenate([blocks[:full], own])))
    batch = make_batch(spans, "int4")
    batch.copies = np.array(sorted(copies), np.int32).reshape(-1, 2)
    found, at = executor.step(batch).logits, new
    assert_same_bits(found[:new], whole[0][past:size])
    for each, expected in zip(branches, whole, strict=True):
        assert_same_bits(found[at : at + len(each)], expected[size:])
        at += len(each)


# ---- life -----------------------------------------------------------------------------------------------------------


def test_it_is_an_executor_and_closes() -> None:
    executor = native(make_model(Shape(), "planes"), "int8", "int4", kv_type="int8")
    assert isinstance(executor, Executor)
    assert executor.kv_bytes_per_block == 2 * 2 * (2 * 32 * 32 + 256)
    executor.close()
    executor.close()
    with pytest.raises(InputError, match="closed"):
        executor.step(make_batch([Span(tokens_of(3), 0, blocks_for(3))], "int4"))


def test_weights_stay_alive() -> None:
    model = make_model(Shape(), "planes")
    executor = native(model, "int4")
    expected = run_alone(executor, tokens_of(20), "int4")
    model.tensors.clear()
    model.vectors.clear()
    np.zeros(1 << 20)
    assert_same_bits(run_alone(executor, tokens_of(20), "int4"), expected)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_the_calling_thread_is_free_again() -> None:
    before = os.sched_getaffinity(0)
    executor = native(make_model(Shape(), "planes"), "int4", pin=True)
    run_alone(executor, tokens_of(5), "int4")
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    executor = native(make_model(Shape(), "planes"), "int4", threads=3)
    expected = run_alone(executor, tokens_of(20), "int4")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if (run_alone(executor, tokens_of(20), "int4") == expected).all() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same_bits(run_alone(executor, tokens_of(20), "int4"), expected)


def test_two_threads_at_once_are_told_apart() -> None:
    executor = native(make_model(Shape(layers=3), "planes"), "int4")
    batch = make_batch([Span(tokens_of(200), 0, blocks_for(200))], "int4", rows=[199])
    expected = executor.step(batch).logits.copy()
    seen: list[str] = []

    def work() -> None:
        for _ in range(30):
            try:
                executor.step(batch)
            except InputError as error:
                seen.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another thread" in message for message in seen)
    assert_same_bits(executor.step(batch).logits.copy(), expected)


def test_the_profile_names_the_phases() -> None:
    executor = native(make_model(Shape(), "planes"), "int4")
    executor.profile(True)
    run_alone(executor, tokens_of(5), "int4")
    profile = executor.last_step_profile()
    assert [name for name, _ in profile] == [
        "embed",
        "0.qkv",
        "attention.0",
        "0.out",
        "0.gate_up",
        "0.down",
        "1.qkv",
        "attention.1",
        "1.out",
        "1.gate_up",
        "1.down",
        "head",
    ]
    assert all(ns > 0 for _, ns in profile)

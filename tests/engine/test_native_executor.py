"""The native executor: agreement with the reference, bits that depend on nothing but the request, hostile batches."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.engine.executors.native import NativeExecutor
from haomiao.engine.executors.reference import ReferenceExecutor
from haomiao.errors import InputError, ModelError, UnavailableError, UnsupportedModelError
from haomiao.kernels import pack
from haomiao.kernels.isa import available
from haomiao.models import plan as ops
from haomiao.types import KV_BLOCK_TOKENS, Executor
from tests.engine.tiny import (
    STORED_AS,
    Model,
    Shape,
    Span,
    Storage,
    blocks_for,
    make_batch,
    make_model,
    run_alone,
)

KV = ("f32", "bf16", "int8")
SHAPES = {
    "llama": Shape(),
    "qwen3": Shape(qk_norm=True, heads=6, kv_heads=2, head_dim=16),
    "gemma": Shape(post_norm=True, softcap=6.0, window=40, head_dim=64, heads=2, kv_heads=1),
    "gpt2": Shape(norm="layer", bias=True, glu=False, rope=False, positions=True, kv_heads=4, neurons=80),
    "odd": Shape(hidden=72, heads=3, kv_heads=3, head_dim=24, vocab=77, bias=True),
}


def native(model: Model, *points: str, **options: Any) -> NativeExecutor:
    settings: dict[str, Any] = {"kv_blocks": 64, "max_step_tokens": 256, "threads": 2, "pin": False, **options}
    return NativeExecutor(model.plan, model.tensors, model.vectors, points=points, **settings)


def tokens_of(n: int, seed: int = 0, vocab: int = 77) -> Any:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def assert_same_bits(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


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
    # the same request a chunk at a time, each chunk between chunks of others
    others = [(tokens_of(n, seed + i + 1), blocks_for(n, 20 + 4 * i)) for i, n in enumerate(company)]
    edges = [0, *sorted({c for c in cuts if 0 < c < length}), length]
    parts = []
    for step, (begin, end) in enumerate(pairwise(edges)):
        spans, place = [], 0
        for i, (theirs, blocks) in enumerate(others):
            first, last = len(theirs) * step // (len(edges) - 1), len(theirs) * (step + 1) // (len(edges) - 1)
            if first < last and sum(len(s.tokens) for s in spans) + last - first + end - begin <= 256:
                spans.append(Span(theirs[first:last], first, blocks))
                place += 1 if i % 2 == 0 else 0
        place = min(place, len(spans))
        spans.insert(place, Span(tokens[begin:end], begin, blocks_for(length)))
        start = sum(len(s.tokens) for s in spans[:place])
        result = executor.step(make_batch(spans, point))
        parts.append(result.logits[start : start + end - begin].copy())
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


# ---- what cannot be -------------------------------------------------------------------------------------------------

I32_EDGES = st.one_of(st.integers(-3, 12), st.sampled_from([-(2**31), 2**31 - 1, 2**30, 100, 76, 77]))


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


@given(
    token_ids=st.lists(st.integers(-1, 101), min_size=0, max_size=12),
    span_starts=st.lists(I32_EDGES, min_size=0, max_size=5),
    past=st.lists(I32_EDGES, min_size=0, max_size=4),
    tables=st.lists(I32_EDGES, min_size=0, max_size=8),
    rows=st.lists(I32_EDGES, min_size=0, max_size=4),
    copies=st.lists(st.tuples(I32_EDGES, I32_EDGES), max_size=3),
    columns=st.integers(1, 4),
    honest=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_hostile_batches_are_refused_in_one_line(
    token_ids: list[int],
    span_starts: list[int],
    past: list[int],
    tables: list[int],
    rows: list[int],
    copies: list[tuple[int, int]],
    columns: int,
    honest: bool,
) -> None:
    batch = make_batch([Span(tokens_of(6), 0, blocks_for(6))], "int4")
    table = np.array(tables[: len(tables) // columns * columns], np.int32).reshape(-1, columns)
    hostile = replace(batch, past=np.array(past, np.int32), block_tables=table, logit_rows=np.array(rows, np.int32))
    if not honest:
        ids, starts = np.array(token_ids, np.int32), np.array(span_starts, np.int32)
        hostile = replace(hostile, token_ids=ids, span_starts=starts)
    hostile.copies = np.array(copies, np.int32).reshape(-1, 2)
    try:
        result = HOSTILE.step(hostile)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert result.logits.shape == (len(rows), HOSTILE.vocab_size)
    assert_same_bits(HOSTILE.step(batch).logits.copy(), HOSTILE_EXPECTED)


HOSTILE = native(make_model(Shape(), "planes"), "int4", kv_blocks=8, max_step_tokens=10)
HOSTILE_EXPECTED = HOSTILE.step(make_batch([Span(tokens_of(6), 0, blocks_for(6))], "int4")).logits.copy()


def bad(batch: Any, **changes: Any) -> Any:
    return replace(batch, **{k: np.array(v, np.int32) if isinstance(v, list) else v for k, v in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 2, 100]}, "token id 100 is outside the vocabulary of 100"),
        ({"token_ids": [1, -2, 3]}, "token id -2"),
        ({"token_ids": []}, "a step of 0 tokens"),
        ({"token_ids": [1] * 300}, "a step of 300 tokens; 1 to 256"),
        ({"span_starts": [0, 2]}, "span_starts must begin at 0 and end"),
        ({"span_starts": [0, 3, 3], "past": [0, 0], "block_tables": [[0], [1]]}, "span_starts must ascend"),
        ({"past": [-1]}, "negative past"),
        ({"past": [4095]}, "the context holds 4096"),
        ({"past": [30]}, "needs 2 KV blocks"),
        ({"block_tables": [[64]]}, "KV block 64; there are 64"),
        ({"block_tables": [[-1]]}, "KV block -1"),
        ({"logit_rows": [3]}, "a logit row is outside"),
        ({"logit_rows": [1, 1]}, "logit_rows must ascend"),
        ({"point": "int8"}, "point 'int8' is not one of int4"),
        (
            {"span_starts": [0, 1, 3], "past": [0, 0], "block_tables": [[5], [5]]},
            "two tokens of the step write the same place",
        ),
        ({"copies": [[3, 9]]}, "a copy is of a token outside the step"),
        ({"copies": [[-1, 9]]}, "a copy is of a token outside the step"),
        ({"copies": [[1, 9], [0, 9]]}, "copies must ascend"),
        ({"copies": [[0, 64]]}, "a copy names KV block 64; there are 64"),
        ({"copies": [[0, 0]]}, "two tokens of the step write the same place"),
        ({"copies": [[0, 1, 2]]}, "copies must be"),
        ({"token_ids": np.array([1, 2, 3], np.int64)}, "token_ids must be an int32 array"),
        ({"block_tables": np.zeros(3, np.int32)}, "block_tables must be an int32 array of 2"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], message: str) -> None:
    executor = native(make_model(Shape(), "planes"), "int4")
    batch = make_batch([Span(tokens_of(3), 0, blocks_for(3))], "int4")
    with pytest.raises(InputError, match=message):
        executor.step(bad(batch, **changes))


def test_copy_blocks_refuses_what_is_not_there() -> None:
    executor = native(make_model(Shape(), "planes"), "int4")
    for pairs in ([[0, 64]], [[-1, 0]]):
        with pytest.raises(InputError, match="does not exist"):
            executor.copy_blocks(np.array(pairs, np.int32))
    with pytest.raises(InputError):
        executor.copy_blocks(np.zeros((1, 3), np.int32))


def with_op(model: Model, index: int, op: Any) -> Model:
    changed = list(model.plan.ops)
    changed[index] = op
    return replace(model, plan=replace(model.plan, ops=tuple(changed)))


def test_plans_that_contradict_themselves_are_refused() -> None:
    class RoutedLinear:
        pass

    model = make_model(Shape(layers=1), "planes")
    plan = model.plan
    attention = next(op for op in plan.ops if isinstance(op, ops.Attention))
    at = plan.ops.index(attention)
    with pytest.raises(UnsupportedModelError, match="RoutedLinear"):
        native(with_op(model, 1, RoutedLinear()), "int4")
    with pytest.raises(UnsupportedModelError, match="version 2"):
        native(replace(model, plan=replace(plan, version=2)), "int4")
    with pytest.raises(UnsupportedModelError, match="sinks"):
        native(with_op(model, at, replace(attention, sinks="s")), "int4")
    cases: list[tuple[Model, str]] = [
        (with_op(model, at, replace(attention, layer=1)), "no layer 1"),
        (with_op(model, at, replace(attention, kv_heads=1)), "contradicts the plan's layer"),
        (with_op(model, at, replace(attention, v_offset=10**9)), "outside buffer 'qkv'"),
        (with_op(model, at, replace(attention, scale=float("nan"))), "scale must be finite"),
        (with_op(model, 1, ops.Norm("h", "nowhere", "final", 1e-5)), "no buffer 'nowhere'"),
        (with_op(model, 1, ops.Norm("h", "ffn", "final", 1e-5)), "read before anything is in it"),
        (with_op(model, 1, ops.Norm("h", "x", "0.q", 1e-5)), "no vector '0.q'"),
        (with_op(model, 2, ops.Linear("qkv", "x", "0.out")), r"matrix '0.out' is \[64, 128\]"),
        (with_op(model, 0, ops.Embed("x", "0.down")), "embedding '0.down'"),
        (with_op(model, 3, ops.Rope("qkv", 0, 4, 32, 1)), "no such rope"),
        (replace(model, plan=replace(plan, ops=plan.ops[:-1])), "does not end with a head"),
        (replace(model, plan=replace(plan, ops=(*plan.ops, plan.ops[0]))), "follows the head"),
        (replace(model, plan=replace(plan, ops=())), "does not end with a head"),
        (replace(model, plan=replace(plan, buffers={**plan.buffers, "x": 2**40})), "width"),
        (replace(model, plan=replace(plan, windows=(0, 0))), "each of its layers"),
        (replace(model, tensors={}), "no weight 'embed'"),
        (replace(model, vectors={**model.vectors, "final": np.zeros(3, np.float32)}), "vector 'final'"),
    ]
    for broken, message in cases:
        with pytest.raises(ModelError, match=message):
            native(broken, "int4")


def test_options_are_checked() -> None:
    model = make_model(Shape(layers=1), "planes")
    with pytest.raises(InputError, match="point must be one of"):
        native(model, "int3")
    with pytest.raises(InputError, match="one family"):
        native(model, "int4", "full")
    with pytest.raises(InputError, match="threads"):
        native(model, "int4", threads=0)
    with pytest.raises(UnavailableError, match="isa"):
        native(model, "int4", isa="avx9000")
    for options in ({"kv_blocks": 0}, {"max_step_tokens": 0}, {"kv_blocks": 2**40}, {"kv_type": "fp8"}):
        with pytest.raises(ModelError):
            native(model, "int4", **options)


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


# ---- the screened head ----------------------------------------------------------------------------------------------


def near_ties(model: Model, rng: np.random.Generator, equal: float) -> None:
    """A head whose rows are copies of a few: equal, or different in the lo plane only, or in one code of it."""
    head = model.tensors["head"] = model.tensors["embed"]
    rows = rng.integers(0, 3, head.rows)
    hi, scales = pack.unpack_codes(head, "hi")
    both, _ = pack.unpack_codes(head, "hi+lo")
    lo = both - hi.astype(np.int32) * 16
    hi, lo, scales = hi[rows], lo[rows], scales[rows]
    for row in np.flatnonzero(rng.random(head.rows) > equal):
        changed = rng.integers(0, head.cols, 1 if rng.random() < 0.5 else head.cols)
        lo[row, changed] = rng.integers(-8, 8, changed.size)
    model.tensors["head"] = pack.pack_planes(hi, lo, scales, head.group, 4)


def to_bytes(model: Model) -> None:
    """The head's codes, cut to a byte, with the scales of one-byte codes."""
    head = model.tensors["head"]
    codes, _ = pack.unpack_codes(head, "hi+lo")
    scales = pack.unpack_codes(head, "hi")[1]
    model.tensors["head"] = pack.pack_int8(np.clip(codes, -128, 127), (scales / 16).astype(np.float16), head.group)


def with_head(seed: int, equal: float, scale: float, vocab: int = 700, storage: str = "planes") -> Model:
    model = make_model(Shape(layers=1, vocab=vocab), "planes", seed)
    near_ties(model, np.random.default_rng(seed), equal)
    if storage == "int8":
        to_bytes(model)
    weights = {**model.plan.weights, "head": ops.WeightSpec("head", "matrix", vocab, 64, ("head",))}
    body = (*model.plan.ops[:-1], ops.Head("h", "head", None, scale, 0.0))
    return replace(model, plan=replace(model.plan, weights=weights, ops=body))


@given(
    seed=st.integers(0, 2**31),
    equal=st.sampled_from([0.0, 0.5, 0.95]),
    scale=st.sampled_from([1.0, 0.3, 2.0**-40, 1e-30, -1.0]),
    threads=st.integers(1, 4),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=8, unique=True),
    point=st.sampled_from(["int8", "int4"]),
    storage=st.sampled_from(["planes", "int8"]),
)
@settings(max_examples=80, deadline=None)
def test_screening_finds_the_argmax_of_the_full_head(
    seed: int, equal: float, scale: float, threads: int, rows: list[int], point: str, storage: str
) -> None:
    model = with_head(seed, equal, scale, storage=storage)
    span = Span(tokens_of(40, seed % 100), 0, blocks_for(40))
    batch = make_batch([span], point, rows=sorted(rows))
    for isa in available():
        executor = native(model, "int8", "int4", threads=threads, isa=isa)
        whole = executor.step(batch)
        assert executor.last_step_rescored() is None
        expected = whole.argmax.copy()
        np.testing.assert_array_equal(expected, whole.logits.argmax(axis=1))
        screened = executor.step(replace(batch, greedy=np.ones(len(rows), np.bool_)))
        np.testing.assert_array_equal(screened.argmax, expected)
        share = executor.last_step_rescored()
        assert share is None if scale < 1e-20 else share is not None and 0 < share <= 1
        executor.close()


@pytest.mark.parametrize("storage", ["planes", "int8"])
def test_screening_reads_little_where_one_token_stands_out(storage: str) -> None:
    model = with_head(3, 1.0, 1.0, vocab=4000)
    head = model.tensors["head"]
    hi, lo = pack.split_codes(pack.unpack_codes(head, "hi+lo")[0], 4)
    loud = np.where(np.arange(head.rows) // 32 == 70, 1.0, 0.05)[:, None]
    scales = (np.abs(pack.unpack_codes(head, "hi")[1]) * loud).astype(np.float16)
    model.tensors["head"] = pack.pack_planes(hi, lo, scales, head.group, 4)
    if storage == "int8":
        to_bytes(model)
    executor = native(model, "int4", threads=2)
    executor.step(make_batch([Span(tokens_of(20), 0, blocks_for(21))], "int4", rows=[]))
    shares = []
    for token in range(30):
        batch = make_batch([Span(np.array([token], np.int32), 20, blocks_for(21))], "int4")
        expected = executor.step(batch).argmax.copy()
        found = executor.step(replace(batch, greedy=np.ones(1, np.bool_)))
        np.testing.assert_array_equal(found.argmax, expected)
        shares.append(executor.last_step_rescored())
    assert min(share for share in shares if share is not None) <= 0.05


def test_screening_rests_where_it_leaves_too_much() -> None:
    model = with_head(5, 0.0, 1.0)
    executor = native(model, "int8")
    batch = make_batch([Span(tokens_of(9), 0, blocks_for(9))], "int8", rows=[8])
    batch = replace(batch, greedy=np.ones(1, np.bool_))
    tried = []
    for _ in range(12):
        executor.step(batch)
        tried.append(executor.last_step_rescored() is not None)
    assert tried[0] and sum(tried) <= 4


def test_rows_that_are_wanted_whole_keep_the_others_whole() -> None:
    model = with_head(1, 0.5, 1.0)
    executor = native(model, "int8")
    batch = make_batch([Span(tokens_of(9), 0, blocks_for(9))], "int8", rows=[3, 8])
    whole = executor.step(batch).logits.copy()
    mixed = executor.step(replace(batch, greedy=np.array([True, False])))
    assert executor.last_step_rescored() is None
    assert_same_bits(mixed.logits[1].copy(), whole[1])
    for wrong in (np.ones(3, np.bool_), np.ones(2, np.int32), np.ones((2, 1), np.bool_)):
        with pytest.raises(InputError, match="greedy"):
            executor.step(replace(batch, greedy=wrong))


@pytest.mark.parametrize(("storage", "softcap"), [("f32", 0.0), ("int8", 20.0)])
def test_heads_that_cannot_be_screened_are_computed_whole(storage: Storage, softcap: float) -> None:
    model = make_model(Shape(softcap=softcap), storage)
    executor = native(model, "int8" if storage == "int8" else "full")
    batch = make_batch([Span(tokens_of(9), 0, blocks_for(9))], executor.points[0], rows=[8])
    expected = executor.step(batch)
    greedy = executor.step(replace(batch, greedy=np.ones(1, np.bool_)))
    np.testing.assert_array_equal(greedy.argmax, expected.argmax)
    assert executor.last_step_rescored() is None

"""The screened head: the argmax of the full head, from little reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.kernels import pack
from haomiao.kernels.isa import available
from haomiao.models import plan as ops
from tests.engine.tiny import (
    Model,
    Shape,
    Span,
    Storage,
    assert_same_bits,
    blocks_for,
    make_batch,
    make_model,
    native,
    tokens_of,
)


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

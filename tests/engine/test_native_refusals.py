"""What the native executor refuses: hostile batches, plans and options that contradict themselves, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError, ModelError, UnavailableError, UnsupportedModelError
from haomiao.models import plan as ops
from tests.engine.tiny import (
    Model,
    Shape,
    Span,
    assert_same_bits,
    blocks_for,
    make_batch,
    make_model,
    native,
    tokens_of,
)

I32_EDGES = st.one_of(st.integers(-3, 12), st.sampled_from([-(2**31), 2**31 - 1, 2**30, 100, 76, 77]))


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

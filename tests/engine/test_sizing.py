"""The size of the KV pool: what fits is taken, what does not is refused with what to change."""

from __future__ import annotations

import pytest

from haomiao.engine import sizing
from haomiao.engine.sizing import available_memory, kv_bytes_per_block, size_pool
from haomiao.errors import InputError
from haomiao.models.plan import PLAN_VERSION, Plan

PLAN = Plan(
    version=PLAN_VERSION, family="test", vocab_size=100, hidden_size=64, layers=2, kv_heads=(2, 2), head_dims=(64, 64),
    windows=(0, 0), max_context=4096, buffers={}, ops=(), weights={},
)  # fmt: skip
BLOCK = 32 * 2 * 2 * 2 * 64 * 2  # tokens, layers, K and V, heads, head_dim, bytes of bf16


def test_bytes_of_a_block() -> None:
    assert kv_bytes_per_block(PLAN, "bf16") == BLOCK
    assert kv_bytes_per_block(PLAN, "f32") == 2 * BLOCK
    assert kv_bytes_per_block(PLAN, "int8") == BLOCK // 2 + 32 * 2 * 2 * 8


def test_room_for_a_few_whole_sequences_by_default() -> None:
    size = size_pool(PLAN, "bf16", max_context=None, kv_memory=1 << 30)
    assert size.max_context == 4096 and size.blocks == 8 * 128
    assert size_pool(PLAN, "bf16", max_context=64, kv_memory=1 << 30).blocks == 256


def test_a_context_that_was_not_asked_for_shrinks_to_what_fits() -> None:
    size = size_pool(PLAN, "bf16", max_context=None, kv_memory=40 * BLOCK)
    assert size.blocks == 40 and size.max_context == 40 * 32


def test_a_context_that_was_asked_for_raises_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 200 * BLOCK)
    assert size_pool(PLAN, "bf16", max_context=None, kv_memory=None).blocks == 50
    assert size_pool(PLAN, "bf16", max_context=4096, kv_memory=None).blocks == 128
    monkeypatch.setattr(sizing, "available_memory", lambda: 100 * BLOCK)
    with pytest.raises(InputError, match="4096 tokens take 4 MiB as bf16 and 4 MiB are allowed: raise kv_memory"):
        size_pool(PLAN, "bf16", max_context=4096, kv_memory=None)


@pytest.mark.parametrize(
    ("context", "memory", "param"),
    [(0, None, "max_context"), (4097, None, "max_context"), (True, None, "max_context"), ("9", None, "max_context"),
     (None, 0, "kv_memory"), (None, -1, "kv_memory"), (None, 1.5, "kv_memory"), (None, BLOCK - 1, "kv_memory"),
     (4096, 9 * BLOCK, "kv_memory")],
)  # fmt: skip
def test_what_cannot_be_is_named(context: object, memory: object, param: str) -> None:
    with pytest.raises(InputError) as caught:
        size_pool(PLAN, "bf16", max_context=context, kv_memory=memory)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_available_memory_is_some_of_the_machines() -> None:
    assert 16 << 20 < available_memory() < 1 << 50

"""The compiled attention kernels against their numpy twin; the same bits however the work is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao import _core
from haomiao.kernels import reference_attention as twin
from haomiao.kernels.isa import available
from haomiao.types import F32

KV = ("f32", "bf16", "int8")
HEAD_DIMS = (8, 32, 64, 80, 96, 128, 256)


def attend(
    isa: str,
    kv: str,
    q: F32,
    k: F32,
    v: F32,
    window: int = 0,
    softcap: float = 0.0,
    tokens_per_call: int = 1 << 20,
    splits_per_call: int = 0,
) -> F32:
    out = np.full_like(q, np.nan)
    scale = k.shape[1] ** -0.5
    _core.attend(isa, kv, q, k, v, scale, window, softcap, tokens_per_call, splits_per_call, out)
    return out


def make(seed: int, tokens: int, keys: int, heads: int, dim: int) -> tuple[F32, F32, F32]:
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.uniform(-1, 1)
    return (
        rng.normal(0, spread, (tokens, heads * dim)).astype(np.float32),
        rng.normal(size=(keys, dim)).astype(np.float32),
        rng.normal(size=(keys, dim)).astype(np.float32),
    )


def exact(kv: Any, q: F32, k: F32, v: F32, window: int = 0, softcap: float = 0.0) -> F32:
    dim = k.shape[1]
    heads = q.reshape(q.shape[0], -1, dim)
    y = twin.attend(heads, k[:, None], v[:, None], scale=dim**-0.5, window=window, softcap=softcap, kv=kv)
    return y.reshape(q.shape)


@given(
    seed=st.integers(0, 2**31),
    kv=st.sampled_from(KV),
    dim=st.sampled_from(HEAD_DIMS),
    heads=st.integers(1, 9),
    keys=st.integers(1, 200),
    window=st.one_of(st.just(0), st.integers(1, 220)),
    softcap=st.sampled_from([0.0, 5.0]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_against_the_twin_on_every_isa(
    seed: int, kv: str, dim: int, heads: int, keys: int, window: int, softcap: float, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, min(keys, 40)))
    q, k, v = make(seed, tokens, keys, heads, dim)
    expected = exact(kv, q, k, v, window, softcap)
    best: F32 | None = None
    for isa in available():
        result = attend(isa, kv, q, k, v, window, softcap)
        assert np.abs(result - expected).max() <= (1e-3 if kv == "int8" else 3e-5), isa
        best = result if best is None else best
        np.testing.assert_array_equal(result.view(np.uint32), best.view(np.uint32), err_msg=isa)


@given(
    seed=st.integers(0, 2**31),
    kv=st.sampled_from(KV),
    dim=st.sampled_from([8, 64, 80]),
    heads=st.integers(1, 12),
    keys=st.integers(1, 1400),
    window=st.sampled_from([0, 1, 33, 600]),
    cut=st.integers(1, 50),
    splits=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_cut_does_not_change_a_bit(
    seed: int, kv: str, dim: int, heads: int, keys: int, window: int, cut: int, splits: int, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, min(keys, 60)))
    q, k, v = make(seed, tokens, keys, heads, dim)
    isa = available()[0]
    whole = attend(isa, kv, q, k, v, window)
    parts = attend(isa, kv, q, k, v, window, tokens_per_call=cut, splits_per_call=splits)
    np.testing.assert_array_equal(parts.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("kv", KV)
def test_error_over_a_long_context(kv: str) -> None:
    q, k, v = make(7, 3, 5000, 4, 64)
    error = np.abs(attend(available()[0], kv, q, k, v) - exact(kv, q, k, v))
    assert np.median(error) <= (2e-5 if kv == "int8" else 3e-7)
    assert error.max() <= (2e-4 if kv == "int8" else 1e-5)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_codes_of_16_bits_add_nothing_to_the_error_of_8_bits(spread: float, dim: int) -> None:
    rng = np.random.default_rng(dim)
    q = (rng.normal(size=(8, 4 * dim)) * spread).astype(np.float32)
    k, v = (rng.normal(size=(1500, dim)).astype(np.float32) for _ in range(2))
    true, rounded = exact("f32", q, k, v), exact("int8", q, k, v)
    found = attend(available()[0], "int8", q, k, v)
    stored = np.sqrt(np.mean((rounded - true) ** 2))
    assert np.sqrt(np.mean((found - true) ** 2)) <= 1.005 * stored
    assert np.sqrt(np.mean((found - rounded) ** 2)) <= 0.1 * stored


@pytest.mark.parametrize("kv", KV)
def test_nan_in_a_later_key_is_not_seen(kv: str) -> None:
    q, k, v = make(3, 20, 70, 2, 64)
    clean = attend(available()[0], kv, q, k, v)
    k[-1], v[-1] = np.nan, np.nan
    dirty = attend(available()[0], kv, q, k, v)
    np.testing.assert_array_equal(clean[:-1].view(np.uint32), dirty[:-1].view(np.uint32))
    assert np.isnan(dirty[-1]).all()

"""The compiled rowwise kernels against their numpy twin, and against each other to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao import _core
from haomiao.kernels import reference_rowwise as twin
from haomiao.kernels.isa import available
from haomiao.types import F32

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu")
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 896, 1000]))


def on_every_isa(run: Callable[[str], F32]) -> F32:
    """The result of the best instruction set, after checking that the others give the same bits."""
    results = {isa: run(isa) for isa in available()}
    best = next(iter(results.values()))
    for isa, result in results.items():
        np.testing.assert_array_equal(result.view(np.uint32), best.view(np.uint32), err_msg=isa)
    return best


def ulps(value: F32, exact: Any) -> Any:
    """Distance in units of the last place of the exact value (of the least normal number below it)."""
    spacing = np.spacing(np.maximum(np.abs(exact).astype(np.float32), np.float32(2.0**-126)))
    return np.abs(value.astype(np.float64) - exact) / spacing


@given(SIZES, st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_norm(n: int, seed: int, rms: bool, with_bias: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal() * 3, 10.0 ** rng.uniform(-3, 3), n).astype(np.float32)
    weight, bias = rng.normal(1, 0.3, n).astype(np.float32), rng.normal(size=n).astype(np.float32)

    def run(isa: str) -> F32:
        out = np.empty(n, np.float32)
        _core.norm(isa, x, weight, bias if with_bias else None, 1e-5, rms, out)
        return out

    result = on_every_isa(run)
    exact = twin.rms_norm(x, weight, 1e-5) if rms else twin.layer_norm(x, weight, bias if with_bias else None, 1e-5)
    # what the mean takes away cannot be had back: its size over the deviation's multiplies the error
    lost = 1.0 if rms else 1 + abs(float(x.mean())) / float(np.sqrt(x.var() + 1e-5))
    assert np.abs(result - exact).max() <= 2e-6 * lost * max(1.0, float(np.abs(exact).max()))


@given(st.integers(1, 5), st.sampled_from([8, 32, 64, 80, 96, 128, 256]), st.data())
@settings(max_examples=50, deadline=None)
def test_rope(heads: int, head_dim: int, data: st.DataObject) -> None:
    dim = 2 * data.draw(st.integers(1, head_dim // 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    x = rng.normal(size=(heads, head_dim)).astype(np.float32)
    cosines, sines = twin.rope_table(np.array([rng.integers(0, 2**31)]), rng.uniform(0, 1, dim // 2), 1.1)

    def run(isa: str) -> F32:
        out = x.copy()
        _core.rope(isa, out, dim, np.concatenate([cosines[0], sines[0]]))
        return out

    np.testing.assert_allclose(on_every_isa(run), twin.rope(x, cosines[0], sines[0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_are_accurate(function: Any) -> None:
    near, far = np.linspace(-12, 12, 60_001), np.geomspace(1e-30, 80, 20_000)
    x = np.concatenate([near, far, -far, [0.0, 88.0, -87.0, 3e38]]).astype(np.float32)

    def run(isa: str) -> F32:
        out = np.empty_like(x)
        _core.activate(isa, x, function, out)
        return out

    exact = twin.activate(x, function)
    result = on_every_isa(run)
    error = ulps(result, exact)
    # in the negative tail the argument of exp is itself rounded: a relative error of |argument| half-ulps
    tail = (x < -1) & (function != "relu")
    assert error[~tail].max() <= 6
    assert np.median(error) <= 0.75
    relative = np.abs(result - exact)[tail] / np.maximum(np.abs(exact[tail]), 1e-30)
    assert relative.max(initial=0.0) <= 5e-5


@given(SIZES, st.integers(0, 2**31), st.sampled_from(FUNCTIONS))
@settings(max_examples=60, deadline=None)
def test_glu_and_add(n: int, seed: int, function: Any) -> None:
    rng = np.random.default_rng(seed)
    gate, up = rng.normal(0, 4, n).astype(np.float32), rng.normal(size=n).astype(np.float32)

    def run(isa: str) -> F32:
        out, total = np.empty(n, np.float32), up.copy()
        _core.glu(isa, gate, up, function, out)
        _core.add(isa, total, gate)
        return np.stack([out, total])

    out, total = on_every_isa(run)
    np.testing.assert_allclose(out, twin.glu(gate, up, function), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(total, gate + up)


@given(SIZES, st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 30.0, 50.0]))
@settings(max_examples=60, deadline=None)
def test_scale_softcap(n: int, seed: int, softcap: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=n) * 10.0 ** rng.uniform(-4, 3, n)).astype(np.float32)

    def run(isa: str) -> F32:
        out = x.copy()
        _core.scale_softcap(isa, out, 0.25, softcap)
        return out

    exact = twin.scale_softcap(x, 0.25, softcap).astype(np.float64)
    assert ulps(on_every_isa(run), exact).max() <= 5


@given(
    st.lists(
        st.one_of(st.floats(-3, 3, width=32), st.sampled_from([float("nan"), float("-inf"), float("inf"), 7.0])),
        min_size=1,
        max_size=70,
    ),
    st.integers(0, 1500),
)
@settings(max_examples=150, deadline=None)
def test_argmax(values: list[float], before: int) -> None:
    x = np.concatenate([np.full(before, -5, np.float32), np.array(values, np.float32)])
    for isa in available():
        assert _core.argmax(isa, x) == twin.argmax(x), isa


def test_argmax_without_numbers() -> None:
    for isa in available():
        assert _core.argmax(isa, np.full(40, np.nan, np.float32)) == 0
        x = np.full(1100, np.nan, np.float32)
        x[1024] = -np.inf
        assert _core.argmax(isa, x) == 1024

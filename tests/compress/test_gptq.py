"""GPTQ against an independent implementation, against rounding to nearest, and its second plane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.compress.quantize.gptq import ORDERS, column_order, gptq, static_scales
from haomiao.compress.quantize.grid import code_range, fit_scales, nearest
from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import unpack
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from tests.compress.straightforward import error_of, problem, rounding, surgeon


@given(st.integers(1, 40), st.sampled_from([32, 64, 96, 100]), st.sampled_from([3, 4, 8]), st.integers(0, 99))
@settings(max_examples=12)
def test_it_is_gptq_written_out(rows: int, cols: int, bits: int, seed: int) -> None:
    weights, hessian = problem(rows, cols, seed)
    found = gptq(weights, hessian, bits=bits, group=32, order="static", lo=False)
    energy = np.diagonal(hessian)
    scales = static_scales(weights, energy, bits, 32)
    assert np.array_equal(found.scales, scales)
    order = np.argsort(-energy, kind="stable")
    expected = surgeon(weights, hessian, found.damping, order, rounding(scales, 32, *code_range(bits)))
    got = found.weights(32)
    assert np.isclose(got, expected, atol=1e-5).mean() > 0.98
    errors = [error_of(weights - q, hessian).sum() for q in (got.astype(np.float64), expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_reported_errors_are_the_layers(order: Any, group: int) -> None:
    weights, hessian = problem(48, 160, 5)
    found = gptq(weights, hessian, group=group, order=order)
    packed = found.packed(4, group)
    hi, both = unpack(packed, "hi"), unpack(packed)
    np.testing.assert_allclose(hi, found.weights(group), rtol=1e-6)
    assert found.error == pytest.approx(error_of(weights - hi.astype(np.float64), hessian).sum(), rel=1e-3)
    assert found.lo_error == pytest.approx(error_of(weights - both.astype(np.float64), hessian).sum(), rel=1e-2)


@pytest.mark.parametrize("order", ORDERS)
def test_it_beats_rounding_to_nearest_and_the_second_plane_beats_the_first(order: Any) -> None:
    weights, hessian = problem(64, 192, 11)
    rtn = unpack(quantize_planes(weights, 32, 4, False)).astype(np.float64)
    nearest_error = error_of(weights - rtn, hessian).sum()
    found = gptq(weights, hessian, order=order)
    assert found.error < 0.7 * nearest_error
    assert found.lo_error is not None
    assert found.lo_error < 0.1 * found.error
    int8 = error_of(weights - unpack(quantize_int8(weights)).astype(np.float64), hessian).sum()
    assert gptq(weights, hessian, bits=8, order=order).error < int8


def test_the_first_plane_is_that_of_a_model_without_a_second() -> None:
    weights, hessian = problem(32, 96, 2)
    alone, nested = gptq(weights, hessian, lo=False), gptq(weights, hessian, lo=True)
    assert np.array_equal(alone.codes, nested.codes)
    assert np.array_equal(alone.scales, nested.scales)
    assert alone.lo is None
    assert nested.lo_shift in (2, 3, 4)


@pytest.mark.parametrize("shift", [2, 3, 4])
def test_a_given_shift_is_taken(shift: int) -> None:
    weights, hessian = problem(16, 64, 4)
    found = gptq(weights, hessian, lo_shift=shift)
    assert (found.lo_shift, found.packed(4, 32).lo_shift) == (shift, shift)


@given(st.integers(0, 50), st.sampled_from(ORDERS), st.floats(0.1, 0.9))
@settings(max_examples=10)
def test_what_a_mask_prunes_is_zero_in_both_planes(seed: int, order: Any, share: float) -> None:
    weights, hessian = problem(16, 70, seed)
    mask = np.random.default_rng(seed).random(weights.shape) >= share
    found = gptq(weights, hessian, order=order, mask=mask)
    assert not found.codes[~mask].any()
    assert found.lo is not None
    assert not found.lo[~mask].any()
    both = unpack(found.packed(4, 32))
    assert (both[~mask] == 0).all()
    # survivors make up for it: better than rounding what is left
    left = unpack(quantize_planes(weights * mask, 32, 4, False)).astype(np.float64)
    assert found.error < error_of(weights - left, hessian).sum()


@pytest.mark.parametrize("cols", [64, 100, 31])
@pytest.mark.parametrize("group", [32, 128])
def test_orders_are_permutations_and_groups_stay_together(cols: int, group: int) -> None:
    _, hessian = problem(1, cols, cols)
    for order in ORDERS:
        found = column_order(hessian, order, group)
        assert sorted(found) == list(range(cols))
        if order != "static":
            for begin in range(0, cols - group + 1, group):
                assert len(set(found[begin : begin + group] // group)) == 1


# ---- grids


@given(st.integers(20, 40), st.integers(16, 128), st.sampled_from([3, 4, 8]), st.integers(0, 99), st.booleans())
@settings(max_examples=25)
def test_scales_are_half_precision_and_no_worse_than_by_maximum(
    rows: int, cols: int, bits: int, seed: int, weighed: bool
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_t(4, size=(rows, cols)).astype(np.float32)
    h = rng.lognormal(size=cols).astype(np.float32) if weighed else None
    scales = fit_scales(groups, h, bits)
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    least, greatest = code_range(bits)
    plain = np.abs(groups).max(axis=1) / np.float32(greatest)

    def error(s: np.ndarray) -> np.ndarray:
        wrong = groups - s[:, None] * nearest(groups, s[:, None], bits)
        return (wrong * wrong * (1 if h is None else h)).sum(axis=1)

    assert error(scales).sum() <= error(plain).sum() * 1.01
    codes = nearest(groups, scales[:, None], bits)
    assert codes.min() >= least
    assert codes.max() <= greatest


def test_zero_groups_and_weights_beyond_half_precision() -> None:
    scales = fit_scales(np.zeros((2, 8), np.float32), None, 4)
    assert (scales == 0).all()
    assert (nearest(np.zeros((2, 8), np.float32), scales[:, None], 4) == 0).all()
    with pytest.raises(ModelError, match="too great"):
        fit_scales(np.full((1, 8), 1e9, np.float32), None, 4)
    with pytest.raises(InputError, match="bits"):
        code_range(5)

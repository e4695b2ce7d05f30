"""Round-to-nearest: errors as stated, what is exact, and the edges of float16 scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from haomiao import _core
from haomiao.errors import InputError, ModelError
from haomiao.kernels import pack, rtn, rtn_reference


def relative_rms(weights: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(((weights - found) ** 2).mean() / (weights**2).mean()))


@pytest.mark.parametrize(
    ("name", "hi", "both", "single", "int8"),
    [("gauss", 0.083, 0.0056, 0.083, 0.0056), ("t4", 0.114, 0.0080, 0.114, 0.0080)],
)
def test_relative_errors(name: str, hi: float, both: float, single: float, int8: float) -> None:
    """Group 32: within 2 % of what a search over 24 to 40 scales reached when the rule was chosen."""
    random = np.random.default_rng(1)
    weights = (random.standard_normal if name == "gauss" else lambda size: random.standard_t(4, size))((512, 1024))
    weights = weights.astype(np.float32)
    packed = rtn.quantize_planes(weights)
    assert relative_rms(weights, pack.unpack(packed, "hi")) < hi
    assert relative_rms(weights, pack.unpack(packed)) < both
    assert relative_rms(weights, pack.unpack(rtn.quantize_planes(weights, with_lo=False))) < single
    assert relative_rms(weights, pack.unpack(rtn.quantize_int8(weights))) < int8


@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([32, 64, 128]),
    st.integers(0, 4),
    st.floats(-7, 4),
    st.integers(0, 2**32 - 1),
)
def test_errors_stay_within_half_a_step(
    rows: int, cols: int, group: int, lo_shift: int, magnitude: float, seed: int
) -> None:
    """Nothing clips: every weight is within half a step of its code (a little more where float16 rounded the scale)."""
    weights = np.random.default_rng(seed).standard_t(3, (rows, cols)).astype(np.float32) * np.float32(10.0**magnitude)
    for packed in (rtn.quantize_planes(weights, group, lo_shift), rtn.quantize_int8(weights, group)):
        _, scales = pack.unpack_codes(packed)
        steps = np.abs(np.repeat(scales, group, axis=1)[:, :cols])
        assert (np.abs(pack.unpack(packed) - weights) <= steps * 0.64).all()


@given(st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 2**32 - 1))
def test_an_int4_grid_comes_back_exactly(group: int, with_lo: bool, seed: int) -> None:
    """Weights d * q with q in [-8, 7], as Q4_0 holds them, where a group's extreme is -8."""
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (16, 2 * group)).astype(np.float32)
    codes[:, ::group] = -8
    grid = codes * np.repeat(random.uniform(-0.1, 0.1, (16, 2)).astype(np.float16).astype(np.float32), group, axis=1)
    packed = rtn.quantize_planes(grid, group, with_lo=with_lo)
    assert np.array_equal(pack.unpack(packed, "hi"), grid)
    assert np.array_equal(pack.unpack(packed), grid)


def test_zero_and_tiny_groups() -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, :32] = np.linspace(-1e-9, 1e-9, 32)
    for packed in (
        rtn.quantize_planes(weights),
        rtn.quantize_planes(weights, with_lo=False),
        rtn.quantize_int8(weights),
    ):
        found = pack.unpack(packed)
        assert not found[0].any()
        assert np.abs(found - weights).max() <= 6e-8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weights = np.ones((3, 70), np.float32)
    weights[2, 69] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        rtn.quantize_planes(weights)
    with pytest.raises(ModelError, match="NaN or infinite"):
        rtn.quantize_int8(weights)


def test_what_no_scale_holds_is_refused() -> None:
    with pytest.raises(ModelError, match="too great"):
        rtn.quantize_planes(np.full((1, 32), 1e7, np.float32))
    with pytest.raises(ModelError, match="too great"):
        rtn.quantize_int8(np.full((1, 32), 1e8, np.float32))
    with pytest.raises(ModelError, match="NaN or infinite"):
        rtn.quantize_int8(np.full((1, 32), 1e300))
    with pytest.raises(InputError, match="group"):
        rtn.quantize_int8(np.ones((1, 32), np.float32), 16)
    with pytest.raises(InputError, match="lo_shift"):
        rtn.quantize_planes(np.ones((1, 32), np.float32), lo_shift=7)
    with pytest.raises(InputError, match="dimensions"):
        rtn.quantize_planes(np.ones(32, np.float32))


@settings(max_examples=20)
@given(st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_each_other(rows: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((rows, 96)).astype(np.float32)
    whole = pack.unpack(rtn.quantize_planes(weights))
    one = pack.unpack(rtn.quantize_planes(weights[rows - 1 :]))
    assert np.array_equal(whole[rows - 1 :], one)


@example(128, 3, "t3", 4.0, 3)
@given(
    st.sampled_from([32, 64, 128]),
    st.integers(-1, 4),
    st.sampled_from(["gauss", "t3", "grid", "sparse"]),
    st.floats(-8, 4),
    st.integers(0, 2**32 - 1),
)
def test_the_compiled_rule_equals_the_twin(group: int, lo_shift: int, kind: str, magnitude: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_t(3, (40, group)) if kind == "t3" else random.standard_normal((40, group))
    if kind == "grid":
        x = np.rint(x * 3)
    elif kind == "sparse":
        x[random.random(x.shape) < 0.9] = 0
    x = (x * 10.0**magnitude).astype(np.float32)
    scales, (hi, lo) = np.empty(40, np.float32), np.empty((2, *x.shape), np.int8)
    if not _core.quantize_planes(x, max(lo_shift, 0), scales, hi, lo if lo_shift >= 0 else None):
        assert np.abs(x).max() > 4e5, "only what no float16 scale holds is refused"
        with pytest.raises(ModelError, match="float16"):
            rtn_reference.quantize_single(x) if lo_shift < 0 else rtn_reference.quantize_nested(x, lo_shift)
        return
    if lo_shift < 0:
        want_scales, want_hi = rtn_reference.quantize_single(x)
    else:
        want_scales, codes = rtn_reference.quantize_nested(x, lo_shift)
        want_hi, want_lo = pack.split_codes(codes, lo_shift)
        assert np.array_equal(lo, want_lo)
    assert np.array_equal(scales, want_scales)
    assert np.array_equal(hi, want_hi)


@pytest.mark.parametrize("lo_shift", [4, 3])
@pytest.mark.parametrize("group", [32, 128])
def test_codes_within_int8_cost_little(group: int, lo_shift: int) -> None:
    weights = np.random.default_rng(4).standard_normal((70, 2 * group + 9)).astype(np.float32)
    free = rtn.quantize_planes(weights, group, lo_shift)
    within = rtn.quantize_planes(weights, group, lo_shift, within_int8=True)
    codes, scales = pack.unpack_codes(within)
    assert codes.min() >= -128 and codes.max() <= 127
    free_codes, free_scales = pack.unpack_codes(free)
    if lo_shift == 3:  # nothing to mend
        np.testing.assert_array_equal(codes, free_codes)
    else:
        assert free_codes.min() < -128
        # groups that fitted are untouched
        groups = np.add.reduceat(free_codes < -128, range(0, weights.shape[1], group), axis=1) == 0
        np.testing.assert_array_equal(scales[groups], free_scales[groups])
    for planes in ("hi", "hi+lo"):
        error, before = (relative_rms(weights, pack.unpack(packed, planes)) for packed in (within, free))
        assert error < 1.06 * before

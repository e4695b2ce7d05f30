"""The elimination against the optimal brain surgeon written out, and its identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.compress.solver import eliminate, factorize, layer_error, layer_power
from haomiao.errors import ModelError
from tests.compress.straightforward import error_of, problem, surgeon


class Rounded:
    """A policy: multiples of 1/8."""

    def __init__(self, unit: int = 128) -> None:
        self.unit = unit
        self.seen: list[tuple[int, int]] = []

    def enter(self, begin: int, block: np.ndarray, upper: np.ndarray) -> None:
        assert upper.shape == (len(block), len(block))
        self.seen.append((begin, len(block)))

    def fix(self, column: int, values: np.ndarray) -> np.ndarray:
        return np.rint(values * 8) / np.float32(8)


@given(st.integers(1, 60), st.integers(0, 1000), st.floats(1e-4, 1.0))
@settings(max_examples=20)
def test_the_factor_is_that_of_the_inverse(cols: int, seed: int, damping: float) -> None:
    _, hessian = problem(1, cols, seed)
    order = np.random.default_rng(seed).permutation(cols)
    factor = factorize(hessian, order, damping=damping)
    assert factor.damping == pytest.approx(damping * np.diagonal(hessian).mean())
    damped = (hessian + factor.damping * np.eye(cols))[np.ix_(order, order)]
    upper = factor.upper.astype(np.float64)
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(cols), atol=2e-3)
    # U_jj² is the diagonal of the inverse of what is left
    j = cols // 2
    left = np.linalg.inv(damped[j:, j:])[0, 0]
    assert upper[j, j] ** 2 == pytest.approx(left, rel=1e-3)


@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=15)
def test_errors_sum_to_the_layers_output_error(cols: int, rows: int, seed: int) -> None:
    weights, hessian = problem(rows, cols, seed)
    factor = factorize(hessian)
    columns = weights.T.copy()
    total = eliminate(columns, factor.upper, Rounded())
    difference = weights.astype(np.float64) - columns.T
    damped = hessian + factor.damping * np.eye(cols)
    np.testing.assert_allclose(total, error_of(difference, damped), rtol=2e-3)
    np.testing.assert_allclose(layer_error(difference, damped), error_of(difference, damped), rtol=1e-9)


@pytest.mark.parametrize("cols", [1, 100, 600, 1024])
def test_the_power_of_the_outputs_is_summed_in_blocks(cols: int) -> None:
    weights, hessian = problem(7, cols, cols)
    assert layer_power(weights, hessian) == pytest.approx(float(error_of(weights, hessian).sum()), rel=1e-5)


@pytest.mark.parametrize("cols", [1, 5, 16, 33, 128, 200])
def test_it_is_the_surgeon_written_out(cols: int) -> None:
    weights, hessian = problem(24, cols, cols)
    factor = factorize(hessian, damping=0.05)
    columns = weights.T.copy()
    eliminate(columns, factor.upper, Rounded())
    expected = surgeon(weights, hessian, factor.damping, np.arange(cols), lambda j, w, d: np.rint(w * 8) / 8)
    # a value on the edge between two codes may fall either way; what follows from it differs, the error does not
    same = np.isclose(columns.T, expected, atol=1e-6).mean()
    assert same > 0.995
    got, wanted = (error_of(weights - q, hessian).sum() for q in (columns.T.astype(np.float64), expected))
    assert got == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("unit", [2, 4, 16, 32, 64, 128])
def test_units_are_entered_once_each_with_weights_up_to_date(unit: int) -> None:
    weights, hessian = problem(8, 150, 3)
    plain, watched = Rounded(), Rounded(unit)
    results = []
    for policy in (plain, watched):
        columns = weights.T.copy()
        eliminate(columns, factorize(hessian).upper, policy)
        results.append(columns)
    assert np.array_equal(*results)
    assert watched.seen == [(begin, min(unit, 150 - begin)) for begin in range(0, 150, unit)]


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    x = np.random.default_rng(0).normal(size=(3, 40))
    hessian = x.T @ x / 3  # rank 3
    factor = factorize(hessian, damping=0.0)
    assert factor.damping > 0
    assert np.isfinite(factor.upper).all()


def test_columns_that_were_never_reached_are_rounded_alone() -> None:
    weights, hessian = problem(4, 20, 1)
    hessian[:, 7] = hessian[7, :] = 0
    columns = weights.T.copy()
    eliminate(columns, factorize(hessian).upper, Rounded())
    np.testing.assert_array_equal(columns[7], np.rint(weights[:, 7] * 8) / 8)


def test_all_zero_activations_and_broken_ones() -> None:
    factor = factorize(np.zeros((4, 4)))
    assert np.isfinite(factor.upper).all()
    broken = np.eye(4)
    broken[1, 1] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        factorize(broken)

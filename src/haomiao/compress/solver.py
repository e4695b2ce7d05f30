"""Second-order elimination: columns are fixed one after the other, and each one's error is pushed into those to come.

The common core of GPTQ (Frantar et al. 2210.17323, section 3), SparseGPT (2301.00774, section 3) and of both at once.
With H = XᵀX / N + λI = (UᵀU)⁻¹, U upper triangular, a row w and its fixed values q:

    e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk for k > j,   and then   Σ e_j² = (w - q) H (w - q)ᵀ,

the last with the row as it was at first: the errors that the loop computes anyway are the layer's output error. What a
column becomes is a policy's business (`quantize`, `prune`); this module knows no codes, scales or masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError
from haomiao.types import F32

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

BLOCK = 128
"""Columns whose errors are gathered before the columns behind the block are updated, in one matrix product."""
INNER = 16
"""Columns that are updated one rank at a time, so that they stay in the core's own cache."""
POWER_COLUMNS = 512
"""Columns of H that are rounded to float32 at once."""
MAX_DAMPING = 1e6
"""Times the mean of H's diagonal: beyond it H is not a Hessian but a mistake."""


class Policy(Protocol):
    """What columns become. Columns are counted in the order of elimination."""

    unit: int
    """Columns that `enter` shows at once: a power of two, at most `BLOCK`."""

    def enter(self, begin: int, block: F32, upper: F32) -> None:
        """Columns [begin, begin + unit) come next: `block` [unit, rows] holds them as updated so far, `upper` is
        their part of U. The last unit may be shorter."""
        ...

    def fix(self, column: int, values: F32) -> F32:
        """The values [rows] that the column gets for good."""
        ...


@dataclass(frozen=True, slots=True)
class Factor:
    """U of H in the order of elimination, and the damping it took."""

    upper: F32  # [cols, cols]
    order: I64  # [cols] column of the matrix that is eliminated at each place
    damping: float
    """λ, absolute."""


def factorize(hessian: F64, order: I64 | None = None, *, damping: float = 0.01) -> Factor:
    """U with (H + λI)⁻¹ = UᵀU, columns permuted by `order` (default: as they are).

    λ is `damping` times the mean of the diagonal; where H is not positive definite in floating point, ten times that,
    and so on, instead of giving up on the layer. Columns that calibration never reached (H_jj = 0) get H_jj = 1, so
    that they are rounded to nearest. Raises `ModelError` if nothing helps (activations that are not finite).

    H = R Rᵀ with R upper is the Cholesky factor of the reversed matrix, reversed; U = R⁻¹: one factorization and one
    triangular inverse instead of the usual factorize, invert, factorize.
    """
    from scipy.linalg import lapack

    columns = np.arange(len(hessian)) if order is None else np.asarray(order, np.int64)
    diagonal = np.diagonal(hessian)
    if not np.isfinite(diagonal).all():
        raise ModelError("the activations of a layer are not finite: the model or its calibration text is broken")
    mean = float(diagonal.mean()) or 1.0
    reverse = columns[::-1]
    share = damping
    while True:
        matrix = hessian[np.ix_(reverse, reverse)].T  # symmetric, and in the order that LAPACK takes without a copy
        at = np.arange(len(matrix))
        matrix[at, at] += np.where(diagonal[reverse] == 0, 1.0, 0.0) + share * mean
        lower, failed = lapack.dpotrf(matrix, lower=1, clean=1, overwrite_a=1)
        if not failed:
            inverse, failed = lapack.dtrtri(lower, lower=1, overwrite_c=1)
        if not failed and np.isfinite(np.diagonal(inverse)).all():
            upper: F32 = np.ascontiguousarray(inverse[::-1, ::-1], np.float32)
            return Factor(upper, columns, share * mean)
        share = max(10 * share, 1e-8)
        if share > MAX_DAMPING:
            raise ModelError("a layer's Hessian cannot be factorized at any damping")


def eliminate(columns: F32, upper: F32, policy: Policy) -> F64:
    """Fix every column of `columns` [cols, rows] (a matrix transposed, in the order of elimination), in place.

    Returns Σ e² of each row, float64 [rows]: its squared error under the damped H. Rows do not depend on each other
    (a policy may make them), so the blocking changes only the rounding of sums.
    """
    count, rows = columns.shape
    work = np.empty((INNER, rows), np.float32)
    errors = np.empty((BLOCK, rows), np.float32)
    total = np.zeros(rows, np.float64)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        for first in range(begin, end, INNER):
            last = min(first + INNER, end)
            for j in range(first, last):
                if j % policy.unit == 0:
                    ahead = slice(j, min(j + policy.unit, count))
                    policy.enter(j, columns[ahead], upper[ahead, ahead])
                fixed = policy.fix(j, columns[j])
                error = errors[j - begin]
                np.subtract(columns[j], fixed, out=error)
                error /= upper[j, j]
                columns[j] = fixed
                if j + 1 < last:
                    product = work[: last - j - 1]
                    np.multiply(upper[j, j + 1 : last, None], error, out=product)
                    columns[j + 1 : last] -= product
            if last < end:
                columns[last:end] -= upper[first:last, last:end].T @ errors[first - begin : last - begin]
        if end < count:
            columns[end:] -= upper[begin:end, end:].T @ errors[: end - begin]
        used = errors[: end - begin]
        total += np.einsum("jr,jr->r", used, used, dtype=np.float64)
    return total


def layer_error(difference: npt.NDArray[Any], hessian: F64) -> F64:
    """(w - q) H (w - q)ᵀ of each row of `difference` [rows, cols]: the mean squared error of each output. The slow,
    direct form of what `eliminate` returns; rows are worked off in bounded chunks."""
    out = np.empty(len(difference), np.float64)
    for begin in range(0, len(difference), 1024):
        part = difference[begin : begin + 1024].astype(np.float64)
        out[begin : begin + 1024] = np.einsum("rc,rc->r", part @ hessian, part)
    return out


def layer_power(weights: F32, hessian: F64) -> float:
    """w H wᵀ, summed over the rows of `weights` [rows, cols]: the power of all outputs. Products are float32, a block
    of columns at a time, their sum is float64."""
    total = 0.0
    for begin in range(0, len(hessian), POWER_COLUMNS):
        columns = slice(begin, begin + POWER_COLUMNS)
        part = weights @ hessian[:, columns].astype(np.float32)
        total += float(np.einsum("rc,rc->", part, weights[:, columns], dtype=np.float64))
    return total

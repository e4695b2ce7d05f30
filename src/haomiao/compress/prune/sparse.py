"""Pruning without quantization: SparseGPT proper, and any mask with compensation. For comparison and for tests."""

from __future__ import annotations

import numpy as np

from haomiao.compress.prune.masks import Choose
from haomiao.compress.solver import F64, I64, eliminate, factorize
from haomiao.types import B8, F32


class Sparse:
    """A `solver.Policy`: pruned weights become zero, the others stay as they are when their turn comes."""

    def __init__(self, order: I64, mask: B8, choose: Choose | None, unit: int) -> None:
        self.unit, self.mask = unit, mask  # [cols, rows]
        self._order, self._choose = order, choose

    def enter(self, begin: int, block: F32, upper: F32) -> None:
        """Choose what is pruned of the columns that come next."""
        if self._choose is not None:
            columns = self._order[begin : begin + len(block)]
            self.mask[columns] &= self._choose(columns, block, upper)

    def fix(self, column: int, values: F32) -> F32:
        """The value, or zero."""
        fixed: F32 = values * self.mask[self._order[column]]
        return fixed


def sparsify(
    weights: F32,
    hessian: F64,
    *,
    mask: B8 | None = None,
    choose: Choose | None = None,
    damping: float = 0.01,
    unit: int = 128,
) -> tuple[F32, B8, F64]:
    """Prune a matrix [rows, cols]: the compensated weights, what was kept, and Σ e² of each row (damping included)."""
    rows, cols = weights.shape
    kept = np.ones((cols, rows), np.bool_) if mask is None else mask.T.copy()
    factor = factorize(hessian, damping=damping)
    policy = Sparse(factor.order, kept, choose, unit)
    columns = weights.T.copy()
    errors = eliminate(columns, factor.upper, policy)
    return np.ascontiguousarray(columns.T), np.ascontiguousarray(policy.mask.T), errors

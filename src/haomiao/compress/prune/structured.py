"""Which neurons and heads go, and what the matrix behind them becomes: structured pruning by the error it makes.

A neuron is a column of `down`, a head a block of columns of `out`. What the removal of a block G costs after the best
compensation is Σ w_G [(H⁻¹)_GG]⁻¹ w_Gᵀ over the matrix's rows, with H the second moments of its inputs (block form of
the optimal brain surgeon: Kurtic et al. 2203.07259, equation 7). Blocks go one after the other, weights and H⁻¹ updated
in between, because two that stand in for each other must not go both (ZipLM: Kurtic et al. 2302.04089, section 3.1).
What stays is then fitted to the original outputs exactly. Knows matrices and blocks; nothing of plans or checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from haomiao.compress.solver import F64, I64, layer_error
from haomiao.errors import ModelError
from haomiao.types import F32

ROUNDS = 512
"""Single columns go one at a time in matrices of less than twice as many, several at once in wider ones."""


def choose_blocks(
    weights: F32, hessian: F64, *, size: int, quotas: Sequence[tuple[I64, int]], damping: float = 0.01
) -> I64:
    """The blocks that stay, ascending. Blocks are `size` neighbouring columns of `weights` [rows, cols].

    `quotas` divides the blocks: of each set (block numbers), so many stay. Ties go by number.
    """
    members = np.concatenate([numbers for numbers, _ in quotas])
    return np.setdiff1d(members, _removed(weights, hessian, size, quotas, damping))


def choose_nested(weights: F32, hessian: F64, *, columns: int, stay: Sequence[int], damping: float = 0.01) -> list[I64]:
    """`choose_blocks` of the first `columns` single columns, for several numbers that stay: each choice is a part of
    the larger ones, and all of them take as long as the smallest."""
    numbers = np.arange(columns)
    gone = _removed(weights, hessian, 1, [(numbers, min(stay))], damping)
    return [np.setdiff1d(numbers, gone[: columns - count]) for count in stay]


def _removed(weights: F32, hessian: F64, size: int, quotas: Sequence[tuple[I64, int]], damping: float) -> list[int]:
    """The blocks that go, in their order: to stop earlier gives its beginning."""
    blocks = weights.shape[1] // size
    allowed = np.zeros(blocks, np.int64)  # how many of its set may still go
    member = np.full(blocks, -1, np.int64)
    left = np.zeros(len(quotas), np.int64)
    for index, (numbers, stay) in enumerate(quotas):
        member[numbers] = index
        left[index] = len(numbers) - stay
    work = weights.T.astype(np.float64)
    work[np.diagonal(hessian) == 0] = 0  # what is never reached costs nothing
    inverse = np.linalg.inv(damped(hessian, damping)).astype(np.float64, copy=False)
    alive = member >= 0
    at_once = max(1, blocks // ROUNDS) if size == 1 else 1
    removed: list[int] = []
    while left.sum() > 0:
        costs = block_costs(work, inverse, size)
        costs[~alive] = np.inf
        allowed = left[np.maximum(member, 0)]
        gone: list[int] = []
        for block in np.argsort(np.where(allowed > 0, costs, np.inf), kind="stable")[:at_once]:
            if alive[block] and left[member[block]] > 0:
                gone.append(int(block))
                left[member[block]] -= 1
        alive[gone] = False
        columns = (np.array(gone)[:, None] * size + np.arange(size)).reshape(-1)
        _eliminate(work, inverse, columns)
        removed += gone
    return removed


def choose_heads(
    weights: F32, hessian: F64, *, head_dim: int, before: tuple[int, int], after: tuple[int, int], damping: float = 0.01
) -> I64:
    """The query heads that stay, ascending, as `after` (KV heads, query heads of each) says of `before`: first whole KV
    heads go with their query heads, then the same number of query heads of every KV head that is left."""
    kv_heads, each = before
    stay, of_each = after
    groups = np.arange(kv_heads)
    if stay < kv_heads:
        groups = choose_blocks(weights, hessian, size=each * head_dim, quotas=[(groups, stay)], damping=damping)
    heads = np.arange(kv_heads * each).reshape(kv_heads, each)
    if of_each == each:
        return heads[groups].reshape(-1)
    left = [(members, of_each if group in groups else 0) for group, members in enumerate(heads)]
    return choose_blocks(weights, hessian, size=head_dim, quotas=left, damping=damping)


def block_costs(work: F64, inverse: F64, size: int) -> F64:
    """What the removal of each block costs: `work` [cols, rows], `inverse` H⁻¹. Blocks that are gone cost 0."""
    if size == 1:
        diagonal = np.diagonal(inverse).copy()
        squares = np.einsum("cr,cr->c", work, work)
        alone: F64 = np.divide(squares, diagonal, out=np.zeros_like(squares), where=diagonal > 0)
        return alone
    out = np.zeros(len(work) // size)
    for block in range(len(out)):
        part = slice(block * size, (block + 1) * size)
        if inverse[part.start, part.start] > 0:
            half = np.linalg.solve(np.linalg.cholesky(inverse[part, part]), work[part])
            out[block] = float(np.einsum("cr,cr->", half, half))
    return out


def _eliminate(work: F64, inverse: F64, columns: I64) -> None:
    """Take columns out, in place: the others make up for them, and H⁻¹ becomes that of what is left."""
    right = inverse[columns]  # [gone, cols]
    solved = np.linalg.solve(inverse[np.ix_(columns, columns)], np.hstack([right, work[columns]]))
    pulled, moved = solved[:, : len(work)], solved[:, len(work) :]
    work -= right.T @ moved
    inverse -= right.T @ pulled
    work[columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0


def compensate(weights: F32, hessian: F64, kept: I64, damping: float = 0.01) -> tuple[F32, float]:
    """The columns `kept` of a matrix [rows, cols], fitted to what all of them computed: w_S + H_SS⁻¹ H_SE w_E.

    Returns [rows, len(kept)] and the error that is left, as `solver.layer_error` sums it (without the damping).
    """
    from scipy.linalg import cho_factor, cho_solve

    gone = np.setdiff1d(np.arange(weights.shape[1]), kept)
    matrix = damped(hessian, damping)[np.ix_(kept, kept)]
    right = hessian[np.ix_(kept, gone)] @ weights[:, gone].T.astype(np.float64)
    moved = cho_solve(cho_factor(matrix, lower=True, overwrite_a=True), right, overwrite_b=True)
    fitted = np.ascontiguousarray(weights[:, kept] + moved.T.astype(np.float32))
    left = weights.copy()
    left[:, kept] -= fitted
    return fitted, float(layer_error(left, hessian).sum())


def damped(hessian: F64, damping: float) -> F64:
    """H + λI with λ = `damping` times the mean of its diagonal; columns that were never reached get 1."""
    diagonal = np.diagonal(hessian)
    if not np.isfinite(diagonal).all():
        raise ModelError("the activations of a layer are not finite: the model or its calibration text is broken")
    matrix = hessian.copy()
    at = np.arange(len(matrix))
    matrix[at, at] += np.where(diagonal == 0, 1.0, 0.0) + max(damping, 1e-8) * (float(diagonal.mean()) or 1.0)
    return matrix

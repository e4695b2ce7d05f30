"""Which weights go: tiles of the kernel's own block, patterns of single weights, and how the share is spread.

A tile is 32 rows by one group of columns, what a kernel reads at once (docs/ARCHITECTURE.md, section 4); where all of
its codes are zero it need not be read. Tiles are scored by what their removal costs after the best compensation (block
form of the optimal brain surgeon: Kurtic et al. 2203.07259, equation 7): Σ w_G [(H⁻¹)_GG]⁻¹ w_Gᵀ over the tile's rows.

Patterns, for comparison and for checkpoints: magnitude (a threshold for the matrix), Wanda (|w| ‖x‖, per row; Sun et
al. 2306.11695), SparseGPT (w² / [H⁻¹]_jj of the weights as updated; 2301.00774), each by share or n of every m columns.
OWL (Yin et al. 2310.05175) gives layers with many outliers a smaller share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from haomiao.compress.recipe import Prune
from haomiao.compress.solver import F64, I64, factorize
from haomiao.kernels.packed import TILE_ROWS
from haomiao.types import B8, F32

OWL_OUTLIER = 5.0
"""M: a weight is an outlier if its |w| ‖x‖ is more than M times the layer's mean."""
OWL_SPREAD = 0.08
"""λ: shares differ from the mean by at most this."""

Choose = Callable[[I64, F32, F32], B8]
"""choose(columns [unit], their weights as updated [unit, rows], their part of U) -> kept [unit, rows]."""


def tile_costs(weights: F32, hessian: F64, group: int, damping: float = 0.01) -> F64:
    """What the removal of each tile costs, float64 [tiles, groups]. Weights [rows, cols]."""
    rows, cols = weights.shape
    upper = factorize(hessian, damping=damping).upper.astype(np.float64)
    tiles, groups = -(-rows // TILE_ROWS), -(-cols // group)
    out = np.empty((tiles, groups))
    for index in range(groups):
        part = slice(index * group, min((index + 1) * group, cols))
        inverse = upper[: part.stop, part].T @ upper[: part.stop, part]  # U is triangular
        half = np.linalg.solve(np.linalg.cholesky(inverse), weights[:, part].T.astype(np.float64))
        costs = np.zeros(tiles * TILE_ROWS)
        costs[:rows] = np.einsum("cr,cr->r", half, half)
        out[:, index] = costs.reshape(tiles, TILE_ROWS).sum(axis=1)
    return out


def keep_tiles(costs: F64, share: float) -> B8:
    """True for tiles that stay: the `share` that costs least goes (of the matrix, rounded down)."""
    gone = int(costs.size * share)
    kept = np.ones(costs.size, np.bool_)
    kept[np.argsort(costs.reshape(-1), kind="stable")[:gone]] = False
    return kept.reshape(costs.shape)


def tile_mask(kept: B8, rows: int, cols: int, group: int) -> B8:
    """Kept tiles [tiles, groups] as kept weights [rows, cols]."""
    return np.asarray(np.repeat(np.repeat(kept, TILE_ROWS, axis=0)[:rows], group, axis=1)[:, :cols])


def compensate_tiles(weights: F32, hessian: F64, kept: B8, group: int, damping: float = 0.01) -> F32:
    """The weights [rows, cols] that make up best for the tiles that are gone: w_S + H_SS⁻¹ H_SE w_E, row by row.

    Rows of a tile share what is gone, so that each tile takes one factorization of what stays. Exact, unlike a sweep
    that can only push errors to the columns behind it. The error of rounding what comes out is the layer's error less
    that of pruning: (w - q) H (w - q)ᵀ = (w - w*) H (w - w*)ᵀ + (w* - q) H (w* - q)ᵀ where q is zero outside S.
    """
    from scipy.linalg import cho_factor, cho_solve

    out = weights.copy()
    cols = weights.shape[1]
    ridge = damping * float(np.diagonal(hessian).mean()) or 1.0
    for tile, columns in enumerate(np.repeat(kept, group, axis=1)[:, :cols]):
        rows = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
        stays, gone = np.flatnonzero(columns), np.flatnonzero(~columns)
        if len(gone) and len(stays):
            matrix = hessian[np.ix_(stays, stays)]
            matrix[np.diag_indices(len(stays))] += ridge
            right = hessian[np.ix_(stays, gone)] @ weights[rows, gone].T.astype(np.float64)
            moved = cho_solve(cho_factor(matrix, lower=True, overwrite_a=True), right, overwrite_b=True)
            out[rows, stays] += moved.T.astype(np.float32)
        out[rows, gone] = 0
    return out


def empty_tiles(codes: npt.NDArray[np.integer], group: int) -> B8:
    """True where a tile of codes [rows, cols] holds nothing but zeros: [tiles, groups]."""
    rows, cols = codes.shape
    tiles, groups = -(-rows // TILE_ROWS), -(-cols // group)
    padded = np.zeros((tiles * TILE_ROWS, groups * group), np.bool_)
    padded[:rows, :cols] = codes != 0
    return np.logical_not(padded.reshape(tiles, TILE_ROWS, groups, group).any(axis=(1, 3)))


# ---- patterns


def pattern_mask(prune: Prune, weights: F32, hessian: F64, share: float) -> B8:
    """Kept weights of `magnitude` and `wanda`, which look at the weights as they are."""
    scores = np.abs(weights)
    if prune.kind == "wanda":
        scores = scores * np.sqrt(np.diagonal(hessian)).astype(np.float32)
    if prune.pattern is not None:
        return keep_n_of_m(scores, *prune.pattern)
    if prune.kind == "wanda":
        return _keep_rows(scores, share)
    return keep_tiles(scores.astype(np.float64), share)  # one threshold for the matrix


def keep_n_of_m(scores: F32, n: int, m: int) -> B8:
    """False for the n lowest of every m neighbouring columns of a row; the first among equals goes first."""
    rows, cols = scores.shape
    padded = np.full((rows, -(-cols // m) * m), np.inf, np.float32)
    padded[:, :cols] = scores
    order = np.argsort(padded.reshape(rows, -1, m), axis=2, kind="stable")
    kept = np.ones(order.shape, np.bool_)
    np.put_along_axis(kept, order[:, :, :n], False, axis=2)
    return kept.reshape(rows, -1)[:, :cols]


def _keep_rows(scores: F32, share: float) -> B8:
    gone = int(scores.shape[1] * share)
    kept = np.ones(scores.shape, np.bool_)
    np.put_along_axis(kept, np.argsort(scores, axis=1, kind="stable")[:, :gone], False, axis=1)
    return kept


def sparsegpt(prune: Prune, share: float) -> Choose:
    """The adaptive choice: by the weights as they have become, unit by unit (a unit is a group of columns)."""

    def choose(columns: I64, block: F32, upper: F32) -> B8:
        scores = (block / np.diagonal(upper)[:, None]) ** 2
        if prune.pattern is not None:
            natural = np.argsort(columns, kind="stable")
            kept = keep_n_of_m(np.ascontiguousarray(scores[natural].T), *prune.pattern).T
            out = np.empty_like(kept)
            out[natural] = kept
            return out
        flat = scores.reshape(-1)
        gone = int(flat.size * share)
        if gone == 0:
            return np.ones(scores.shape, np.bool_)
        return np.asarray(scores > np.partition(flat, gone - 1)[gone - 1])

    return choose


# ---- how the share is spread


def outlier_share(weights: F32, hessian: F64) -> float:
    """D of OWL: the share of weights whose |w| ‖x‖ is an outlier of the layer."""
    scores = np.abs(weights) * np.sqrt(np.diagonal(hessian)).astype(np.float32)
    return float((scores > OWL_OUTLIER * scores.mean()).mean())


def owl_shares(outliers: Mapping[str, float], sizes: Mapping[str, int], share: float) -> dict[str, float]:
    """The share that each matrix loses: λ-bounded around `share`, less where its layer has many outliers.

    Matrices of a layer (`layers.3.qkv`, `layers.3.down`, ...) lose the same share, by the outliers of all of them: so
    the paper has it. `sizes`: weights of each, by which outliers and the mean count.
    """
    layers = {name: ".".join(name.split(".")[:2]) for name in outliers}
    weight = dict.fromkeys(layers.values(), 0.0)
    found = dict.fromkeys(layers.values(), 0.0)
    for name, layer in layers.items():
        weight[layer] += sizes[name]
        found[layer] += sizes[name] * outliers[name]
    values = np.array([found[layer] / weight[layer] for layer in weight])
    spread = np.ptp(values)
    scaled = (values - values.min()) / spread * 2 * OWL_SPREAD if spread > 0 else np.zeros_like(values)
    mean = np.average(scaled, weights=list(weight.values()))
    shares = dict(zip(weight, map(float, np.clip(share - (scaled - mean), 0.0, 0.999)), strict=True))
    return {name: shares[layer] for name, layer in layers.items()}

"""GPTQ and SparseGPT written as the papers state them, in float64 with an explicit inverse: slow, obviously right.

Nothing of `haomiao.compress` is used: no Cholesky factor, no blocks, no lazy updates. After a column is fixed, the
optimal brain surgeon's update is applied to the rest, and its row and column are eliminated from H⁻¹ (Frantar et al.
2208.11580, equations 3 and 4).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Fix = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""fix(column, values [rows], diagonal of the present inverse) -> what the column becomes."""


def surgeon(weights: np.ndarray, hessian: np.ndarray, damping: float, order: np.ndarray, fix: Fix) -> np.ndarray:
    """Fix the columns of [rows, cols] in `order`; returns the fixed matrix."""
    w = weights.astype(np.float64).copy()
    inverse = np.linalg.inv(hessian + damping * np.eye(len(hessian)))
    for j in order:
        q = fix(int(j), w[:, j].copy(), np.diagonal(inverse))
        w -= np.outer((w[:, j] - q) / inverse[j, j], inverse[j])
        w[:, j] = q  # exactly: the line above gives it but for rounding
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1  # a fixed column takes no more updates
    return w


def rounding(scales: np.ndarray, group: int, least: int, greatest: int) -> Fix:
    """Nearest code under scales [rows, groups]."""

    def fix(column: int, values: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        scale = scales[:, column // group].astype(np.float64)
        safe = np.where(scale == 0, 1.0, scale)
        return np.clip(np.rint(values / safe), least, greatest) * scale

    return fix


def error_of(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """d H dᵀ of each row."""
    return np.einsum("ri,ij,rj->r", difference, hessian, difference)


def problem(rows: int, cols: int, seed: int, tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random weights, and second moments of correlated inputs with outlier channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(cols, cols)) / np.sqrt(cols) + np.eye(cols)
    x = rng.normal(size=(tokens or 4 * cols, cols)) @ mixing * rng.lognormal(0, 0.5, cols)
    return rng.normal(size=(rows, cols)).astype(np.float32), x.T @ x / len(x)

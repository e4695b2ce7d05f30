"""The grid of a group of weights: which scale, by the error it causes. Knows groups of weights, not matrices' layout.

A scale is float16 and may be negative: it takes the sign that puts the weight of greatest magnitude on the negative
side, whose codes reach one further (as ggml's Q4_0 does). Candidates are |m| / 2^(bits - 1) times factors around one,
clipping allowed; the best by squared error, each weight's error counted as often as its channel's activations are
strong, and then once more by least squares for the codes found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError
from haomiao.kernels.rtn_reference import to_half
from haomiao.types import F32

FACTORS = {
    3: tuple(i / 32 for i in range(18, 36)),
    4: tuple(i / 32 for i in range(22, 36)),
    8: tuple(i / 256 for i in range(252, 262)),
}
CHUNK_ELEMENTS = 1 << 15


def code_range(bits: int) -> tuple[int, int]:
    """Least and greatest code: two's complement, but for 8 bits [-127, 127], which both signs of a scale can use."""
    if bits not in FACTORS:
        raise InputError(f"bits must be 3, 4 or 8, not {bits}", param="bits")
    return (-127, 127) if bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def fit_scales(groups: npt.NDArray[Any], importance: npt.NDArray[Any] | None, bits: int) -> F32:
    """The scale, exact in float16, of each row of `groups` [n, group]; `importance` [group] or [n, group] weighs its
    columns (None: all alike). Raises `ModelError` for weights beyond the reach of a float16 scale."""
    out = np.empty(len(groups), np.float32)
    step = max(1, CHUNK_ELEMENTS // groups.shape[1])
    for begin in range(0, len(groups), step):
        part = slice(begin, begin + step)
        weighed = importance[part] if importance is not None and importance.ndim == 2 else importance
        out[part] = _fit(np.asarray(groups[part], np.float32), weighed, bits)
    return out


def nearest(values: F32, scales: F32, bits: int) -> F32:
    """Codes (as float32) of values under scales that broadcast; 0 where the scale is 0."""
    least, greatest = code_range(bits)
    codes: F32 = values * reciprocal(scales)
    np.rint(codes, out=codes)
    np.clip(codes, least, greatest, out=codes)
    return codes


def reciprocal(scales: F32) -> F32:
    """1 / scale, 0 where the scale is 0 (or its reciprocal would be infinite)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: F32 = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _fit(x: F32, importance: npt.NDArray[Any] | None, bits: int) -> F32:
    least, _ = code_range(bits)
    top, bottom = x.max(axis=1), x.min(axis=1)
    extreme = np.where(top <= -bottom, bottom, top)
    base = extreme / np.float32(least)
    h = np.ones(x.shape[1], np.float32) if importance is None else np.asarray(importance, np.float32)
    best = to_half(base)
    if not np.isfinite(best).all():
        raise ModelError("a weight is too great for a float16 scale")
    lowest = np.full(len(x), np.inf, np.float32)
    work = np.empty_like(x)
    for factor in FACTORS[bits]:
        best, lowest = _better(x, h, to_half(base * np.float32(factor)), best, lowest, bits, work)
    codes = nearest(x, best[:, None], bits)
    weighed = codes * h
    norm = np.einsum("ij,ij->i", weighed, codes)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        squares = np.einsum("ij,ij->i", weighed, x) / norm
    scales = np.where(norm > 0, to_half(np.where(norm > 0, squares, np.float32(0))), best)
    return _better(x, h, scales, best, lowest, bits, work)[0]


def _better(x: F32, h: F32, scales: F32, best: F32, lowest: F32, bits: int, work: F32) -> tuple[F32, F32]:
    """The better of two scales for each row, and its weighed squared error; `work` is overwritten."""
    least, greatest = code_range(bits)
    np.multiply(x, reciprocal(scales)[:, None], out=work)
    np.rint(work, out=work)
    np.clip(work, least, greatest, out=work)
    work *= scales[:, None]
    work -= x
    work *= work
    total = work @ h if h.ndim == 1 else np.einsum("ij,ij->i", work, h)
    wins = np.isfinite(scales) & (total < lowest)
    return np.where(wins, scales, best), np.where(wins, total, lowest)

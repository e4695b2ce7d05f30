"""Round-to-nearest quantization of weight matrices into kernel layout. Knows no data and no model.

The rule, per row and group of `group` columns:

* nested planes: let m be the weight of greatest magnitude. The scale D takes the sign that puts m on the negative side,
  whose codes reach further. `cover` is the least |D| at which no combined code clips; D is the best, by squared error
  of the hi plane alone, of cover * (1 + i / 32), i = 0..7, each rounded to float16 first. Then the combined code is
  round(w * 2^lo_shift / D), hi its upper part rounded to nearest, lo the rest. (A scale that lets the outermost weights
  clip would help int4 by another 1 % and cost int8 60 %.) i = 2 is |m| / 8: weights that already lie on an int4 grid of
  ggml's kind (Q4_0) come back exactly.
* hi plane alone: clipping is allowed; |m| / 8 * (24..35) / 32.
* int8: |m| / 127.

A scale is rounded to the nearest float16, but up where that would fall short by more than 2^-10 (subnormal scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import CHUNK_ELEMENTS, pack_int8, pack_planes, split_codes
from haomiao.kernels.packed import GROUPS, PackedTensor
from haomiao.types import F32

NESTED_FACTORS = tuple(1 + i / 32 for i in range(8))
SINGLE_FACTORS = tuple(i / 32 for i in range(24, 36))

_CACHED_ELEMENTS = CHUNK_ELEMENTS // 4
"""Elements worked on at once: the temporaries stay in the core's own cache."""


def quantize_planes(
    weights: npt.NDArray[Any], group: int = 32, lo_shift: int = 4, with_lo: bool = True
) -> PackedTensor:
    """Round a matrix [rows, cols] of floats to nested planes, or to the hi plane alone (`with_lo=False`).

    Raises `ModelError` for weights that are NaN, infinite, or too great for a float16 scale (about 5e5).
    """
    rows, cols = _check(weights, group)
    if not 0 <= lo_shift <= 4:
        raise InputError(f"lo_shift must be 0 to 4, not {lo_shift}")
    scales = np.empty((rows, -(-cols // group)), np.float32)
    hi = np.empty((rows, cols), np.int8)
    lo = np.empty((rows, cols), np.int8) if with_lo else None
    for part in _parts(rows, cols):
        blocks = _groups(weights[part], group)
        if lo is None:
            found, codes = _quantize_single(blocks)
            hi[part] = codes.reshape(part.stop - part.start, -1)[:, :cols]
        else:
            found, codes = _quantize_nested(blocks, lo_shift)
            upper, lower = split_codes(codes.reshape(part.stop - part.start, -1)[:, :cols], lo_shift)
            hi[part], lo[part] = upper, lower
        scales[part] = found.reshape(part.stop - part.start, -1)
    return pack_planes(hi, lo, scales, group, lo_shift if with_lo else 0)


def quantize_int8(weights: npt.NDArray[Any], group: int = 32) -> PackedTensor:
    """Round a matrix [rows, cols] of floats to encoding `int8`, codes in [-127, 127]. Errors as `quantize_planes`."""
    rows, cols = _check(weights, group)
    scales = np.empty((rows, -(-cols // group)), np.float32)
    codes = np.empty((rows, cols), np.int8)
    for part in _parts(rows, cols):
        blocks = _groups(weights[part], group)
        found = _to_half(np.abs(blocks).max(axis=1) / np.float32(127))
        _refuse_overflow(found)
        rounded = np.clip(np.rint(_divided(blocks, found)), -127, 127)
        codes[part] = rounded.reshape(part.stop - part.start, -1)[:, :cols].astype(np.int8)
        scales[part] = found.reshape(part.stop - part.start, -1)
    return pack_int8(codes, scales, group)


def _check(weights: npt.NDArray[Any], group: int) -> tuple[int, int]:
    if weights.ndim != 2 or 0 in weights.shape:
        raise InputError(f"a matrix needs two dimensions, both positive, not {weights.shape}")
    if group not in GROUPS:
        raise InputError(f"group must be 32, 64 or 128, not {group}", param="group")
    return weights.shape[0], weights.shape[1]


def _parts(rows: int, cols: int) -> list[slice]:
    step = max(1, _CACHED_ELEMENTS // cols)
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def _groups(weights: npt.NDArray[Any], group: int) -> F32:
    """[rows, cols] -> float32 [rows * groups, group], missing columns zero. Refuses what is not finite."""
    rows, cols = weights.shape
    padded = -(-cols // group) * group
    block = np.zeros((rows, padded), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        block[:, :cols] = weights
    if not np.isfinite(block).all():
        raise ModelError("a weight is NaN or infinite")
    return block.reshape(-1, group)


def _quantize_nested(x: F32, lo_shift: int) -> tuple[F32, npt.NDArray[np.int16]]:
    """Scales [n] and combined codes [n, group] of groups [n, group]."""
    step = 1 << lo_shift
    least, greatest = -8 * step - 8, 7 * step + 7
    top, bottom = x.max(axis=1), x.min(axis=1)
    negative = top <= -bottom  # the weight of greatest magnitude is negative: a positive scale
    outer = np.where(negative, -bottom, top)
    inner = np.where(negative, top, -bottom)
    cover = np.maximum(outer / np.float32(-least), inner / np.float32(greatest)) * np.float32(step)
    scales = _best_scale(x, np.where(negative, cover, -cover), NESTED_FACTORS)
    codes = np.clip(np.rint(_divided(x, scales / np.float32(step))), np.float32(least), np.float32(greatest))
    return scales, codes.astype(np.int16)


def _quantize_single(x: F32) -> tuple[F32, npt.NDArray[np.int16]]:
    """Scales [n] and codes [n, group] of groups [n, group] for a hi plane alone."""
    top, bottom = x.max(axis=1), x.min(axis=1)
    extreme = np.where(top <= -bottom, bottom, top)
    scales = _best_scale(x, extreme / np.float32(-8), SINGLE_FACTORS)
    return scales, np.clip(np.rint(_divided(x, scales)), -8, 7).astype(np.int16)


def _best_scale(x: F32, base: F32, factors: Sequence[float]) -> F32:
    """The float16 scale base * factor [n] with the least squared error of codes in [-8, 7]; the first among equals."""
    best = _to_half(base * np.float32(factors[0]))
    _refuse_overflow(best)
    least = _squared_error(x, best)
    for factor in factors[1:]:
        scales = _to_half(base * np.float32(factor))
        error = np.where(np.isfinite(scales), _squared_error(x, scales), np.float32(np.inf))
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, scales, best)
    return best


def _squared_error(x: F32, scales: F32) -> F32:
    """Squared error [n] of groups [n, group] rounded to codes in [-8, 7]."""
    codes = _divided(x, scales)
    rounded: F32 = np.rint(codes)
    np.clip(rounded, np.float32(-8), np.float32(7), out=rounded)
    codes -= rounded
    total: F32 = np.einsum("ij,ij->i", codes, codes)
    with np.errstate(over="ignore", invalid="ignore"):
        error: F32 = total * scales * scales
    return error


def _divided(x: F32, scales: F32) -> F32:
    """x / scale, 0 where the scale is 0."""
    safe: F32 = np.where(scales == 0, np.float32(1), scales)
    quotient: F32 = x / safe[:, None]
    return quotient


def _to_half(scales: F32) -> F32:
    """The nearest float16 (as float32), or the next one away from zero where the nearest falls short by over 2^-10."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
        short = np.abs(halves.astype(np.float32)) < np.abs(scales) * np.float32(1 - 2**-10)
        outward = np.nextafter(halves, np.copysign(np.float16(np.inf), scales).astype(np.float16))
        return np.where(short, outward, halves).astype(np.float32)


def _refuse_overflow(scales: F32) -> None:
    if not np.isfinite(scales).all():
        raise ModelError("a weight is too great for a float16 scale")

"""The numpy twin of native/kernels/quantize: the scales and codes of round-to-nearest, to the bit.

Knows groups of finite weights, not matrices. The rule is stated in `rtn`; float32 throughout, squared errors are
summed in 16 lanes (index % 16), which are then added 8, 4, 2, 1 apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError
from haomiao.types import F32

NESTED_FACTORS = tuple(i / 32 for i in range(32, 40))
WITHIN_INT8_FACTORS = tuple(i / 32 for i in range(32, 37))
INT8_LEAST = -128
SINGLE_FACTORS = tuple(i / 32 for i in range(24, 36))


def quantize_nested(x: F32, lo_shift: int) -> tuple[F32, npt.NDArray[np.int16]]:
    """Scales [n] and combined codes [n, group] of groups [n, group]."""
    step = 1 << lo_shift
    least, greatest = -8 * step - 8, 7 * step + 7
    top, bottom = x.max(axis=1), x.min(axis=1)
    negative = top <= -bottom  # the weight of greatest magnitude is negative: a positive scale
    outer = np.where(negative, -bottom, top)
    inner = np.where(negative, top, -bottom)
    cover = np.maximum(outer / np.float32(-least), inner / np.float32(greatest)) * np.float32(step)
    scales = _best_scale(x, np.where(negative, cover, -cover), NESTED_FACTORS)
    codes = np.clip(np.rint(divided(x, scales / np.float32(step))), np.float32(least), np.float32(greatest))
    return scales, codes.astype(np.int16)


def quantize_within_int8(x: F32, lo_shift: int) -> tuple[F32, npt.NDArray[np.int16]]:
    """As `quantize_nested`, for groups whose codes it puts below -128: in [-128, 119] for `lo_shift` 4."""
    step = 1 << lo_shift
    top, bottom = x.max(axis=1), x.min(axis=1)
    extreme = np.where(top <= -bottom, bottom, top)
    scales = _best_scale(x, extreme / np.float32(-8), WITHIN_INT8_FACTORS)
    codes = np.rint(divided(x, scales / np.float32(step)))
    return scales, np.clip(codes, max(INT8_LEAST, -8 * step - 8), 7 * step + 7).astype(np.int16)


def quantize_single(x: F32) -> tuple[F32, npt.NDArray[np.int16]]:
    """Scales [n] and codes [n, group] of groups [n, group] for a hi plane alone."""
    top, bottom = x.max(axis=1), x.min(axis=1)
    extreme = np.where(top <= -bottom, bottom, top)
    scales = _best_scale(x, extreme / np.float32(-8), SINGLE_FACTORS)
    return scales, np.clip(np.rint(divided(x, scales)), -8, 7).astype(np.int16)


def _best_scale(x: F32, base: F32, factors: Sequence[float]) -> F32:
    """The float16 scale base * factor [n] with the least squared error of codes in [-8, 7]; the first among equals."""
    best = to_half(base * np.float32(factors[0]))
    refuse_overflow(best)
    least = _squared_error(x, best)
    for factor in factors[1:]:
        scales = to_half(base * np.float32(factor))
        error = np.where(np.isfinite(scales), _squared_error(x, scales), np.float32(np.inf))
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, scales, best)
    return best


def _squared_error(x: F32, scales: F32) -> F32:
    """Squared error [n] of groups [n, group] rounded to codes in [-8, 7]."""
    codes = divided(x, scales)
    rounded: F32 = np.rint(codes)
    np.clip(rounded, np.float32(-8), np.float32(7), out=rounded)
    codes -= rounded
    codes *= codes
    lanes: F32 = codes.reshape(len(codes), -1, 16)
    total = lanes[:, 0].copy()
    for part in range(1, lanes.shape[1]):
        total += lanes[:, part]
    for distance in (8, 4, 2, 1):
        total = total[:, :distance] + total[:, distance:]
    with np.errstate(over="ignore", invalid="ignore"):
        error: F32 = total[:, 0] * scales * scales
    return error


def divided(x: F32, scales: F32) -> F32:
    """x / scale, 0 where the scale is 0."""
    safe: F32 = np.where(scales == 0, np.float32(1), scales)
    quotient: F32 = x / safe[:, None]
    return quotient


def to_half(scales: F32) -> F32:
    """The nearest float16 (as float32), or the next one away from zero where the nearest falls short by over 2^-10."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
        short = np.abs(halves.astype(np.float32)) < np.abs(scales) * np.float32(1 - 2**-10)
        outward = np.nextafter(halves, np.copysign(np.float16(np.inf), scales).astype(np.float16))
        return np.where(short, outward, halves).astype(np.float32)


def refuse_overflow(scales: F32) -> None:
    if not np.isfinite(scales).all():
        raise ModelError("a weight is too great for a float16 scale")

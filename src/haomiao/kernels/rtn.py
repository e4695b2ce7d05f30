"""Round-to-nearest quantization of weight matrices into kernel layout. Knows no data and no model.

The rule, per row and group of `group` columns:

* nested planes: let m be the weight of greatest magnitude. The scale D takes the sign that puts m on the negative side,
  whose codes reach further. `cover` is the least |D| at which no combined code clips; D is the best, by squared error
  of the hi plane alone, of cover * (1 + i / 32), i = 0..7, each rounded to float16 first. Then the combined code is
  round(w * 2^lo_shift / D), hi its upper part rounded to nearest, lo the rest. (A scale that lets the outermost weights
  clip would help int4 by another 1 % and cost int8 60 %.) i = 2 is |m| / 8: weights that already lie on an int4 grid of
  ggml's kind (Q4_0) come back exactly.
* nested planes within int8 (heads, so that ggml's Q8_0 holds them): as above where no combined code is below -128;
  elsewhere |m| / 8 * (32..36) / 32, the codes in [-128, 119].
* hi plane alone: clipping is allowed; |m| / 8 * (24..35) / 32.
* int8: |m| / 127.

A scale is rounded to the nearest float16, but up where that would fall short by more than 2^-10 (subnormal scales).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import CHUNK_ELEMENTS, pack_int8, pack_planes, split_codes
from haomiao.kernels.packed import GROUPS, PackedTensor
from haomiao.kernels.rtn_reference import INT8_LEAST, divided, quantize_within_int8, refuse_overflow, to_half
from haomiao.types import F32

_CACHED_ELEMENTS = CHUNK_ELEMENTS // 4
"""Elements worked on at once: the temporaries stay in the core's own cache."""


def quantize_planes(
    weights: npt.NDArray[Any],
    group: int = 32,
    lo_shift: int = 4,
    with_lo: bool = True,
    *,
    within_int8: bool = False,
) -> PackedTensor:
    """Round a matrix [rows, cols] of floats to nested planes, or to the hi plane alone (`with_lo=False`);
    `within_int8`: no combined code is below -128.

    Raises `ModelError` for weights that are NaN, infinite, or too great for a float16 scale (about 5e5).
    """
    from haomiao import _core

    rows, cols = _check(weights, group)
    if not 0 <= lo_shift <= 4:
        raise InputError(f"lo_shift must be 0 to 4, not {lo_shift}")
    scales = np.empty((rows, -(-cols // group)), np.float32)
    hi = np.empty((rows, cols), np.int8)
    lo = np.empty((rows, cols), np.int8) if with_lo else None
    for part in _parts(rows, cols):
        blocks = _groups(weights[part], group)
        found = np.empty(len(blocks), np.float32)
        upper = np.empty(blocks.shape, np.int8)
        lower = np.empty(blocks.shape, np.int8) if with_lo else None
        if not _core.quantize_planes(blocks, lo_shift, found, upper, lower):
            raise ModelError("a weight is too great for a float16 scale")
        if within_int8 and lower is not None:
            _within_int8(blocks, lo_shift, found, upper, lower)
        count = part.stop - part.start
        scales[part] = found.reshape(count, -1)
        hi[part] = upper.reshape(count, -1)[:, :cols]
        if lo is not None and lower is not None:
            lo[part] = lower.reshape(count, -1)[:, :cols]
    return pack_planes(hi, lo, scales, group, lo_shift if with_lo else 0)


def quantize_int8(weights: npt.NDArray[Any], group: int = 32) -> PackedTensor:
    """Round a matrix [rows, cols] of floats to encoding `int8`, codes in [-127, 127]. Errors as `quantize_planes`."""
    rows, cols = _check(weights, group)
    scales = np.empty((rows, -(-cols // group)), np.float32)
    codes = np.empty((rows, cols), np.int8)
    for part in _parts(rows, cols):
        blocks = _groups(weights[part], group)
        found = to_half(np.abs(blocks).max(axis=1) / np.float32(127))
        refuse_overflow(found)
        rounded = np.clip(np.rint(divided(blocks, found)), -127, 127)
        codes[part] = rounded.reshape(part.stop - part.start, -1)[:, :cols].astype(np.int8)
        scales[part] = found.reshape(part.stop - part.start, -1)
    return pack_int8(codes, scales, group)


def _within_int8(blocks: F32, lo_shift: int, scales: F32, hi: npt.NDArray[np.int8], lo: npt.NDArray[np.int8]) -> None:
    """Round anew, in place, the groups that hold a combined code below -128."""
    beyond = np.flatnonzero(((hi.astype(np.int16) << lo_shift) + lo).min(axis=1) < INT8_LEAST)
    if len(beyond):
        scales[beyond], codes = quantize_within_int8(blocks[beyond], lo_shift)
        hi[beyond], lo[beyond] = split_codes(codes, lo_shift)


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

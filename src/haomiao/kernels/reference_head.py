"""The numpy twin of the screening kernels (native/kernels/head/head.h): what the hi plane says of the head's logits.

Bounds are float64 without allowance for rounding: what they mean, not their bits. The argmax is exact. Knows nothing
about plans or steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.kernels import reference
from haomiao.kernels.pack import pack_planes, unpack_codes
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.types import F32

F64 = npt.NDArray[np.float64]
GROUP = reference.ACTIVATION_GROUP


def lo_norms(packed: PackedTensor) -> F64:
    """[tiles, padded_cols / 32]: the greatest |lo| / 2^lo_shift among a tile's rows, per group of 32 columns."""
    hi, _ = unpack_codes(packed, "hi")
    both, _ = unpack_codes(packed, "hi+lo")
    lo = np.zeros((packed.tiles * TILE_ROWS, packed.padded_cols))
    lo[: packed.rows, : packed.cols] = both - hi.astype(np.int32) * 2**packed.lo_shift
    norms: F64 = np.linalg.norm(lo.reshape(packed.tiles, TILE_ROWS, -1, GROUP), axis=-1).max(axis=1)
    norms /= 2**packed.lo_shift
    return norms


def sketch(packed: PackedTensor) -> tuple[PackedTensor, F64]:
    """The hi plane that a matrix of one-byte codes is screened by, and the norms of what it leaves out, as `lo_norms`.

    Codes of the plane are multiples of 16 of the matrix's. Raises `ModelError` if 16 times a scale exceeds float16.
    """
    codes, scales = unpack_codes(packed)
    hi = np.clip((codes + 8) // 16, -8, 7)
    rest = np.zeros((packed.tiles * TILE_ROWS, packed.padded_cols))
    rest[: packed.rows, : packed.cols] = codes - 16 * hi
    norms: F64 = np.linalg.norm(rest.reshape(packed.tiles, TILE_ROWS, -1, GROUP), axis=-1).max(axis=1) / 16
    return pack_planes(hi, None, 16 * scales, packed.group, 0), norms


def lengths(x: F32, padded_cols: int) -> F64:
    """[padded_cols / 32]: what |s q| of every group of an activation row x [cols] cannot exceed."""
    padded = np.zeros(padded_cols)
    padded[: x.shape[0]] = x
    groups = padded.reshape(-1, GROUP)
    found: F64 = np.linalg.norm(groups, axis=1) + np.sqrt(GROUP) * np.abs(groups).max(axis=1) / 254
    return found


def bounds(packed: PackedTensor, x: F32) -> F64:
    """[rows]: what no logit of x [cols] exceeds."""
    coarse, left_out = sketch(packed) if packed.encoding == "int8" else (packed, lo_norms(packed))
    _, scales = unpack_codes(coarse, "hi")
    per_group = np.repeat(np.abs(scales.astype(np.float64)), packed.group // GROUP, axis=1)
    norms = np.repeat(left_out, TILE_ROWS, axis=0)[: packed.rows]
    hi = reference.linear(coarse, x[None], "hi")[0]
    found: F64 = hi + (per_group * norms) @ lengths(x, packed.padded_cols)
    return found


def screened_argmax(packed: PackedTensor, x: F32) -> tuple[int, npt.NDArray[Any]]:
    """(the full head's argmax for x [cols], the tiles for which both planes were needed)."""
    upper = np.full(packed.tiles * TILE_ROWS, -np.inf)
    upper[: packed.rows] = bounds(packed, x)
    upper = upper.reshape(packed.tiles, TILE_ROWS).max(axis=1)
    exact = np.full(packed.tiles * TILE_ROWS, -np.inf, np.float32)
    exact[: packed.rows] = reference.linear(packed, x[None], "hi+lo")[0]
    tiles = exact.reshape(packed.tiles, TILE_ROWS)
    needed = np.flatnonzero(upper >= tiles[upper.argmax()].max())
    best = needed[tiles[needed].max(axis=1).argmax()]
    return int(best * TILE_ROWS + tiles[best].argmax()), needed

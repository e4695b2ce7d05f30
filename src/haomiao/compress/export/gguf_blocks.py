"""GGML's blocks from codes and scales: the narrowest type that holds every weight exactly. Knows no names, no files.

Q4_0: f16 d, then 16 bytes, byte j holding elements j (low nibble) and j + 16; w = d (q - 8). Q4_1: f16 d and m, nibbles
as before; w = d q + m. Q8_0: f16 d, then 32 int8; w = d q (ggml-common.h, ggml-org/ggml). All have 32 weights a block,
so the scale of a group of 64 or 128 is repeated. Nothing is rounded: a type gets only what it holds to the bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from haomiao.types import F32, U8

BLOCK = 32

I16 = npt.NDArray[np.int16]
F16 = npt.NDArray[np.float16]


def pack_blocks(codes: I16, scales: F32, group: int) -> tuple[str, U8] | None:
    """Codes [rows, cols] with scales [rows, groups] as (type name, bytes [rows, cols / 32 * block bytes]).

    None if no type holds them: columns are not whole blocks, a code is beyond int8, or a scale is not a float16.
    """
    rows, cols = codes.shape
    if cols % BLOCK:
        return None
    halves = scales.astype(np.float16)
    if not np.array_equal(halves, scales):
        return None
    d = np.repeat(halves, group // BLOCK, axis=1)[:, : cols // BLOCK]
    blocks = codes.reshape(rows, -1, BLOCK)
    least, greatest = int(codes.min()), int(codes.max())
    if least >= -8 and greatest <= 7:
        return "q4_0", _joined(d, None, _nibbles(blocks + np.int16(8)))
    if least >= -15 and greatest <= 15 and (zeros := _zeros(blocks, d)) is not None:
        minimums = d * zeros.astype(np.float16)
        return "q4_1", _joined(d, minimums, _nibbles(blocks - zeros[..., None]))
    if least < -128 or greatest > 127:
        return None
    return "q8_0", _joined(d, None, blocks.astype(np.int8).view(np.uint8))


def _zeros(blocks: I16, d: F16) -> I16 | None:
    """A whole number z in [-15, 0] for each block [rows, blocks] with 0 <= q - z <= 15 and d z exact in float16; None
    if a block has none."""
    lowest, highest = blocks.min(axis=2), blocks.max(axis=2)
    zeros = np.full(lowest.shape, 1, np.int16)
    wide = d.astype(np.float32)
    for z in range(-15, 1):
        product = wide * np.float32(z)
        with np.errstate(over="ignore"):
            exact = product.astype(np.float16) == product
        fits = (lowest >= z) & (highest - z <= 15) & exact
        zeros = np.where(fits, np.int16(z), zeros)
    return None if (zeros > 0).any() else zeros


def _nibbles(codes: I16) -> U8:
    """[rows, blocks, 32] of [0, 15] -> [rows, blocks, 16]: element j low, element j + 16 high."""
    small = codes.astype(np.uint8)
    packed: U8 = small[..., :16] | (small[..., 16:] << np.uint8(4))
    return packed


def _joined(d: F16, m: F16 | None, codes: U8) -> U8:
    """Halves, then code bytes, block by block: uint8 [rows, bytes]."""
    halves = [part.astype("<f2")[..., None].view(np.uint8) for part in (d, m) if part is not None]
    return np.concatenate([*halves, codes], axis=2).reshape(len(codes), -1)

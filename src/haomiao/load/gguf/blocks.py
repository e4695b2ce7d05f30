"""GGML's block types: sizes, and dequantization to float32, vectorized over blocks.

The byte layouts are those of ggml-common.h (ggml-org/ggml, `block_q4_0` ... `block_iq4_xs`); the order of operations is
that of its reference dequantizers, so that values agree to the last bit. Knows nothing about files or tensors' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from haomiao.types import F32, U8

I8: TypeAlias = npt.NDArray[np.int8]
Array: TypeAlias = npt.NDArray[Any]

CHUNK_ELEMENTS = 1 << 20
"""Elements dequantized at once, so that the extra memory does not grow with the tensor."""

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
"""The non-linear 4-bit code of IQ4_NL and IQ4_XS (`kvalues_iq4nl`)."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` consecutive values of a row are stored in `bytes`."""

    name: str
    elements: int
    bytes: int


TYPES: dict[int, BlockType] = {
    number: BlockType(name, elements, size)
    for number, name, elements, size in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_k", 256, 84),
        (11, "q3_k", 256, 110),
        (12, "q4_k", 256, 144),
        (13, "q5_k", 256, 176),
        (14, "q6_k", 256, 210),
        (15, "q8_k", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
    )
}
"""By number. Only those with an entry in `DEQUANTIZERS`, and f32, f16 and bf16, can be read."""


def dequantize(data: U8, type_name: str) -> F32:
    """Flat bytes of whole blocks -> float32 [values]. `type_name` must be in `DEQUANTIZERS`."""
    block = next(block for block in TYPES.values() if block.name == type_name)
    function = DEQUANTIZERS[type_name]
    blocks = data.reshape(-1, block.bytes)
    out = np.empty((len(blocks), block.elements), dtype=np.float32)
    step = max(1, CHUNK_ELEMENTS // block.elements)
    for begin in range(0, len(blocks), step):
        out[begin : begin + step] = function(blocks[begin : begin + step]).reshape(-1, block.elements)
    return out.reshape(-1)


def codes_q4_0(data: U8) -> tuple[I8, F32]:
    """Q4_0 as it is: codes in [-8, 7], int8 [blocks, 32], and scales, float32 [blocks]."""
    blocks = data.reshape(-1, 18)
    return (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)), _half(blocks, 0)[:, 0]


def codes_q4_1(data: U8) -> tuple[I8, F32] | None:
    """Q4_1 as codes in [-15, 15] and scales, as `codes_q4_0`, if every minimum is its scale times a whole number from
    -15 to 0 (checkpoints with integer zero-points, exported); None otherwise."""
    blocks = data.reshape(-1, 20)
    scales, minimums = _half(blocks, 0), _half(blocks, 2)
    with np.errstate(all="ignore"):
        offsets = np.where(scales == 0, 0, np.rint(minimums / scales))
    if not ((offsets >= -15) & (offsets <= 0) & (offsets * scales == minimums)).all():
        return None
    return _nibbles(blocks[:, 4:]).view(np.int8) + offsets.astype(np.int8), scales[:, 0]


def codes_q8_0(data: U8) -> tuple[I8, F32]:
    """Q8_0 as it is: codes int8 [blocks, 32], and scales, float32 [blocks]."""
    blocks = data.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)[:, 0]


# ---- pieces that several types share ------------------------------------------------------------------------------


def _half(blocks: U8, offset: int) -> F32:
    """The f16 at byte `offset` of every block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """[blocks, n] bytes -> [blocks, 2n]: the n low nibbles, then the n high ones."""
    out = np.empty((len(packed), 2, packed.shape[1]), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=out[:, 0])
    np.right_shift(packed, 4, out=out[:, 1])
    return out.reshape(len(packed), -1)


def _crumbs(packed: U8, shifts: tuple[int, ...], mask: int) -> U8:
    """[blocks, 2, n] bytes -> [blocks, 2, shifts, n]: (byte >> shift) & mask for each shift."""
    shift = np.array(shifts, dtype=np.uint8).reshape(1, 1, -1, 1)
    crumbs: U8 = (packed[:, :, None, :] >> shift) & np.uint8(mask)
    return crumbs


def _fifth_bits(blocks: U8, offset: int) -> U8:
    """The u32 at `offset` as 32 bits, each worth 16: uint8 [blocks, 32]."""
    bits: U8 = np.unpackbits(blocks[:, offset : offset + 4], axis=1, bitorder="little")
    return np.left_shift(bits, np.uint8(4))


def _scales_6bit(packed: U8) -> tuple[U8, U8]:
    """Eight 6-bit scales and eight 6-bit minimums in 12 bytes (Q4_K, Q5_K): two uint8 [blocks, 8]."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minimums


# ---- one function per type: uint8 [blocks, bytes] -> float32 [blocks, ...] in the order of the row -------------------


def _q4_0(blocks: U8) -> Array:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(blocks: U8) -> Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: U8) -> Array:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(np.float32) - np.float32(16))


def _q5_1(blocks: U8) -> Array:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: U8) -> Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(blocks: U8) -> Array:
    scales = blocks[:, 0:16]
    codes = _crumbs(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).astype(np.float32)
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return scale[:, :, None] * codes - minimum[:, :, None]


def _q3_k(blocks: U8) -> Array:
    low = _crumbs(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    bits = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1)
    high = (blocks[:, None, None, 0:32] >> bits) & np.uint8(1)
    codes = ((low | (high << 2)).astype(np.float32) - np.float32(4)).reshape(-1, 16, 16)
    packed = blocks[:, 96:108]
    upper = _crumbs(packed[:, 8:12].reshape(-1, 1, 4), (0, 2, 4, 6), 3).reshape(-1, 16)
    scales = (_nibbles(packed[:, 0:8]) | (upper << 4)).astype(np.float32) - np.float32(32)
    values: Array = (_half(blocks, 108) * scales)[:, :, None] * codes
    return values


def _q4_k(blocks: U8) -> Array:
    scales, minimums = _scales_6bit(blocks[:, 4:16])
    codes = _half_bytes(blocks[:, 16:144]).astype(np.float32)
    scale = _half(blocks, 0) * scales.astype(np.float32)
    minimum = _half(blocks, 2) * minimums.astype(np.float32)
    return scale[:, :, None] * codes - minimum[:, :, None]


def _q5_k(blocks: U8) -> Array:
    scales, minimums = _scales_6bit(blocks[:, 4:16])
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = ((blocks[:, None, 16:48] >> bits) & np.uint8(1)) << 4
    codes = (_half_bytes(blocks[:, 48:176]) | high).astype(np.float32)
    scale = _half(blocks, 0) * scales.astype(np.float32)
    minimum = _half(blocks, 2) * minimums.astype(np.float32)
    return scale[:, :, None] * codes - minimum[:, :, None]


def _half_bytes(packed: U8) -> U8:
    """128 bytes -> [blocks, 8, 32]: every 32 bytes hold 32 low nibbles, then the 32 high ones."""
    shift = np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return ((packed.reshape(-1, 4, 1, 32) >> shift) & np.uint8(15)).reshape(-1, 8, 32)


def _q6_k(blocks: U8) -> Array:
    low = _crumbs(blocks[:, 0:128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 2, 4, 32)
    high = _crumbs(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    codes = ((low | (high << 4)).astype(np.float32) - np.float32(32)).reshape(-1, 16, 16)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (_half(blocks, 208) * scales)[:, :, None] * codes


def _iq4_nl(blocks: U8) -> Array:
    return _half(blocks, 0) * IQ4_VALUES[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: U8) -> Array:
    shift = np.array([0, 4], dtype=np.uint8)
    low = ((blocks[:, 4:8, None] >> shift) & np.uint8(15)).reshape(-1, 8)
    upper = _crumbs(blocks[:, 2:4].reshape(-1, 1, 2), (0, 2, 4, 6), 3)  # [blocks, 1, shift, byte]
    upper = upper.transpose(0, 1, 3, 2).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | (upper << 4)).astype(np.float32) - np.float32(32))
    codes = _nibbles(blocks[:, 8:136].reshape(-1, 16)).reshape(-1, 8, 32)
    return scale[:, :, None] * IQ4_VALUES[codes]


DEQUANTIZERS: dict[str, Callable[[U8], Array]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}

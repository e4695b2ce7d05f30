"""Packing of matrices into kernel layout and back (docs/ARCHITECTURE.md, section 4), vectorized numpy.

Bytes only: how codes and scales are chosen lives in `rtn` and in `compress`, arithmetic in the kernels. Large matrices
are worked off in chunks of whole tiles, so that the extra memory does not grow with the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, ModelError
from haomiao.kernels.packed import (
    GROUPS,
    TILE_ROWS,
    Encoding,
    PackedTensor,
    pack_mask,
    padded_columns,
    tile_bytes,
)
from haomiao.types import F32, U8

I8: TypeAlias = npt.NDArray[np.int8]
F16: TypeAlias = npt.NDArray[np.float16]
U16: TypeAlias = npt.NDArray[np.uint16]
Array: TypeAlias = npt.NDArray[Any]

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once; a chunk is at least one tile."""

SCALE_BYTES = 2 * TILE_ROWS

ZERO_BYTES = {"int8": 0x80, "planes": 0x88}
"""A byte of codes that are all 0."""

LEAST_EMPTY = 1 / 64
"""Share of blocks without a code from which on a tile mask is worth its name."""


def row_chunks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of whole 32-row tiles (the last may end inside one), about `CHUNK_ELEMENTS` elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, cols * TILE_ROWS)) * TILE_ROWS
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))


# ---- packing --------------------------------------------------------------------------------------------------------


def pack_f32(weights: Array) -> PackedTensor:
    """Encoding `f32` of a matrix [rows, cols] of any float type. Raises `ModelError` for NaN or infinite weights."""

    def tiles(rows: slice, out: U8) -> None:
        block = _tiled(_finite(weights[rows]), cols)  # [tiles, 32, cols]
        out.view("<f4").reshape(-1, cols, TILE_ROWS)[...] = block.transpose(0, 2, 1)

    rows, cols = _shape(weights)
    return _pack("f32", rows, cols, 0, 0, tiles)


def pack_bf16(weights: Array) -> PackedTensor:
    """Encoding `bf16`, rounded to nearest, ties to even. Raises `ModelError` for what is not finite as bf16."""

    def tiles(rows: slice, out: U8) -> None:
        halves = to_bf16(_finite(weights[rows]))
        if ((halves & 0x7F80) == 0x7F80).any():
            raise ModelError("a weight is beyond the range of bfloat16")
        block = _tiled(halves, padded).view("<u4")  # [tiles, 32, padded / 2] pairs of columns
        out.view("<u4").reshape(-1, padded // 2, TILE_ROWS)[...] = block.transpose(0, 2, 1)

    rows, cols = _shape(weights)
    padded = padded_columns("bf16", cols, 0)
    return _pack("bf16", rows, cols, 0, 0, tiles)


def pack_int8(codes: Array, scales: Array, group: int) -> PackedTensor:
    """Encoding `int8`: w = scale * code.

    `codes` are integers in [-128, 127], [rows, cols]; `scales` are floats exact in float16, [rows, ceil(cols / group)].
    Raises `InputError` for shapes and ranges that contradict this, `ModelError` for scales that are not finite.
    """

    def tiles(rows: slice, out: U8) -> None:
        block = _tiled(codes[rows].astype(np.int8), padded).view(np.uint8) ^ 0x80  # q + 128, padding: q = 0
        groups = out.reshape(-1, padded // group, SCALE_BYTES + group * TILE_ROWS)
        _store_scales(scales16[rows], groups)
        quads = block.view("<u4").reshape(len(groups), TILE_ROWS, -1, group // 4)
        runs = np.ascontiguousarray(quads.transpose(0, 2, 3, 1))  # [tiles, groups, group / 4, 32] of 4 columns each
        groups[:, :, SCALE_BYTES:] = runs.view(np.uint8).reshape(len(groups), padded // group, -1)

    rows, cols = _shape(codes)
    padded = _check_group("int8", cols, group)
    scales16 = _check_scales(scales, rows, padded // group)
    _check_range(codes, -128, 127, "int8 code")
    return _pack("int8", rows, cols, group, 0, tiles)


def pack_planes(hi: Array, lo: Array | None, scales: Array, group: int, lo_shift: int) -> PackedTensor:
    """Encoding `planes`: w = scale * hi at int4, scale / 2^lo_shift * ((hi << lo_shift) + lo) at int8.

    `hi` and `lo` are integers in [-8, 7], [rows, cols]; `scales` as in `pack_int8`. Without `lo`, `lo_shift` must be 0.
    """

    def tiles(rows: slice, out: U8) -> None:
        groups = out.reshape(-1, padded // group, SCALE_BYTES + group * TILE_ROWS // 2)
        _store_scales(scales16[rows], groups)
        groups[:, :, SCALE_BYTES:] = _nibbles(hi[rows], padded).reshape(len(groups), padded // group, -1)

    def lo_tiles(rows: slice, out: U8) -> None:
        assert lo is not None
        out.reshape(-1)[...] = _nibbles(lo[rows], padded).reshape(-1)

    rows, cols = _shape(hi)
    padded = _check_group("planes", cols, group)
    scales16 = _check_scales(scales, rows, padded // group)
    _check_range(hi, -8, 7, "hi code")
    if lo is None:
        if lo_shift != 0:
            raise InputError("lo_shift means nothing without a lo plane")
        return _pack("planes", rows, cols, group, 0, tiles)
    if lo.shape != hi.shape:
        raise InputError(f"the planes differ in shape: hi {hi.shape}, lo {lo.shape}")
    if not 0 <= lo_shift <= 4:
        raise InputError(f"lo_shift must be 0 to 4, not {lo_shift}")
    _check_range(lo, -8, 7, "lo code")
    return _pack("planes", rows, cols, group, lo_shift, tiles, lo_tiles)


def split_codes(codes: Array, lo_shift: int) -> tuple[I8, I8]:
    """Integer codes as nested planes (hi, lo): hi is code / 2^lo_shift rounded to nearest (ties up) into [-8, 7], and
    code = (hi << lo_shift) + lo. Raises `InputError` for codes that do not fit."""
    step = 1 << lo_shift
    least, greatest = -8 * step - 8, 7 * step + 7
    if codes.min() < least or codes.max() > greatest:
        raise InputError(f"a code is outside [{least}, {greatest}], the range of planes with lo_shift {lo_shift}")
    wide = codes.astype(np.int16)
    hi = np.clip((wide + np.int16(step // 2)) >> np.int16(lo_shift), -8, 7).astype(np.int16)
    return hi.astype(np.int8), (wide - (hi << np.int16(lo_shift))).astype(np.int8)


def to_bf16(values: F32) -> U16:
    """Upper halves of float32, rounded to nearest, ties to even. Not for NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bf16(halves: U16) -> F32:
    """The float32 values whose upper halves these are."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ---- unpacking ------------------------------------------------------------------------------------------------------


def unpack(packed: PackedTensor, planes: Literal["hi", "hi+lo"] = "hi+lo") -> F32:
    """The weights as float32 [rows, cols]. `planes` says which planes of encoding `planes` are read; a tensor without
    `lo` has only one reading. Exact: every code times its scale fits float32."""
    out = np.empty((packed.rows, packed.cols), np.float32)
    for rows in row_chunks(packed.rows, packed.padded_cols):
        block: Array
        if packed.encoding == "f32":
            block = _tiles_of(packed, rows).view("<f4").reshape(-1, packed.cols, TILE_ROWS).transpose(0, 2, 1)
        elif packed.encoding == "bf16":
            pairs = _tiles_of(packed, rows).view("<u4").reshape(-1, packed.padded_cols // 2, TILE_ROWS)
            block = from_bf16(np.ascontiguousarray(pairs.transpose(0, 2, 1)).view("<u2"))
        else:
            codes, shift = _chunk_codes(packed, rows, planes)
            scales = _chunk_scales(packed, rows) * np.float32(2.0**-shift)
            block = codes.reshape(*scales.shape, packed.group) * scales[..., None]
        out[rows] = block.reshape(-1, packed.padded_cols)[: rows.stop - rows.start, : packed.cols]
    return out


def unpack_codes(packed: PackedTensor, planes: Literal["hi", "hi+lo"] = "hi+lo") -> tuple[npt.NDArray[np.int16], F32]:
    """Integer codes int16 [rows, cols] and the scale of each group float32 [rows, groups] (2^-lo_shift included), of an
    encoding that has them: w = scale * code. Raises `InputError` for `f32` and `bf16`."""
    if packed.encoding not in ("int8", "planes"):
        raise InputError(f"encoding {packed.encoding} has no codes")
    codes = np.empty((packed.rows, packed.cols), np.int16)
    scales = np.empty((packed.rows, packed.padded_cols // packed.group), np.float32)
    for rows in row_chunks(packed.rows, packed.padded_cols):
        block, shift = _chunk_codes(packed, rows, planes)
        codes[rows] = block[: rows.stop - rows.start, : packed.cols]
        scales[rows] = _chunk_scales(packed, rows)[: rows.stop - rows.start] * np.float32(2.0**-shift)
    return codes, scales


# ---- tile masks ------------------------------------------------------------------------------------------------------


def without_empty(packed: PackedTensor, least: float = LEAST_EMPTY) -> PackedTensor:
    """The same weights under a tile mask that leaves out the blocks of 32 rows x `group` columns whose codes are zero
    in all planes. `packed` itself if less than the share `least` of its blocks is, if it has a mask already, or if its
    encoding takes none."""
    if packed.encoding not in ZERO_BYTES or packed.kept is not None:
        return packed
    planes = [packed.hi] if packed.lo is None else [packed.hi, packed.lo]
    blocks = [np.ascontiguousarray(plane).reshape(packed.tiles * packed.groups, -1) for plane in planes]
    empty = np.ones(packed.tiles * packed.groups, np.bool_)
    for width in (8, None):  # a few bytes of every block rule out nearly all that hold something
        for block, begin in zip(blocks, (SCALE_BYTES, 0), strict=False):
            places, codes = np.flatnonzero(empty), slice(begin, begin + width if width else None)
            for some in np.array_split(places, 1 + len(places) * block.shape[1] // CHUNK_ELEMENTS):
                empty[some] = (block[some, codes] == ZERO_BYTES[packed.encoding]).all(axis=1)
    if np.mean(empty) < least:
        return packed
    stored = ~empty.reshape(packed.tiles, packed.groups)
    stored[0, 0] |= not stored.any()  # something must be there
    hi, *lo = (block[stored.reshape(-1)].reshape(-1) for block in blocks)
    return replace(packed, hi=hi, lo=lo[0] if lo else None, kept=pack_mask(stored))


def whole(packed: PackedTensor) -> PackedTensor:
    """The same weights without a tile mask: what it left out has scale 0 and codes 0."""
    if packed.kept is None:
        return packed
    rows = slice(0, packed.rows)
    lo = None if packed.lo is None else groups_of(packed, rows, packed.lo).reshape(-1)
    return replace(packed, hi=groups_of(packed, rows, packed.hi).reshape(-1), lo=lo, kept=None)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _shape(matrix: Array) -> tuple[int, int]:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"a matrix needs two dimensions, both positive, not {matrix.shape}")
    return matrix.shape[0], matrix.shape[1]


def _finite(values: Array) -> F32:
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(block).all():
        raise ModelError("a weight is NaN or infinite")
    return block


def _check_group(encoding: Encoding, cols: int, group: int) -> int:
    if group not in GROUPS:
        raise InputError(f"group must be 32, 64 or 128, not {group}", param="group")
    return padded_columns(encoding, cols, group)


def _check_scales(scales: Array, rows: int, groups: int) -> F16:
    if scales.shape != (rows, groups):
        raise InputError(f"scales must have the shape {(rows, groups)}, not {scales.shape}")
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ModelError("a scale is NaN, infinite or beyond float16")
    if not (halves == scales).all():
        raise InputError("a scale is not exactly representable in float16")
    return halves


def _check_range(codes: Array, least: int, greatest: int, what: str) -> None:
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"{what}s must be integers, not {codes.dtype}")
    if codes.min() < least or codes.max() > greatest:
        raise InputError(f"a {what} is outside [{least}, {greatest}]")


# ---- layout ---------------------------------------------------------------------------------------------------------


def _pack(
    encoding: Encoding,
    rows: int,
    cols: int,
    group: int,
    lo_shift: int,
    tiles: Callable[[slice, U8], None],
    lo_tiles: Callable[[slice, U8], None] | None = None,
) -> PackedTensor:
    """Allocate the sections and fill them chunk by chunk: `tiles(rows, out)` writes the bytes of a range of rows."""
    padded = padded_columns(encoding, cols, group)
    hi_bytes, lo_bytes = tile_bytes(encoding, padded, group)
    count = -(-rows // TILE_ROWS)
    hi = np.empty(count * hi_bytes, np.uint8)
    lo = np.empty(count * lo_bytes, np.uint8) if lo_tiles else None
    for chunk in row_chunks(rows, padded):
        first, last = chunk.start // TILE_ROWS, -(-chunk.stop // TILE_ROWS)
        tiles(chunk, hi[first * hi_bytes : last * hi_bytes])
        if lo_tiles and lo is not None:
            lo_tiles(chunk, lo[first * lo_bytes : last * lo_bytes])
    return PackedTensor(encoding, rows, cols, group, lo_shift, hi, lo)


def _tiled(block: Array, padded_cols: int) -> Array:
    """[rows, cols] -> contiguous [tiles, 32, padded_cols], new rows and columns zero."""
    rows, cols = block.shape
    tiles = -(-rows // TILE_ROWS)
    if (rows, cols) == (tiles * TILE_ROWS, padded_cols):
        return np.ascontiguousarray(block).reshape(tiles, TILE_ROWS, padded_cols)
    out = np.zeros((tiles * TILE_ROWS, padded_cols), block.dtype)
    out[:rows, :cols] = block
    return out.reshape(tiles, TILE_ROWS, padded_cols)


def _store_scales(scales: F16, groups: U8) -> None:
    """Write [rows, groups] scales into the first 64 bytes of each [tile, group]."""
    tiled = _tiled(scales, scales.shape[1])
    groups[:, :, :SCALE_BYTES] = np.ascontiguousarray(tiled.transpose(0, 2, 1)).astype("<f2").view(np.uint8)


def _nibbles(codes: Array, padded_cols: int) -> U8:
    """[rows, cols] of [-8, 7] -> [tiles, padded_cols / 32, 512 bytes]: 8 runs of 64 bytes, run 2j + r for columns
    8j..8j+7 (low nibbles: the first four) and rows 16r..16r+15."""
    block = (_tiled(codes.astype(np.int8), padded_cols) + np.int8(8)).view(np.uint8)
    quads = block.view("<u4").reshape(len(block), 2, 16, padded_cols // 32, 4, 2)  # tile, r, i, block, j, low or high
    pairs = quads[..., 0] | (quads[..., 1] << np.uint32(4))
    runs = np.ascontiguousarray(pairs.transpose(0, 3, 4, 1, 2))  # tile, block, j, r, i
    return runs.view(np.uint8).reshape(len(block), padded_cols // 32, 512)


def _codes_of_nibbles(plane: U8, padded_cols: int) -> npt.NDArray[np.int16]:
    """Inverse of `_nibbles`: [tiles, padded_cols / 32, 512] -> [rows, padded_cols]."""
    runs = np.ascontiguousarray(plane).view("<u4").reshape(-1, padded_cols // 32, 4, 2, 16)
    mask = np.uint32(0x0F0F0F0F)
    quads = np.stack([runs & mask, (runs >> np.uint32(4)) & mask], axis=-1)  # tile, block, j, r, i, low or high
    block = np.ascontiguousarray(quads.transpose(0, 3, 4, 1, 2, 5))  # tile, r, i, block, j, low or high
    return block.view(np.uint8).reshape(-1, padded_cols).astype(np.int16) - np.int16(8)


def _tiles_of(packed: PackedTensor, rows: slice) -> U8:
    """Contiguous bytes of the tiles of `rows`, of an encoding without scales."""
    size = tile_bytes(packed.encoding, packed.padded_cols, packed.group)[0]
    return np.ascontiguousarray(packed.hi[rows.start // TILE_ROWS * size : -(-rows.stop // TILE_ROWS) * size])


def groups_of(packed: PackedTensor, rows: slice, plane: U8) -> U8:
    """[tiles, groups, bytes of a group] of one plane of an encoding with scales, for the tiles of `rows`. Groups that a
    tile mask leaves out have scale 0 and codes 0."""
    first, last = rows.start // TILE_ROWS, -(-rows.stop // TILE_ROWS)
    is_hi = plane is packed.hi
    size = tile_bytes(packed.encoding, packed.group, packed.group)[0 if is_hi else 1]
    if packed.kept is None:
        tile = size * packed.groups
        return np.ascontiguousarray(plane[first * tile : last * tile]).reshape(-1, packed.groups, size)
    stored = packed.stored
    before, here = np.count_nonzero(stored[:first]), stored[first:last]
    out = np.full((*here.shape, size), ZERO_BYTES[packed.encoding], np.uint8)
    if is_hi:
        out[:, :, :SCALE_BYTES] = 0
    out[here] = plane[before * size : (before + np.count_nonzero(here)) * size].reshape(-1, size)
    return out


def _chunk_scales(packed: PackedTensor, rows: slice) -> F32:
    """Stored scales of whole tiles, float32 [rows, groups]."""
    groups = groups_of(packed, rows, packed.hi)
    stored = np.ascontiguousarray(groups[:, :, :SCALE_BYTES]).view("<f2")  # [tiles, groups, 32]
    return stored.transpose(0, 2, 1).reshape(-1, stored.shape[1]).astype(np.float32)


def _chunk_codes(packed: PackedTensor, rows: slice, planes: str) -> tuple[npt.NDArray[np.int16], int]:
    """Codes of whole tiles, int16 [rows, padded_cols], and the shift of their scale: w = scale / 2^shift * code."""
    if planes not in ("hi", "hi+lo"):
        raise InputError(f"planes must be 'hi' or 'hi+lo', not {planes!r}")
    body = groups_of(packed, rows, packed.hi)[:, :, SCALE_BYTES:]
    if packed.encoding == "int8":
        block = body.reshape(len(body), -1, packed.group // 4, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
        return block.reshape(-1, packed.padded_cols).astype(np.int16) - np.int16(128), 0
    hi = _codes_of_nibbles(body, packed.padded_cols)
    if packed.lo is None or planes == "hi":
        return hi, 0
    lo = groups_of(packed, rows, packed.lo)
    return (hi << np.int16(packed.lo_shift)) + _codes_of_nibbles(lo, packed.padded_cols), packed.lo_shift

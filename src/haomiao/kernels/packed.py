"""A matrix in kernel layout (docs/ARCHITECTURE.md, section 4). Knows the sizes, not the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from haomiao.types import B8, U8

Encoding: TypeAlias = Literal["f32", "bf16", "int8", "planes"]
ENCODINGS: tuple[Encoding, ...] = ("f32", "bf16", "int8", "planes")
"""In the order of their numbers in the artifact and in native/kernels/linear/linear.h."""

TILE_ROWS = 32
GROUPS = (32, 64, 128)


def padded_columns(encoding: Encoding, cols: int, group: int) -> int:
    """Columns as stored: a multiple of `group` (int8, planes), of 2 (bf16), or as they are (f32)."""
    unit = group if encoding in ("int8", "planes") else 2 if encoding == "bf16" else 1
    return -(-cols // unit) * unit


def tile_bytes(encoding: Encoding, padded_cols: int, group: int) -> tuple[int, int]:
    """Bytes of one tile of 32 rows: (hi plane or only bytes, lo plane)."""
    if encoding == "f32":
        return padded_cols * TILE_ROWS * 4, 0
    if encoding == "bf16":
        return padded_cols * TILE_ROWS * 2, 0
    groups = padded_cols // group
    if encoding == "int8":
        return groups * (64 + group * TILE_ROWS), 0
    return groups * (64 + group * TILE_ROWS // 2), padded_cols * TILE_ROWS // 2


def pack_mask(stored: B8) -> U8:
    """A tile mask [tiles, groups], True where a group is stored, as bits: flat uint8, whole bytes a tile."""
    return np.packbits(stored, axis=1, bitorder="little").reshape(-1)


def unpack_mask(mask: U8, groups: int) -> B8:
    """Inverse of `pack_mask`: [tiles, groups]."""
    rows = np.ascontiguousarray(mask).reshape(-1, -(-groups // 8))
    return np.unpackbits(rows, axis=1, count=groups, bitorder="little").view(np.bool_)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """`hi` and `lo` are flat uint8, whole tiles in ascending rows; they may be views of a mapped file (read-only).

    With a tile mask (`kept`; int8 and planes) a tile holds only the groups that the mask names, one after the other.
    The others are zero, are no part of any sum, and take no bytes.
    """

    encoding: Encoding
    rows: int
    cols: int
    group: int  # 0 for f32 and bf16
    lo_shift: int  # 0 unless encoding is planes with lo
    hi: U8  # [tiles * hi tile bytes], or [stored groups * hi bytes of a group]
    lo: U8 | None = None  # the same of the lo plane
    kept: U8 | None = None  # the tile mask as `pack_mask` makes it

    @property
    def padded_cols(self) -> int:
        return padded_columns(self.encoding, self.cols, self.group)

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def groups(self) -> int:
        """Groups of columns that share scales; 0 for f32 and bf16."""
        return self.padded_cols // self.group if self.group else 0

    @property
    def stored(self) -> B8:
        """Which groups the tiles store, [tiles, groups]."""
        return (
            np.ones((self.tiles, self.groups), np.bool_) if self.kept is None else unpack_mask(self.kept, self.groups)
        )

    @property
    def share(self) -> float:
        """Share of the blocks of 32 rows x `group` columns that are stored; 1 without a tile mask."""
        return 1.0 if self.kept is None else float(np.mean(self.stored))

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes that `hi` and `lo` must have (lo: 0 if the encoding has none)."""
        hi, lo = tile_bytes(self.encoding, self.padded_cols, self.group)
        if self.kept is None:
            return self.tiles * hi, self.tiles * lo
        stored = int(np.count_nonzero(self.stored))
        return stored * (hi // self.groups), stored * (lo // self.groups)

    @property
    def nbytes(self) -> int:
        return int(self.hi.nbytes) + (int(self.lo.nbytes) if self.lo is not None else 0)

"""A matrix in kernel layout (docs/ARCHITECTURE.md, section 4). Knows the sizes, not the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from haomiao.types import U8

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


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """`hi` and `lo` are flat uint8, whole tiles in ascending rows; they may be views of a mapped file (read-only)."""

    encoding: Encoding
    rows: int
    cols: int
    group: int  # 0 for f32 and bf16
    lo_shift: int  # 0 unless encoding is planes with lo
    hi: U8  # [tiles * hi tile bytes]
    lo: U8 | None = None  # [tiles * lo tile bytes]

    @property
    def padded_cols(self) -> int:
        return padded_columns(self.encoding, self.cols, self.group)

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def nbytes(self) -> int:
        return int(self.hi.nbytes) + (int(self.lo.nbytes) if self.lo is not None else 0)

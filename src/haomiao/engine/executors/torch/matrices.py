"""Weights on a device, laid out for its kernels: rows one after the other, codes stay codes.

    f32, bf16   values [rows, cols]
    int8        codes int8 [rows, padded], scales f16 [rows, groups]: w = scale * code
    planes      hi, lo uint8 [rows, padded / 2], scales f16 [rows, groups]; byte 16 b + 4 k + j of a row (j, k = 0..3)
                holds column 32 b + 8 j + k in its low nibble and column 32 b + 8 j + 4 + k in its high one, each
                code + 8: nibble n of word k of a block is column 4 n + k, so that the activations that four words
                meet lie next to each other

Made from kernel layout (docs/ARCHITECTURE.md, section 4) on the device itself, some tiles at a time. Knows bytes, not
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from haomiao.kernels.pack import whole
from haomiao.kernels.packed import TILE_ROWS, Encoding, PackedTensor, tile_bytes
from haomiao.types import U8, Planes

Tensor: TypeAlias = torch.Tensor
CHUNK_BYTES = 64 << 20
"""Bytes in kernel layout that are rearranged at once."""
SCALE_BYTES = 2 * TILE_ROWS


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """One matrix [rows, cols]. `hi` holds the values or the only codes; `lo` and `scales` as the encoding has them."""

    encoding: Encoding
    rows: int
    cols: int
    padded: int
    group: int  # 0 for f32 and bf16
    lo_shift: int
    hi: Tensor
    lo: Tensor | None = None
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hi, self.lo, self.scales) if t is not None)

    def reads_lo(self, planes: Planes) -> bool:
        """Whether a reading of `planes` needs the second plane."""
        return self.lo is not None and planes != "hi"

    def codes(self, planes: Planes, rows: slice | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes int16 [rows, padded] and their scales f32 [rows, groups]: w = scale * code."""
        assert self.scales is not None
        chosen = slice(None) if rows is None else rows
        scales = self.scales[chosen].float()
        if self.encoding == "int8":
            return self.hi[chosen].to(torch.int16), scales
        hi = _codes(self.hi[chosen])
        if not self.reads_lo(planes):
            return hi, scales
        assert self.lo is not None
        return (hi << self.lo_shift) + _codes(self.lo[chosen]), scales * 2.0**-self.lo_shift

    def values(self, planes: Planes, rows: slice | Tensor | None = None) -> Tensor:
        """Weights f32 [rows, cols], exact."""
        if self.scales is None:
            return self.hi[slice(None) if rows is None else rows].float()
        codes, scales = self.codes(planes, rows)
        values = codes.view(*scales.shape, self.group).float() * scales[..., None]
        return values.reshape(codes.shape)[:, : self.cols]


def place(packed: PackedTensor, device: torch.device) -> DeviceMatrix:
    """A matrix in kernel layout, on the device; a tile mask's empty groups are filled in."""
    packed = whole(packed)
    hi_bytes, lo_bytes = tile_bytes(packed.encoding, packed.padded_cols, packed.group)
    hi = _placed(packed, packed.hi, hi_bytes, device)
    lo = None if packed.lo is None else _placed(packed, packed.lo, lo_bytes, device)
    scales = None
    if packed.encoding in ("int8", "planes"):
        groups = packed.padded_cols // packed.group
        # scales are few: taken out here, so that they need not be searched in the chunks again
        stored = packed.hi.reshape(packed.tiles, groups, hi_bytes // groups)[:, :, :SCALE_BYTES]
        halves = np.ascontiguousarray(stored).view("<f2").transpose(0, 2, 1).reshape(-1, groups)[: packed.rows]
        scales = torch.from_numpy(np.ascontiguousarray(halves)).to(device)
    padded = packed.cols if packed.encoding in ("f32", "bf16") else packed.padded_cols
    return DeviceMatrix(
        packed.encoding, packed.rows, packed.cols, padded, packed.group, packed.lo_shift, hi, lo, scales
    )


def _placed(packed: PackedTensor, plane: U8, bytes_a_tile: int, device: torch.device) -> Tensor:
    """A plane, chunk by chunk; rows beyond the matrix are left out."""
    tiles = plane.reshape(packed.tiles, bytes_a_tile)
    step = max(1, CHUNK_BYTES // bytes_a_tile)
    parts = []
    for first in range(0, packed.tiles, step):
        # a copy: mapped files are read-only, which torch does not know
        chunk = torch.from_numpy(tiles[first : first + step].copy()).to(device)
        rows = min(packed.rows - first * TILE_ROWS, chunk.shape[0] * TILE_ROWS)
        parts.append(_rearranged(packed, chunk, plane is packed.lo)[:rows])
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _rearranged(packed: PackedTensor, tiles: Tensor, is_lo: bool) -> Tensor:
    """[tiles, bytes] in kernel layout -> [rows, ...] in the layout of this module."""
    count, padded = tiles.shape[0], packed.padded_cols
    if packed.encoding == "f32":
        return tiles.view(torch.float32).view(count, padded, TILE_ROWS).transpose(1, 2).reshape(-1, padded)
    if packed.encoding == "bf16":
        pairs = tiles.view(torch.bfloat16).view(count, padded // 2, TILE_ROWS, 2)
        return pairs.permute(0, 2, 1, 3).reshape(-1, padded)[:, : packed.cols]
    groups = padded // packed.group
    body = tiles if is_lo else tiles.view(count, groups, -1)[:, :, SCALE_BYTES:]
    if packed.encoding == "int8":
        quads = body.reshape(count, groups, packed.group // 4, TILE_ROWS, 4)
        return (quads.permute(0, 3, 1, 2, 4).reshape(-1, padded) ^ 128).view(torch.int8)
    runs = body.reshape(count, padded // 32, 4, 2, 16, 4)  # tile, block, j, r, i, k
    return runs.permute(0, 3, 4, 1, 5, 2).reshape(-1, padded // 2)  # rows, blocks, k, j: a byte stays as it is


def _codes(plane: Tensor) -> Tensor:
    """Nibbles uint8 [rows, padded / 2] -> codes int16 [rows, padded]."""
    words = plane.view(plane.shape[0], -1, 4, 4).transpose(2, 3)  # rows, blocks, j, k
    return torch.stack([words & 15, words >> 4], dim=3).reshape(plane.shape[0], -1).to(torch.int16) - 8

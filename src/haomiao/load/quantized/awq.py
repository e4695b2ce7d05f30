"""AWQ checkpoints in the "gemm" packing: w = scale * (code - zero), 4 bits, per group of input columns.

`qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8], packed along the output: nibble i of a word belongs
to column `ORDER[i]` of the word's eight; `scales` f16 [groups, out].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from haomiao.errors import ModelError
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.quantized.codes import Array, Codes, check_scales, group_size, subtract, unpack_words
from haomiao.load.quantized.settings import choice, integer

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """The `Format` of AWQ checkpoints."""

    name = "awq"
    marker = ".qweight"
    parts: tuple[str, ...] = (".qweight", ".qzeros", ".scales")

    def __init__(self, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        integer(settings, "bits", 4, (4,))
        choice(settings, "version", "gemm", ("gemm",))
        self._group = integer(settings, "group_size", 128)

    def bits(self, prefix: str) -> int:
        """Bits of a stored code."""
        return 4

    def shape(self, prefix: str) -> tuple[int, int]:
        """(rows, columns) of y = x Wᵀ."""
        shape = self._checkpoint.shape(prefix + ".qweight")
        if len(shape) != 2 or 0 in shape:
            raise ModelError(f"{prefix}.qweight: a matrix is expected, not {shape}")
        return shape[1] * 8, shape[0]

    def unpack(self, prefix: str) -> Codes:
        """The layer's codes."""
        rows, cols = self.shape(prefix)
        zeros = _ordered(self._checkpoint.raw(prefix + ".qzeros"))  # [groups, rows]
        groups = len(zeros)
        group = group_size(cols, groups, self._group, prefix)
        if zeros.shape != (groups, rows):
            raise ModelError(f"{prefix}: qzeros do not fit {rows} rows")
        scales = check_scales(self._checkpoint.read(prefix + ".scales").T, prefix, rows, groups)
        codes = _ordered(self._checkpoint.raw(prefix + ".qweight"))  # [cols, rows]
        values = subtract(np.ascontiguousarray(codes.T), zeros.T[:, np.arange(cols) // group])
        return Codes(values, np.ascontiguousarray(scales), group)


def _ordered(words: Array) -> Array:
    """int32 [n, out / 8] -> uint8 [n, out], nibbles put where they belong."""
    if words.ndim != 2:
        raise ModelError(f"packed codes of shape {words.shape}, a matrix is expected")
    nibbles = unpack_words(words, 4)
    ordered = np.empty_like(nibbles)
    ordered[..., list(ORDER)] = nibbles
    return ordered.reshape(len(words), -1)

"""GPTQ checkpoints (AutoGPTQ, GPTQModel): w = scale * (code - zero), per group of input columns.

`qweight` int32 [in * bits / 32, out], packed along the input; `qzeros` int32 [groups, out * bits / 32], packed along
the output; `scales` f16 [groups, out]; `g_idx` int32 [in], the group of each input column. `checkpoint_format` "gptq"
(the default) stores zero - 1, "gptq_v2" stores zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.quantized.codes import Codes, check_scales, group_size, subtract, unpack_words
from haomiao.load.quantized.settings import choice, integer


class Gptq:
    """The `Format` of GPTQ checkpoints."""

    name = "gptq"
    marker = ".qweight"
    parts: tuple[str, ...] = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._bits = integer(settings, "bits", 4, (2, 4, 8))
        self._group = integer(settings, "group_size", 128)
        version = choice(settings, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
        self._zero_offset = 1 if version == "gptq" else 0
        if settings.get("dynamic"):
            raise UnsupportedModelError(f"{checkpoint.directory}: GPTQ with settings per layer is not supported")
        self._names = set(checkpoint.names())

    def bits(self, prefix: str) -> int:
        """Bits of a stored code."""
        return self._bits

    def shape(self, prefix: str) -> tuple[int, int]:
        """(rows, columns) of y = x Wᵀ."""
        words, rows = _matrix(self._checkpoint, prefix + ".qweight")
        return rows, words * 32 // self._bits

    def unpack(self, prefix: str) -> Codes:
        """The layer's codes; `group_of` where `g_idx` is not simply column // group."""
        rows, cols = self.shape(prefix)
        groups = _matrix(self._checkpoint, prefix + ".qzeros")[0]
        group = group_size(cols, groups, self._group, prefix)
        scales = check_scales(self._checkpoint.read(prefix + ".scales").T, prefix, rows, groups)
        zeros = self._zeros(prefix, rows, groups)
        group_of = self._group_of(prefix, cols, groups)
        if np.array_equal(group_of, np.arange(cols) // group):
            group_of = None
        columns = group_of if group_of is not None else np.arange(cols) // group
        codes = unpack_words(self._checkpoint.raw(prefix + ".qweight"), self._bits)  # [words, rows, codes]
        values = subtract(codes.transpose(1, 0, 2).reshape(rows, cols), zeros[:, columns])
        return Codes(values, np.ascontiguousarray(scales), group, group_of)

    def _zeros(self, prefix: str, rows: int, groups: int) -> Any:
        """Zero-points, uint8 [rows, groups]."""
        if _matrix(self._checkpoint, prefix + ".qzeros") != (groups, rows * self._bits // 32):
            raise ModelError(f"{prefix}: qzeros do not fit {rows} rows and {groups} groups")
        stored = unpack_words(self._checkpoint.raw(prefix + ".qzeros"), self._bits).reshape(groups, rows)
        # the mask undoes the borrow of a zero-point of 0, which the first format stores as 2^bits - 1
        return ((stored + np.uint8(self._zero_offset)) & np.uint8((1 << self._bits) - 1)).T

    def _group_of(self, prefix: str, cols: int, groups: int) -> Any:
        if prefix + ".g_idx" not in self._names:
            return np.arange(cols) // group_size(cols, groups, self._group, prefix)
        found = self._checkpoint.raw(prefix + ".g_idx").astype(np.int64)
        if found.shape != (cols,) or found.min() < 0 or found.max() >= groups:
            raise ModelError(f"{prefix}: g_idx does not assign {cols} columns to {groups} groups")
        return found


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{name}: a matrix is expected, not {shape}")
    return shape[0], shape[1]

"""compressed-tensors checkpoints (llm-compressor): w = scale * (code - zero), per group, row or matrix.

"pack-quantized": `weight_packed` int32 [out, ceil(in * bits / 32)] holding code + 2^(bits - 1), low bits first;
`weight_scale` [out, groups]; `weight_shape` int64 [2]; asymmetric: `weight_zero_point` int32, packed the same way along
the output; `weight_g_idx` int32 [in] where columns were reordered. "int-quantized": `weight` int8 [out, in] with the
same companions, zero-points int8. Quantization of activations is not part of the weights: the operating point decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.checkpoint import Checkpoint
from haomiao.load.quantized.codes import Array, Codes, check_scales, subtract, unpack_words
from haomiao.load.quantized.settings import choice, integer
from haomiao.types import F32

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


class CompressedTensors:
    """The `Format` of compressed-tensors checkpoints."""

    name = "compressed-tensors"
    marker = ".weight_scale"
    parts: tuple[str, ...] = (
        ".weight_packed",
        ".weight",
        ".weight_scale",
        ".weight_shape",
        ".weight_zero_point",
        ".weight_g_idx",
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
    )

    def __init__(self, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        where = str(checkpoint.directory)
        sparsity = settings.get("sparsity_config")
        if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
            raise UnsupportedModelError(f"{where}: sparse weights (sparsity_config) are not supported")
        if settings.get("transform_config"):
            raise UnsupportedModelError(f"{where}: transformed weights (transform_config) are not supported")
        choice(settings, "format", "pack-quantized", FORMATS)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelError(f"{where}: quantization_config has no config_groups")
        found = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
        schemes = [scheme for scheme in found if isinstance(scheme, dict)]
        if len(schemes) != len(found):
            raise ModelError(f"{where}: a group of quantization_config has no weights")
        for scheme in schemes:
            choice(scheme, "type", "int", ("int",))
        self._widths = sorted({integer(scheme, "num_bits", 4, (2, 4, 8)) for scheme in schemes})
        self._names = set(checkpoint.names())

    def bits(self, prefix: str) -> int:
        """Bits of a stored code: the declared width that explains the packed words."""
        if prefix + ".weight_packed" not in self._names:
            return 8
        (_, cols), words = self.shape(prefix), self._checkpoint.shape(prefix + ".weight_packed")[-1]
        for bits in self._widths:
            if -(-cols * bits // 32) == words:
                return bits
        raise ModelError(f"{prefix}: {words} packed words a row do not hold {cols} columns of {self._widths} bits")

    def shape(self, prefix: str) -> tuple[int, int]:
        """(rows, columns) of y = x Wᵀ."""
        if prefix + ".weight_packed" not in self._names:
            shape = self._checkpoint.shape(prefix + ".weight")
        else:
            stored = self._checkpoint.raw(prefix + ".weight_shape")
            shape = tuple(int(size) for size in stored.reshape(-1)[:3])
            packed = self._checkpoint.shape(prefix + ".weight_packed")
            if len(shape) != 2 or len(packed) != 2 or packed[0] != shape[0] or shape[1] > 16 * packed[1]:
                raise ModelError(f"{prefix}: weight_shape {shape} contradicts packed words {packed}")
        if len(shape) != 2 or min(shape) < 1:
            raise ModelError(f"{prefix}: a matrix is expected, not {shape}")
        return shape[0], shape[1]

    def unpack(self, prefix: str) -> Codes:
        """The layer's codes; `group_of` where columns were reordered."""
        rows, cols = self.shape(prefix)
        scales = self._scales(prefix, rows)
        groups = scales.shape[1]
        group = -(-cols // groups)
        if cols != group * groups:
            raise ModelError(f"{prefix}: {groups} groups do not divide {cols} columns")
        group_of = self._group_of(prefix, cols, groups, group)
        columns = group_of if group_of is not None else np.arange(cols) // group
        codes = self._signed(prefix, ".weight_packed", ".weight", (rows, cols))
        if prefix + ".weight_zero_point" in self._names:
            zeros = self._zeros(prefix, rows, groups)
            if zeros.any():
                codes = subtract(codes, zeros[:, columns])
        return Codes(codes, scales, group, group_of)

    def _scales(self, prefix: str, rows: int) -> F32:
        scales = self._checkpoint.read(prefix + ".weight_scale")
        if scales.size == 1:  # one for the whole matrix
            scales = np.broadcast_to(scales.reshape(1, 1), (rows, 1))
        if scales.ndim == 1:
            scales = scales.reshape(-1, 1)
        if scales.ndim != 2 or scales.shape[1] == 0:
            raise ModelError(f"{prefix}: weight_scale of shape {scales.shape}")
        return np.ascontiguousarray(check_scales(scales, prefix, rows, scales.shape[1]))

    def _signed(self, prefix: str, packed: str, plain: str, shape: tuple[int, int]) -> Array:
        """Codes as int8 [rows, cols], from packed words along the columns or from plain int8."""
        if prefix + packed not in self._names:
            values: Array = self._checkpoint.raw(prefix + plain)
            if values.dtype != np.int8 or values.shape != shape:
                raise ModelError(f"{prefix}{plain}: int8 of shape {shape} is expected")
            return values
        unpacked: Array = self._offset(self._checkpoint.raw(prefix + packed), prefix)[:, : shape[1]]
        return unpacked

    def _offset(self, words: Array, prefix: str) -> Array:
        bits = self.bits(prefix)
        codes = unpack_words(words, bits).reshape(len(words), -1)
        signed: Array = (codes - np.uint8(1 << (bits - 1))).view(np.int8)  # wraps as two's complement does
        return signed

    def _zeros(self, prefix: str, rows: int, groups: int) -> Array:
        name = prefix + ".weight_zero_point"
        stored: Array = self._checkpoint.raw(name)
        if stored.size == 1:
            stored = np.broadcast_to(stored.reshape(1, 1), (rows, groups))
        if stored.dtype == np.int8 and stored.reshape(len(stored), -1).shape == (rows, groups):
            return stored.reshape(rows, groups)
        if stored.dtype == np.int32 and stored.ndim == 2 and stored.shape[1] == groups:
            packed = self._offset(np.ascontiguousarray(stored.T), prefix)  # [groups, rows or a few more]
            if rows <= packed.shape[1] < rows + 32:
                zeros: Array = packed[:, :rows].T
                return zeros
        raise ModelError(f"{name}: shape {stored.shape} does not fit {rows} rows and {groups} groups")

    def _group_of(self, prefix: str, cols: int, groups: int, group: int) -> Array | None:
        if prefix + ".weight_g_idx" not in self._names:
            return None
        found: Array = self._checkpoint.raw(prefix + ".weight_g_idx").astype(np.int64)
        if found.shape != (cols,) or found.min() < 0 or found.max() >= groups:
            raise ModelError(f"{prefix}: weight_g_idx does not assign {cols} columns to {groups} groups")
        return None if np.array_equal(found, np.arange(cols) // group) else found

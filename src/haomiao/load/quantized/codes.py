"""Integer codes and group scales of one matrix, whatever the format: unpacking of words, dequantization, exactness.

Knows nothing about checkpoints, names or formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.kernels.packed import GROUPS
from haomiao.load.source import QuantizedTensor
from haomiao.types import F32, U8

Array: TypeAlias = npt.NDArray[Any]


class Format(Protocol):
    """How one kind of checkpoint stores its quantized linear layers. A layer is named by its prefix (`...q_proj`)."""

    name: str
    marker: str
    """The part that every quantized layer has."""
    parts: tuple[str, ...]
    """All parts that belong to a quantized layer and are hidden: `prefix + part`."""

    def shape(self, prefix: str) -> tuple[int, int]:
        """(rows, columns) of y = x Wᵀ."""
        ...

    def bits(self, prefix: str) -> int:
        """Bits of a stored code."""
        ...

    def unpack(self, prefix: str) -> Codes:
        """The layer's codes. Raises `ModelError` if its parts contradict each other."""
        ...


@dataclass(frozen=True, slots=True)
class Codes:
    """w[r, c] = scales[r, group_of[c] or c // group] * values[r, c]; zero-points are already subtracted."""

    values: Array  # int8 or int16 [rows, cols]
    scales: F32  # [rows, groups]
    group: int
    group_of: npt.NDArray[np.int64] | None = None  # [cols], where columns were reordered (GPTQ's desc_act)

    def dequantize(self) -> F32:
        """The matrix as float32 [rows, cols]."""
        rows, cols = self.values.shape
        out = self.values.astype(np.float32)
        if self.group_of is not None:
            out *= self.scales[:, self.group_of]
        elif cols % self.group == 0:
            out.reshape(rows, -1, self.group)[...] *= self.scales[:, :, None]
        else:
            out *= np.repeat(self.scales, self.group, axis=1)[:, :cols]
        return out

    def exact(self) -> QuantizedTensor | None:
        """The same codes as a `QuantizedTensor`, or None where they cannot be kept: reordered columns, groups that
        32 does not divide, scales that float16 cannot hold, codes beyond int8."""
        cols = self.values.shape[1]
        group = next((g for g in sorted(GROUPS, reverse=True) if self.group % g == 0), None)
        if self.group_of is not None or group is None or cols % self.group:
            return None
        with np.errstate(over="ignore"):
            if not np.array_equal(self.scales.astype(np.float16).astype(np.float32), self.scales):
                return None
        bits = _bits(int(self.values.min()), int(self.values.max()))
        if bits is None:
            return None
        scales = np.repeat(self.scales, self.group // group, axis=1)
        return QuantizedTensor(self.values.astype(np.int8, copy=False), scales, group, bits)


def _bits(least: int, most: int) -> int | None:
    for bits, low, high in ((4, -8, 7), (5, -15, 15), (8, -128, 127)):
        if low <= least and most <= high:
            return bits
    return None


def unpack_words(words: Array, bits: int) -> U8:
    """int32 [a, b] -> uint8 [a, b, 32 / bits], low bits first. `bits` is 2, 4 or 8."""
    if bits not in (2, 4, 8):
        raise UnsupportedModelError(f"codes of {bits} bits are not supported")
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(*words.shape, 4, 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets >> shifts) & np.uint8((1 << bits) - 1)).reshape(*words.shape, 32 // bits)


def subtract(codes: Array, zeros: Array) -> Array:
    """codes - zeros in the narrowest type that holds every difference."""
    difference = codes.astype(np.int16) - zeros.astype(np.int16)
    if difference.min() >= -128 and difference.max() <= 127:
        return difference.astype(np.int8)
    return difference


def check_scales(scales: F32, where: str, rows: int, groups: int) -> F32:
    """Scales [rows, groups], or a `ModelError` that names the tensor."""
    if scales.shape != (rows, groups):
        raise ModelError(f"{where}: scales of shape {scales.shape}, ({rows}, {groups}) is expected")
    if not np.isfinite(scales).all():
        raise ModelError(f"{where}: a scale is NaN or infinite")
    return scales


def group_size(cols: int, groups: int, declared: int, where: str) -> int:
    """Columns per group: the declared size (-1: one group), which must give the number of groups that is there."""
    group = cols if declared <= 0 or declared >= cols else declared
    if -(-cols // group) != groups:
        raise ModelError(f"{where}: {groups} groups for {cols} columns in groups of {group}")
    return group

"""The numpy twin of the linear kernels: slow, obviously right, and exact to the bit (docs/ARCHITECTURE.md, section 6).

Knows weights in kernel layout and nothing about plans. Every other implementation is tested against it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.kernels.pack import from_bf16, groups_of, to_bf16, unpack, unpack_codes
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.types import F32

ACTIVATION_GROUP = 32
"""Columns that share one activation scale at the int points."""


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c in float32, rounded once.

    In float64 the product is exact and the sum has a known error (Knuth's TwoSum). Rounding that sum to odd before
    rounding it to float32 makes the double rounding harmless (Boldo & Melquiond, "Emulation of FMA and correctly
    rounded sums", 2008).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        rounded: F32 = odd.astype(np.float32)
        return rounded


def prepare_int8(x: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """Quantize activations [tokens, cols] per token and group of 32 columns: x ~ scale * q.

    Returns q int8 [tokens, groups * 32] (columns beyond cols are 0) and scales float32 [tokens, groups]. A group that
    holds a NaN or an infinity has the scale NaN and codes 0.
    """
    tokens, cols = x.shape
    groups = -(-cols // ACTIVATION_GROUP)
    padded = np.zeros((tokens, groups * ACTIVATION_GROUP), np.float32)
    padded[:, :cols] = x
    blocks = padded.reshape(tokens, groups, ACTIVATION_GROUP)
    greatest = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(127.0) / greatest
        scales = np.where(np.isinf(inverse), np.float32(0), greatest / np.float32(127.0))
        q = np.rint(blocks * inverse[..., None])
    scales = np.where(np.isfinite(greatest), scales, np.float32(np.nan)).astype(np.float32)
    usable = np.isfinite(greatest) & ~np.isinf(inverse)
    q = np.where(usable[..., None], q, np.float32(0)).astype(np.int8)
    return q.reshape(tokens, -1), scales


def linear(
    packed: PackedTensor,
    x: F32,
    planes: Literal["hi", "hi+lo"] = "hi+lo",
    activation: Literal["f32", "bf16", "int8"] | None = None,
    bias: F32 | None = None,
) -> F32:
    """y = x Wᵀ (+ bias), float32 [tokens, rows], for x float32 [tokens, cols].

    `activation` defaults to what the encoding is for: f32, bf16, or int8 (`int8`, `planes`). bf16 weights also take
    f32 activations (point `full`). Raises `InputError` for a combination that no kernel has, or shapes that disagree.
    """
    kind = activation or natural_activation(packed)
    if kind not in allowed_activations(packed):
        raise InputError(f"{packed.encoding} weights do not take {kind} activations")
    if x.ndim != 2 or x.shape[1] != packed.cols:
        raise InputError(f"activations must be [tokens, {packed.cols}], not {x.shape}")
    if kind == "int8":
        y = _linear_int8(packed, x, planes)
    else:
        y = _linear_float(unpack(packed), from_bf16(to_bf16(x)) if kind == "bf16" else x)
    return y if bias is None else y + bias.astype(np.float32)


def read_row(packed: PackedTensor, row: int) -> F32:
    """One row as float32 [cols], every stored plane used."""
    if not 0 <= row < packed.rows:
        raise InputError(f"row {row} is outside [0, {packed.rows})")
    values: F32 = unpack(_tile(packed, row // TILE_ROWS))[row % TILE_ROWS]
    return values


def natural_activation(packed: PackedTensor) -> Literal["f32", "bf16", "int8"]:
    """The activation type that an encoding is made for."""
    if packed.encoding == "f32":
        return "f32"
    return "bf16" if packed.encoding == "bf16" else "int8"


def allowed_activations(packed: PackedTensor) -> tuple[str, ...]:
    """The activation types that an encoding can be multiplied with."""
    return ("bf16", "f32") if packed.encoding == "bf16" else (natural_activation(packed),)


def _linear_int8(packed: PackedTensor, x: F32, planes: Literal["hi", "hi+lo"]) -> F32:
    q, activation_scales = prepare_int8(x)
    codes, weight_scales = unpack_codes(packed, planes)
    y = np.zeros((x.shape[0], packed.rows), np.float32)
    stored = np.repeat(packed.stored, TILE_ROWS, axis=0)[: packed.rows]  # [rows, groups]: what is left out adds nothing
    for g in range(activation_scales.shape[1]):
        columns = slice(g * ACTIVATION_GROUP, min((g + 1) * ACTIVATION_GROUP, packed.cols))
        # every partial sum is an integer below 2^24, hence exact in float32 in any order
        total = q[:, columns].astype(np.float32) @ codes[:, columns].T.astype(np.float32)
        scales = weight_scales[None, :, g * ACTIVATION_GROUP // packed.group] * activation_scales[:, g, None]
        y = np.where(stored[:, g * ACTIVATION_GROUP // packed.group], fma(scales, total, y), y)
    return y


def _linear_float(weights: F32, x: F32) -> F32:
    y = np.zeros((x.shape[0], weights.shape[0]), np.float32)
    for column in range(weights.shape[1]):
        y = fma(weights[None, :, column], x[:, column, None], y)
    return y


def _tile(packed: PackedTensor, tile: int) -> PackedTensor:
    """One tile as a matrix of its own, without a mask."""
    rows = slice(tile * TILE_ROWS, min(packed.rows, (tile + 1) * TILE_ROWS))
    if packed.group:
        hi = groups_of(packed, rows, packed.hi).reshape(-1)
        lo = None if packed.lo is None else groups_of(packed, rows, packed.lo).reshape(-1)
    else:
        size = packed.hi.size // packed.tiles
        hi, lo = packed.hi[tile * size : (tile + 1) * size], None
    return PackedTensor(packed.encoding, rows.stop - rows.start, packed.cols, packed.group, packed.lo_shift, hi, lo)

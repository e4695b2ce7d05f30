"""The compiled linear kernels, one call at a time: the same faces as the numpy twin in `reference`.

For tests, measurements and calibration. Executors do not come through here: they hand whole steps to the compiled core.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from haomiao import _core
from haomiao.errors import InputError
from haomiao.kernels.isa import selected
from haomiao.kernels.packed import ENCODINGS, PackedTensor
from haomiao.kernels.reference import allowed_activations, natural_activation
from haomiao.types import F32


def weight_of(packed: PackedTensor) -> _core.Weight:
    """The core's view of a packed matrix; shares its bytes. Raises `InputError` for sections of the wrong size."""
    number = ENCODINGS.index(packed.encoding)
    try:
        return _core.Weight(
            number, packed.rows, packed.cols, packed.group, packed.lo_shift, packed.hi, packed.lo, packed.kept
        )
    except ValueError as error:
        raise InputError(f"packed matrix: {error}") from None


def linear(
    packed: PackedTensor,
    x: F32,
    planes: Literal["hi", "hi+lo"] = "hi+lo",
    activation: Literal["f32", "bf16", "int8"] | None = None,
    bias: F32 | None = None,
    *,
    isa: str | None = None,
    tiles: tuple[int, int] | None = None,
) -> F32:
    """As `reference.linear`. `tiles` limits the work to a range of 32-row tiles; the other rows are NaN."""
    kind = activation or natural_activation(packed)
    if kind not in allowed_activations(packed):
        raise InputError(f"{packed.encoding} weights do not take {kind} activations")
    if planes not in ("hi", "hi+lo"):
        raise InputError(f"planes must be 'hi' or 'hi+lo', not {planes!r}")
    if x.ndim != 2 or x.shape[1] != packed.cols:
        raise InputError(f"activations must be [tokens, {packed.cols}], not {x.shape}")
    name = isa or selected()
    begin, end = tiles or (0, packed.tiles)
    out = np.full((x.shape[0], packed.rows), np.nan, np.float32)
    vector = None if bias is None else np.ascontiguousarray(bias, np.float32)
    try:
        prepared = _core.prepare(name, kind, np.ascontiguousarray(x, np.float32), packed.padded_cols)
        _core.linear(name, weight_of(packed), planes == "hi+lo", kind, prepared, out, vector, begin, end)
    except ValueError as error:
        raise InputError(f"linear: {error}") from None
    return out


def read_row(packed: PackedTensor, row: int, *, isa: str | None = None) -> F32:
    """As `reference.read_row`."""
    out = np.empty(packed.cols, np.float32)
    try:
        _core.read_row(isa or selected(), weight_of(packed), row, out)
    except ValueError as error:
        raise InputError(f"read_row: {error}") from None
    return out

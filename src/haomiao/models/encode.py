"""One weight of a plan, from its sources in a checkpoint to kernel layout.

Knows weights' specifications and encodings, not families, names of checkpoints or files. Memory is bounded by one
matrix: sources are read one after the other into the place they have in it.

What a checkpoint already holds in codes is kept as it is where the layout can hold it (docs/ARCHITECTURE.md, section
4, "Exact images"); the rest is rounded to nearest. A matrix whose sources differ in kind (q and k in four bits, v in
six) takes the narrowest encoding that keeps every source's codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao.errors import ModelError
from haomiao.kernels.pack import (
    pack_bf16,
    pack_f32,
    pack_int8,
    pack_planes,
    split_codes,
    unpack_codes,
)
from haomiao.kernels.packed import GROUPS, TILE_ROWS, PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.load.source import QuantizedTensor, TensorSource
from haomiao.models.plan import WeightSpec
from haomiao.types import F32

Scheme = Literal["nested", "exact", "full", "bf16"]
SCHEMES: tuple[Scheme, ...] = ("nested", "exact", "full", "bf16")
FLOAT_TABLES = ("positions",)
"""Tables that stay floats under every scheme: small, and added to the residual as they are."""

Array = npt.NDArray[Any]


@dataclass
class Encoder:
    """Encodes weights by one scheme and remembers what it did.

    `nested`: planes that both int8 and int4 read; codes of four and five bits are kept, those of eight are rounded.
    `exact`: codes of eight bits are kept too (and have no int4). `full`: bf16 if all sources are, else float32.
    `bf16`: rounded. `names` maps a plan's source to the checkpoint's own name.
    """

    source: TensorSource
    names: Mapping[str, str]
    scheme: Scheme
    group: int
    lo_shift: int
    with_lo: bool = True
    exact: int = 0
    """Matrices that hold the checkpoint's own values."""
    rounded: int = 0
    kinds: set[str] = field(default_factory=set)
    """What the body's matrices became: `f32`, `bf16`, `int8`, `nested` (with lo), `hi` (without)."""

    def matrix(self, spec: WeightSpec) -> PackedTensor:
        """A matrix or table in kernel layout. Raises `ModelError` that names the weight."""
        try:
            packed = self._matrix(spec)
        except ModelError as wrong:
            raise ModelError(f"{self.source.name}: {self.names[spec.sources[0]]}: {wrong}", code=wrong.code) from None
        if spec.role == "body":
            kind = packed.encoding if packed.encoding != "planes" else "hi" if packed.lo is None else "nested"
            self.kinds.add(kind)
        return packed

    def vector(self, spec: WeightSpec) -> F32:
        """A norm or bias, float32 [rows]."""
        parts = (transformed(self._read(name), spec, i).reshape(-1, 1) for i, name in enumerate(spec.sources))
        values: F32 = arranged(parts, spec, spec.rows, 1, np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.source.name}: {self.names[spec.sources[0]]} holds a NaN or an infinity")
        return values

    def points(self) -> tuple[str, ...]:
        """The operating points that the artifact offers, the default first."""
        if self.scheme == "full":
            return ("full", "bf16") if self.kinds == {"bf16"} else ("full",)
        if self.scheme == "bf16":
            return ("bf16",)
        if self.kinds == {"int8"}:
            return ("int8",)
        return ("int4", "int8") if self.kinds == {"hi"} else ("int8", "int4")

    # ---- by scheme

    def _matrix(self, spec: WeightSpec) -> PackedTensor:
        if self.scheme in ("full", "bf16") or spec.name in FLOAT_TABLES:
            return self._floats(spec)
        found = self._codes(spec)
        if found is not None and all(found) and (packed := self._image(spec, [q for q in found if q])) is not None:
            self.exact += 1
            return packed
        if found is not None and any(found) and (packed := self._mixed(spec, found)) is not None:
            self.rounded += 1
            return packed
        self.rounded += 1
        if spec.role == "embedding":
            return quantize_int8(self.weights(spec), self.group)
        # the head keeps both planes at every point (types.Point.head), in codes that an export to GGUF can keep too
        head = spec.role == "head"
        return quantize_planes(self.weights(spec), self.group, self.lo_shift, self.with_lo or head, within_int8=head)

    def _floats(self, spec: WeightSpec) -> PackedTensor:
        stored_bf16 = all(self.source.dtype(self.names[name]) == "bf16" for name in spec.sources)
        if stored_bf16 or (self.scheme == "bf16" and spec.name not in FLOAT_TABLES):
            self.exact += stored_bf16
            self.rounded += not stored_bf16
            return pack_bf16(self.weights(spec))
        self.exact += 1
        return pack_f32(self.weights(spec))

    def _image(self, spec: WeightSpec, found: Sequence[QuantizedTensor]) -> PackedTensor | None:
        """The checkpoint's codes, all sources having some; None if the scheme or the layout cannot hold them."""
        bits = max(q.bits for q in found)
        if bits > 5 and self.scheme == "nested" and spec.role != "embedding":
            return None
        group = found[0].group
        parts = (transformed(q.codes, spec, i) for i, q in enumerate(found))
        codes = arranged(parts, spec, spec.rows, spec.cols, np.int8)
        groups = -(-spec.cols // group)
        scales = arranged((transformed(q.scales, spec, i) for i, q in enumerate(found)), spec, spec.rows, groups)
        if bits <= 4:
            return pack_planes(codes, None, scales, group, 0)
        if bits > 5:
            return pack_int8(codes, scales, group)
        doubled = scales * np.float32(2)  # w = scale / 2 * (2 hi + lo)
        if not np.isfinite(doubled.astype(np.float16)).all():
            return None
        hi, lo = split_codes(codes, 1)
        return pack_planes(hi, lo, doubled, group, 1)

    def _mixed(self, spec: WeightSpec, found: Sequence[QuantizedTensor | None]) -> PackedTensor | None:
        """Some sources have codes and some do not: the latter are rounded, in the encoding that keeps the former."""
        group = next(q.group for q in found if q)
        bits = max(q.bits for q in found if q)
        if bits > 4 and self.scheme == "nested":
            return None  # no nested planes hold both five-bit codes and rounded ones
        rounded: dict[int, tuple[Array, Array]] = {}
        for index, (name, codes) in enumerate(zip(spec.sources, found, strict=True)):
            if codes is None:
                weights = transformed(self._read(name), spec, index)
                packed = quantize_int8(weights, group) if bits > 4 else quantize_planes(weights, group, 4)
                rounded[index] = unpack_codes(packed)
            else:  # four bits beside nested planes: code 16 q at a sixteenth of the scale is hi = q, lo = 0
                unit = 1 if bits > 4 else 16
                wide = transformed(codes.codes, spec, index).astype(np.int16) * np.int16(unit)
                rounded[index] = wide, transformed(codes.scales, spec, index) / np.float32(unit)
        groups = -(-spec.cols // group)
        codes_all = arranged((rounded[i][0] for i in range(len(found))), spec, spec.rows, spec.cols, np.int16)
        scales = arranged((rounded[i][1] for i in range(len(found))), spec, spec.rows, groups)
        if bits > 4:
            return pack_int8(codes_all, scales, group)
        hi, lo = split_codes(codes_all, 4)
        return pack_planes(hi, lo, scales * np.float32(16), group, 4)

    # ---- reading

    def _codes(self, spec: WeightSpec) -> list[QuantizedTensor | None] | None:
        """The codes of each source (None where it has none), or None if they cannot stand in one matrix."""
        if spec.transform != "none":
            return None
        found = [self.source.quantized(self.names[name]) for name in spec.sources]
        groups = {q.group for q in found if q is not None}
        return found if len(groups) == 1 and groups <= set(GROUPS) else None

    def _read(self, name: str) -> F32:
        return self.source.read(self.names[name])

    def weights(self, spec: WeightSpec) -> F32:
        """The matrix as float32 [rows, cols]."""

        def parts() -> Iterable[F32]:
            last, values = "", np.empty((0, 0), np.float32)
            for index, name in enumerate(spec.sources):
                if name != last:  # the slices of a fused matrix follow each other
                    last, values = name, self._read(name)
                yield transformed(values, spec, index)

        return arranged(parts(), spec, spec.rows, spec.cols)


def transformed(values: Array, spec: WeightSpec, index: int) -> Array:
    """A source as the plan wants it: transposed, offset, sliced."""
    if spec.transform == "transpose":
        values = values.T
    elif spec.transform == "plus_one":
        values = values + np.float32(1)
    if spec.slices:
        first, last = spec.slices[index]
        values = values[first:last]
    return values


def arranged(
    parts: Iterable[Array], spec: WeightSpec, rows: int, cols: int, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Parts [n_i, at most cols] as one matrix [rows, cols]: one below the other, or interleaved by tiles of 32 rows;
    new rows and columns are zero. A lone part that is the whole matrix is not copied."""
    place = _interleaved if spec.layout == "interleave" else _stacked
    at = 0
    out: Array | None = None
    for index, part in enumerate(parts):
        if out is None:
            if len(spec.sources) == 1 and part.shape == (rows, cols):
                return part if part.dtype == dtype else part.astype(dtype)
            out = np.zeros((rows, cols), dtype)
        at = place(out, part, index, at, len(spec.sources))
    if out is None:
        raise ModelError(f"weight {spec.name} has no sources")
    return out


def _stacked(out: Array, part: Array, index: int, at: int, count: int) -> int:
    if at + len(part) > len(out) or part.shape[1] > out.shape[1]:
        raise ModelError(f"sources of {list(part.shape)} do not fit a matrix of {list(out.shape)}")
    out[at : at + len(part), : part.shape[1]] = part
    return at + len(part)


def _interleaved(out: Array, part: Array, index: int, at: int, count: int) -> int:
    tiles = out.reshape(-1, count, TILE_ROWS, out.shape[1])[:, index]
    if len(part) > len(tiles) * TILE_ROWS or part.shape[1] > out.shape[1]:
        raise ModelError(f"sources of {list(part.shape)} do not fit a matrix of {list(out.shape)}")
    whole = len(part) // TILE_ROWS
    tiles[:whole, :, : part.shape[1]] = part[: whole * TILE_ROWS].reshape(whole, TILE_ROWS, -1)
    rest = part[whole * TILE_ROWS :]
    if len(rest):
        tiles[whole, : len(rest), : part.shape[1]] = rest
    return 0

"""An artifact's matrices taken apart again: codes and scales of each of the checkpoint's own weights.

Knows plans and kernel layout; formats live beside it. Rows that were interleaved (gate and up) are put back, padding is
cut off, and what is not in codes is given as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError, UnsupportedModelError
from haomiao.kernels.pack import unpack, unpack_codes
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.load.artifact import Artifact
from haomiao.models.plan import Plan, WeightSpec
from haomiao.types import F32

Planes = Literal["hi", "hi+lo"]
I16 = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of the checkpoint. `codes` int16 [rows, cols] with `scales` float32 [rows, groups], or `values`."""

    name: str
    values: F32 | None
    codes: I16 | None
    scales: F32 | None
    group: int
    table: bool = False
    """The token table or the head."""

    @property
    def rows(self) -> int:
        """Of the weight in the checkpoint."""
        stored: npt.NDArray[Any] | None = self.values if self.codes is None else self.codes
        return 0 if stored is None else len(stored)


def parts(
    artifact: Artifact, plan: Plan, point: str, *, tables_in_codes: bool = False, norms_as_run: bool = False
) -> Iterator[Part]:
    """Every weight of the checkpoint at `point`: body matrices in codes, everything else as floats.

    `tables_in_codes`: the token table and the head in codes too, with all planes that are stored. `norms_as_run`: norm
    weights that checkpoints store as offsets from one come with their one. Raises `UnsupportedModelError` for families
    whose checkpoints store weights transposed (Conv1D), whose groups would run along the other axis.
    """
    planes: Planes = "hi" if point == "int4" else "hi+lo"
    written: set[str] = set()
    for spec in plan.weights.values():
        if spec.transform == "transpose":
            raise UnsupportedModelError(f"{plan.family} cannot be exported: its checkpoints store weights transposed")
        if spec.kind == "vector":
            offset = np.float32(1 if spec.transform == "plus_one" and not norms_as_run else 0)
            yield from _vectors(spec, artifact.vectors[spec.name] - offset)
        elif spec.role == "body":
            yield from _matrices(spec, artifact.tensors[spec.name], planes)
        elif spec.sources[0] not in written:
            written.add(spec.sources[0])
            yield _table(spec, artifact.tensors[spec.name], tables_in_codes)


def rows_of(spec: WeightSpec) -> dict[str, npt.NDArray[np.int64]]:
    """The matrix's rows that each source became, in the source's own order; slices of one source follow each other."""
    sizes = [shape[0] for shape in spec.shapes] if not spec.slices else [end - begin for begin, end in spec.slices]
    starts, count = np.cumsum([0, *sizes]), len(sizes)
    found: dict[str, list[npt.NDArray[np.int64]]] = {}
    for i, (name, n) in enumerate(zip(spec.sources, sizes, strict=True)):
        rows = np.arange(n)
        if spec.layout == "concat":
            rows = starts[i] + rows
        else:
            rows = rows // TILE_ROWS * TILE_ROWS * count + i * TILE_ROWS + rows % TILE_ROWS
        found.setdefault(name, []).append(rows)
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _vectors(spec: WeightSpec, values: F32) -> Iterator[Part]:
    for name, rows in rows_of(spec).items():
        yield Part(name, values[rows], None, None, 0)


def _matrices(spec: WeightSpec, tensor: PackedTensor, planes: Planes) -> Iterator[Part]:
    if tensor.encoding not in ("int8", "planes"):
        raise InputError(f"{spec.name} is stored as {tensor.encoding}: only int8 and int4 artifacts are exported")
    codes, scales = unpack_codes(tensor, planes)
    cols = {name: shape[1] for name, shape in zip(spec.sources, spec.shapes, strict=True)}
    for name, rows in rows_of(spec).items():
        groups = -(-cols[name] // tensor.group)
        yield Part(name, None, codes[rows, : cols[name]], scales[rows, :groups], tensor.group)


def _table(spec: WeightSpec, tensor: PackedTensor, in_codes: bool) -> Part:
    if not in_codes or tensor.encoding not in ("int8", "planes"):
        return Part(spec.sources[0], unpack(tensor), None, None, 0, table=True)
    codes, scales = unpack_codes(tensor)
    return Part(spec.sources[0], None, codes, scales[:, : -(-tensor.cols // tensor.group)], tensor.group, table=True)


def config_of(artifact: Artifact) -> dict[str, Any]:
    """The checkpoint's config.json, without what our loader added."""
    config = {key: value for key, value in artifact.meta["config"].items() if key != "generation_config"}
    return {key: value for key, value in config.items() if key != "quantization_config"}

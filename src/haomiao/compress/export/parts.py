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


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of the checkpoint. `codes` int16 [rows, cols] with `scales` float32 [rows, groups], or `values`."""

    name: str
    values: F32 | None
    codes: npt.NDArray[np.int16] | None
    scales: F32 | None
    group: int


def parts(artifact: Artifact, plan: Plan, point: str) -> Iterator[Part]:
    """Every weight of the checkpoint at `point`: body matrices in codes, everything else as floats.

    Raises `UnsupportedModelError` for families whose checkpoints store weights otherwise (Conv1D, fused slices).
    """
    planes: Planes = "hi" if point == "int4" else "hi+lo"
    written: set[str] = set()
    for spec in plan.weights.values():
        if spec.slices or spec.transform == "transpose":
            raise UnsupportedModelError(
                f"{plan.family} cannot be exported yet: its checkpoints fuse or transpose weights"
            )
        if spec.kind == "vector":
            offset = np.float32(1 if spec.transform == "plus_one" else 0)
            yield from _vectors(spec, artifact.vectors[spec.name] - offset)
        elif spec.role == "body":
            yield from _matrices(spec, artifact.tensors[spec.name], planes)
        elif spec.sources[0] not in written:
            written.add(spec.sources[0])
            values = unpack(artifact.tensors[spec.name])
            yield Part(spec.sources[0], values, None, None, 0)


def rows_of(spec: WeightSpec) -> list[npt.NDArray[np.int64]]:
    """The matrix's rows that each source became, in the source's own order."""
    sizes = [shape[0] for shape in spec.shapes]
    if spec.layout == "concat":
        starts = np.cumsum([0, *sizes])
        return [np.arange(starts[i], starts[i + 1]) for i in range(len(sizes))]
    count = len(sizes)
    return [
        np.arange(n) // TILE_ROWS * TILE_ROWS * count + i * TILE_ROWS + np.arange(n) % TILE_ROWS
        for i, n in enumerate(sizes)
    ]


def _vectors(spec: WeightSpec, values: F32) -> Iterator[Part]:
    for name, rows in zip(spec.sources, rows_of(spec), strict=True):
        yield Part(name, values[rows], None, None, 0)


def _matrices(spec: WeightSpec, tensor: PackedTensor, planes: Planes) -> Iterator[Part]:
    if tensor.encoding not in ("int8", "planes"):
        raise InputError(f"{spec.name} is stored as {tensor.encoding}: only int8 and int4 artifacts are exported")
    codes, scales = unpack_codes(tensor, planes)
    for name, rows, shape in zip(spec.sources, rows_of(spec), spec.shapes, strict=True):
        groups = -(-shape[1] // tensor.group)
        yield Part(name, None, codes[rows, : shape[1]], scales[rows, :groups], tensor.group)


def config_of(artifact: Artifact) -> dict[str, Any]:
    """The checkpoint's config.json, without what our loader added."""
    config = {key: value for key, value in artifact.meta["config"].items() if key != "generation_config"}
    return {key: value for key, value in config.items() if key != "quantization_config"}

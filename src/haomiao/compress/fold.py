"""Scaling of a layer's inputs (AWQ, Lin et al. 2306.00978), folded into what computes them.

A factor s for each input column: the matrix's columns are multiplied by s, and the operation before divides by it: a
norm's weight (and bias), the rows of `up` behind a gated activation, the rows of v behind attention (heads that share
a KV head share its factors). s = m^α with m the mean magnitude of the inputs, α searched by the error of the rounded
layer under the second moments of its inputs. Where nothing can take the factor (a plain activation), the layer is left
as it is. Rows that were quantized already are scaled through their scales: exact but for their float16 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.compress.forward import uses
from haomiao.compress.solver import F64, layer_error
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import TILE_ROWS, PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.models import plan as ops
from haomiao.types import F32

I64 = npt.NDArray[np.int64]
ALPHAS = tuple(i / 10 for i in range(11))
SEARCHED_ROWS = 1024
"""Rows of a matrix that the search looks at, evenly spread."""


@dataclass(frozen=True, slots=True)
class Taker:
    """What takes a layer's factors: vectors that are divided column by column, or rows of a matrix (and its bias)."""

    vectors: tuple[str, ...]
    matrix: str | None
    bias: str | None
    rows: I64 | None
    """[cols] row of `matrix` that makes each input column."""
    shared: int = 1
    """Columns in groups of `shared` heads of `width` have the same factors."""
    width: int = 0


@dataclass(frozen=True, slots=True)
class Folded:
    """Factors [cols] and what changes with them; factors None: nothing is better left alone."""

    tensors: dict[str, PackedTensor]
    vectors: dict[str, F32]
    factors: F32 | None
    alpha: float | None = None


def taker(plan: ops.Plan, place: int, source: str) -> Taker | None:
    """What computes the input of the linear layer at `place`, if it can take factors."""
    before = [i for i in range(place) if source in uses(plan.ops[i])[1]]
    op = plan.ops[before[-1]] if before else None
    match op:
        case ops.Norm():
            return Taker((op.weight,) if op.bias is None else (op.weight, op.bias), None, None, None)
        case ops.Glu():
            linear = _linear(plan, before[-1], op.source)
            neurons = np.arange(plan.buffers[op.out], dtype=np.int64)
            return Taker((), linear.weight, linear.bias, neurons // 32 * 64 + 32 + neurons % 32)
        case ops.Attention():
            linear = _linear(plan, before[-1], op.qkv)
            shared = op.heads // op.kv_heads
            head, channel = np.divmod(np.arange(op.heads * op.head_dim, dtype=np.int64), op.head_dim)
            rows = op.v_offset + head // shared * op.head_dim + channel
            return Taker((), linear.weight, linear.bias, rows, shared, op.head_dim)
    return None


def _linear(plan: ops.Plan, place: int, out: str) -> ops.Linear:
    found = [op for op in plan.ops[:place] if isinstance(op, ops.Linear) and op.out == out]
    return found[-1]


def search_factors(weights: F32, hessian: F64, magnitudes: F64, recipe: Any, taken: Taker) -> tuple[F32, float] | None:
    """The best factors [cols] and their α; None if α = 0 (no scaling) is best."""
    step = max(1, len(weights) // SEARCHED_ROWS)
    part = np.ascontiguousarray(weights[::step][:SEARCHED_ROWS])
    level = np.maximum(magnitudes, 1e-4 * magnitudes.max() or 1.0)
    if taken.shared > 1:
        grouped = level.reshape(-1, taken.shared, taken.width).mean(axis=1, keepdims=True)
        level = np.broadcast_to(grouped, (len(grouped), taken.shared, taken.width)).reshape(-1)
    best, chosen = np.inf, 0.0
    factors = np.ones(len(level), np.float32)
    for alpha in ALPHAS:
        scale = level**alpha
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        scaled = part * scale
        if recipe.bits == 8:
            rounded = unpack(quantize_int8(scaled, recipe.group))
        else:
            rounded = unpack(quantize_planes(scaled, recipe.group, 4, False))
        error = float(layer_error(part - rounded / scale, hessian).sum())
        if error < best:
            best, chosen, factors = error, alpha, scale
    return (factors, chosen) if chosen > 0 else None


def fold(
    taken: Taker, factors: F32, tensor: Callable[[str], PackedTensor], vector: Callable[[str], F32]
) -> tuple[dict[str, PackedTensor], dict[str, F32]]:
    """The matrices and vectors that change when the layer before divides its outputs by `factors`."""
    if taken.rows is None or taken.matrix is None:
        return {}, {name: vector(name) / factors for name in taken.vectors}
    matrix = tensor(taken.matrix)
    divisors = np.ones(matrix.rows, np.float32)
    divisors[taken.rows] = factors
    vectors = {} if taken.bias is None else {taken.bias: vector(taken.bias) / divisors}
    return {taken.matrix: divide_rows(matrix, divisors)}, vectors


def divide_rows(tensor: PackedTensor, divisors: F32) -> PackedTensor:
    """Rows of a quantized matrix divided through their scales; codes and the second plane stay."""
    padded = np.ones(tensor.tiles * TILE_ROWS, np.float32)
    padded[: tensor.rows] = divisors
    groups = tensor.padded_cols // tensor.group
    hi = tensor.hi.reshape(tensor.tiles, groups, -1).copy()
    scales = np.ascontiguousarray(hi[:, :, : 2 * TILE_ROWS]).view("<f2")
    divided = (scales.astype(np.float32) / padded.reshape(-1, 1, TILE_ROWS)).astype("<f2")
    hi[:, :, : 2 * TILE_ROWS] = divided.view(np.uint8)
    return PackedTensor(
        tensor.encoding, tensor.rows, tensor.cols, tensor.group, tensor.lo_shift, hi.reshape(-1), tensor.lo
    )


def scale_inputs(job: Any, stage: Any, weights: F32, hessian: F64, magnitudes: F64) -> Folded:
    """Search and fold for one stage of a job."""
    taken = taker(job.plan, stage.place, stage.source)
    found = None if taken is None else search_factors(weights, hessian, magnitudes, job.recipe, taken)
    if taken is None or found is None:
        return Folded({}, {}, None)
    factors, alpha = found
    tensors, vectors = fold(taken, factors, job.work.tensor, job.work.vector)
    return Folded(tensors, vectors, factors, alpha)

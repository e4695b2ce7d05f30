"""What one step of a plan reads and computes: bytes of weights by operating point, bytes of K/V, operations.

Counts from the plan and the stored tensors, not from a clock. Knows nothing about speed.
"""

from __future__ import annotations

from collections.abc import Mapping

from haomiao.kernels.packed import PackedTensor
from haomiao.models.plan import Head, Linear, Plan
from haomiao.types import POINTS, KvType, Planes

KV_BYTES: Mapping[KvType, int] = {"f32": 4, "bf16": 2, "int8": 1}


def weight_bytes_per_step(plan: Plan, weights: Mapping[str, object], point: str) -> int:
    """Bytes of matrices that one step reads at `point`: each linear layer once, the head at its own planes.

    What a tile mask leaves out is not read. The embedding is read by row and vectors are small: both are left out (less
    than 0.1 % of any real model).
    """
    chosen = POINTS[point]
    total = 0
    for op in plan.ops:
        if isinstance(op, Linear):
            total += _read_bytes(weights[op.weight], chosen.planes)
        elif isinstance(op, Head):
            total += _read_bytes(weights[op.weight], chosen.head)
    return total


def kv_bytes_per_token(plan: Plan, kv: KvType) -> int:
    """Bytes of K and V that one decode step reads for each token of its context, over all layers.

    int8 adds one float32 scale for K and one for V of every head. Sliding windows read less; that is not counted here.
    """
    total = 0
    for heads, dim in zip(plan.kv_heads, plan.head_dims, strict=True):
        total += 2 * heads * dim * KV_BYTES[kv]
        if kv == "int8":
            total += 2 * heads * 4
    return total


def operations_per_token(plan: Plan, weights: Mapping[str, object] | None = None) -> int:
    """Multiplications and additions in the linear layers for one prompt token; head and attention are left out. With
    `weights`, what their tile masks leave out is not counted."""
    total = 0.0
    for op in plan.ops:
        if isinstance(op, Linear):
            spec, weight = plan.weights[op.weight], None if weights is None else weights[op.weight]
            total += 2 * spec.rows * spec.cols * (weight.share if isinstance(weight, PackedTensor) else 1.0)
    return round(total)


def _read_bytes(weight: object, planes: Planes) -> int:
    if not isinstance(weight, PackedTensor):
        return int(getattr(weight, "nbytes", 0))
    if planes == "hi":
        return int(weight.hi.nbytes)
    return weight.nbytes

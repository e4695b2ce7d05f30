"""Whether weights are those that a plan asks for. Knows shapes, not values, and nothing about files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from haomiao.errors import ModelError
from haomiao.kernels.packed import PackedTensor
from haomiao.models.plan import Plan
from haomiao.types import F32, POINTS

ENCODINGS = {"full": ("f32", "bf16"), "bf16": ("bf16",), "nested": ("int8", "planes")}
"""What the matrices of a point's family may be stored in."""


def check_weights(plan: Plan, tensors: Mapping[str, PackedTensor], vectors: Mapping[str, F32]) -> None:
    """Every weight of the plan is there, in its shape. Raises `ModelError` that names the first that is not."""
    for spec in plan.weights.values():
        if spec.kind == "vector":
            vector = vectors.get(spec.name)
            fits = vector is not None and vector.shape == (spec.rows,)
        else:
            tensor = tensors.get(spec.name)
            fits = tensor is not None and (tensor.rows, tensor.cols) == (spec.rows, spec.cols)
        if not fits:
            raise ModelError(f"weight {spec.name} is absent, or not {spec.rows} x {spec.cols} as the config says")


def check_encodings(plan: Plan, tensors: Mapping[str, PackedTensor], points: Sequence[str]) -> None:
    """Every matrix is stored as the points need it (tables are read by row, in any encoding). Raises `ModelError`."""
    for point in points:
        allowed = ENCODINGS[POINTS[point].family]
        for spec in plan.weights.values():
            if spec.kind == "matrix" and tensors[spec.name].encoding not in allowed:
                raise ModelError(f"weight {spec.name} is stored as {tensors[spec.name].encoding}, not fit for {point}")

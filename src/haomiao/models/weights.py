"""Whether weights are those that a plan asks for. Knows shapes, not values, and nothing about files."""

from __future__ import annotations

from collections.abc import Mapping

from haomiao.errors import ModelError
from haomiao.kernels.packed import PackedTensor
from haomiao.models.plan import Plan
from haomiao.types import F32


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

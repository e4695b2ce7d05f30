"""One layer: a matrix, the second moments of its inputs and a recipe in; its packed form and a line of the log out."""

from __future__ import annotations

from typing import Any

import numpy as np

from haomiao.compress.quantize.gptq import Planes, gptq
from haomiao.compress.recipe import Recipe
from haomiao.compress.solver import F64, layer_error
from haomiao.kernels.pack import unpack
from haomiao.kernels.packed import PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.types import B8, F32


def solve_layer(
    weights: F32, hessian: F64, recipe: Recipe, name: str, mask: B8 | None = None
) -> tuple[PackedTensor, dict[str, Any]]:
    """Quantize (and prune, where `mask` says so) by the recipe. The log holds the sum over outputs of the mean squared
    error (`error`; of both planes `lo_error`) and what it is of the outputs' own power (`relative`)."""
    power = float(layer_error(weights, hessian).sum())
    if recipe.method == "rtn" and recipe.bits != 3:
        packed, error, lo_error = _round(weights, hessian, recipe)
        log: dict[str, Any] = {}
    else:
        planes: Planes = gptq(
            weights,
            hessian,
            bits=recipe.bits,
            group=recipe.group,
            order=recipe.order,
            damping=recipe.damping if recipe.method == "gptq" else 1e5,
            lo=recipe.lo,
            lo_shift=recipe.lo_shift,
            mask=mask,
        )
        packed = planes.packed(recipe.bits, recipe.group)
        error, lo_error = planes.error, planes.lo_error
        log = {"damping": planes.damping}
    log |= {"error": error, "relative": error / power if power else 0.0}
    if lo_error is not None:
        log |= {"lo_error": lo_error, "lo_shift": packed.lo_shift}
    if mask is not None:
        log["zeros"] = float(1 - np.mean(mask))
    return packed, log


def _round(weights: F32, hessian: F64, recipe: Recipe) -> tuple[PackedTensor, float, float | None]:
    """Round to nearest: the packed matrix, the error of what int4 reads, and that of both planes."""
    if recipe.bits == 8:
        packed = quantize_int8(weights, recipe.group)
        return packed, float(layer_error(weights - unpack(packed), hessian).sum()), None
    packed = quantize_planes(weights, recipe.group, recipe.lo_shift or 4, recipe.lo)
    error = float(layer_error(weights - unpack(packed, "hi"), hessian).sum())
    return packed, error, float(layer_error(weights - unpack(packed), hessian).sum()) if recipe.lo else None

"""One layer: a matrix, the second moments of its inputs and a recipe in; its packed form and a line of the log out."""

from __future__ import annotations

from typing import Any

import numpy as np

from haomiao.compress.prune.masks import (
    Choose,
    compensate_tiles,
    empty_tiles,
    keep_tiles,
    pattern_mask,
    sparsegpt,
    tile_costs,
    tile_mask,
)
from haomiao.compress.prune.sparse import sparsify
from haomiao.compress.quantize.gptq import Planes, gptq
from haomiao.compress.recipe import Prune, Recipe
from haomiao.compress.solver import F64, layer_error, layer_power
from haomiao.kernels.pack import unpack, unpack_codes
from haomiao.kernels.packed import PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.types import B8, F32


def solve_layer(
    weights: F32, hessian: F64, recipe: Recipe, name: str, share: float | None = None
) -> tuple[PackedTensor, dict[str, Any]]:
    """Quantize and prune by the recipe; `share` is what this layer loses (default: the recipe's).

    The log holds the sum over outputs of the mean squared error (`error`; of both planes `lo_error`) and what it is of
    the outputs' own power (`relative`).
    """
    power = layer_power(weights, hessian)
    target, mask, choose = _pruning(weights, hessian, recipe, share)
    if recipe.method == "rtn" and recipe.bits != 3:
        packed, error, lo_error = _round(weights, target, hessian, recipe, mask)
        log: dict[str, Any] = {}
    else:
        planes: Planes = gptq(
            target,
            hessian,
            bits=recipe.bits,
            group=recipe.group,
            order=recipe.order,
            damping=recipe.damping if recipe.method == "gptq" else 1e5,
            lo=recipe.lo,
            lo_shift=recipe.lo_shift,
            mask=mask,
            choose=choose,
        )
        packed = planes.packed(recipe.bits, recipe.group)
        error, lo_error = planes.error, planes.lo_error
        if target is not weights:  # the error of pruning comes on top
            error = float(layer_error(weights - unpack(packed, "hi"), hessian).sum())
            lo_error = None if packed.lo is None else float(layer_error(weights - unpack(packed), hessian).sum())
        log = {"damping": planes.damping}
    log |= {"error": error, "relative": error / power if power else 0.0}
    if lo_error is not None:
        log |= {"lo_error": lo_error, "lo_shift": packed.lo_shift}
    if mask is not None or choose is not None:
        codes, _ = unpack_codes(packed)
        log |= {"zeros": float(np.mean(codes == 0)), "empty_tiles": float(np.mean(empty_tiles(codes, recipe.group)))}
    return packed, log


def _pruning(weights: F32, hessian: F64, recipe: Recipe, share: float | None) -> tuple[F32, B8 | None, Choose | None]:
    """The weights to be rounded, and the mask that is chosen ahead or the choice that is made on the way."""
    prune = recipe.mask
    if prune is None:
        return weights, None, None
    part = prune.share if share is None else share
    if not recipe.joint:
        return _pruned_first(weights, hessian, recipe, prune, part)
    if prune.kind == "tile":
        kept = keep_tiles(tile_costs(weights, hessian, recipe.group, recipe.damping), part)
        target = compensate_tiles(weights, hessian, kept, recipe.group, recipe.damping)
        return target, tile_mask(kept, len(weights), weights.shape[1], recipe.group), None
    if prune.kind == "sparsegpt":
        return weights, None, sparsegpt(prune, part)
    return weights, pattern_mask(prune, weights, hessian, part), None


def _pruned_first(
    weights: F32, hessian: F64, recipe: Recipe, prune: Prune, share: float
) -> tuple[F32, B8 | None, Choose | None]:
    """SparseGPT as it stands, or tiles cut by Σ w² H_jj, without a thought of the rounding to come."""
    if prune.kind == "tile":
        squares = tile_costs(weights, np.diag(np.diagonal(hessian)), recipe.group, recipe.damping)
        mask = tile_mask(keep_tiles(squares, share), len(weights), weights.shape[1], recipe.group)
        return weights * mask, mask, None
    if prune.kind == "sparsegpt":
        pruned, mask, _ = sparsify(weights, hessian, choose=sparsegpt(prune, share), damping=recipe.damping)
    else:
        mask = pattern_mask(prune, weights, hessian, share)
        pruned = weights * mask
    return pruned, mask, None


def _round(
    original: F32, target: F32, hessian: F64, recipe: Recipe, mask: B8 | None
) -> tuple[PackedTensor, float, float | None]:
    """Round what is left to nearest: the packed matrix, the error of what int4 reads, and that of both planes."""
    weights = target if mask is None else target * mask
    if recipe.bits == 8:
        packed = quantize_int8(weights, recipe.group)
        return packed, float(layer_error(original - unpack(packed), hessian).sum()), None
    packed = quantize_planes(weights, recipe.group, recipe.lo_shift or 4, recipe.lo)
    error = float(layer_error(original - unpack(packed, "hi"), hessian).sum())
    return packed, error, float(layer_error(original - unpack(packed), hessian).sum()) if recipe.lo else None

"""GPTQ with nested planes: int4 codes by second-order elimination, and a second plane that makes them int8.

GPTQ (Frantar et al. 2210.17323): columns are rounded one by one, errors pushed into the columns to come. Orders:

* `static`: columns by descending activation energy (act-order); scales are those of the original weights, so that
  groups stay groups of neighbouring columns and nothing is permuted at run time;
* `group`: groups by descending energy, columns by energy inside each, and scales fitted when a group is entered, to
  the weights as updated so far (on survivors, where a mask prunes);
* `natural`: columns as they lie, scales fitted when a group is entered.

The second plane rounds, by the same elimination, what the first left of the *original* weights. A code that GPTQ chose
is often not the nearest one, so the remainder may be larger than half a step: `lo_shift` 4 would clip it. The solver
takes the shift (4, 3, 2) with the least weighted error for each matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao.compress.prune.masks import Choose
from haomiao.compress.quantize.grid import code_range, fit_scales, nearest, reciprocal
from haomiao.compress.solver import F64, I64, Factor, eliminate, factorize
from haomiao.kernels.pack import pack_int8, pack_planes
from haomiao.kernels.packed import PackedTensor
from haomiao.types import B8, F32

Order = Literal["static", "group", "natural"]
ORDERS: tuple[Order, ...] = ("static", "group", "natural")
LO_SHIFTS = (4, 3, 2)

I8 = npt.NDArray[np.int8]


@dataclass(slots=True)
class Planes:
    """What the solver found: codes, scales, and the mean squared error of the layer's outputs, summed over them."""

    codes: I8  # [rows, cols]
    lo: I8 | None  # [rows, cols]
    scales: F32  # [rows, groups]
    lo_shift: int
    error: float
    """Σ e², damping taken out: of the codes alone."""
    lo_error: float | None
    """Of both planes together."""
    damping: float

    def packed(self, bits: int, group: int) -> PackedTensor:
        """In kernel layout: `planes` for 4 bits, `int8` for 8."""
        if bits == 8:
            return pack_int8(self.codes, self.scales, group)
        return pack_planes(self.codes, self.lo, self.scales, group, self.lo_shift)

    def weights(self, group: int) -> F32:
        """What the codes alone stand for, float32 [rows, cols]."""
        return self.codes * np.repeat(self.scales, group, axis=1)[:, : self.codes.shape[1]]


def column_order(hessian: F64, order: Order, group: int) -> I64:
    """The order of elimination. Ties keep the columns' own order."""
    energy = np.diagonal(hessian)
    if order == "natural":
        return np.arange(len(energy))
    if order == "static":
        return np.argsort(-energy, kind="stable")
    starts = range(0, len(energy), group)
    means = np.array([energy[s : s + group].mean() for s in starts])
    # a last group that is not whole stays last: units of the solver begin at multiples of the group
    whole = len(energy) // group
    ranked = [*np.argsort(-means[:whole], kind="stable"), *range(whole, len(means))]
    parts = [s * group + np.argsort(-energy[s * group : (s + 1) * group], kind="stable") for s in ranked]
    return np.concatenate(parts).astype(np.int64)


class GroupRounding:
    """A `solver.Policy` that rounds to a grid per row and group of neighbouring columns."""

    def __init__(
        self,
        order: I64,
        rows: int,
        group: int,
        bits: int,
        energy: F64,
        scales: F32 | None,
        mask: B8 | None,
        choose: Choose | None = None,
    ) -> None:
        self.unit = group if scales is None or choose is not None else 128
        self.mask = np.ones((len(order), rows), np.bool_) if mask is None and choose is not None else mask
        """Kept weights [cols, rows]; None: all."""
        self._choose = choose
        self.codes = np.zeros((len(order), rows), np.int8)  # [cols, rows], columns as they lie in the matrix
        groups = -(-len(order) // group)
        self.scales: F32 = np.zeros((groups, rows), np.float32) if scales is None else np.ascontiguousarray(scales.T)
        self._order, self._group, self._bits = order, group, bits
        self._energy = energy.astype(np.float32)
        self._refit = scales is None
        self._least, self._greatest = code_range(bits)
        self._inverse = reciprocal(self.scales)

    def enter(self, begin: int, block: F32, upper: F32) -> None:
        """Choose what is pruned of the columns that come next, and fit their scales to what is left of them as it has
        become."""
        columns = self._order[begin : begin + len(block)]
        if self._choose is not None and self.mask is not None:
            self.mask[columns] &= self._choose(columns, block, upper)
        if self._refit:
            kept = block if self.mask is None else block * self.mask[columns]
            index = columns[0] // self._group
            self.scales[index] = fit_scales(np.ascontiguousarray(kept.T), self._energy[columns], self._bits)
            self._inverse[index] = reciprocal(self.scales[index])

    def fix(self, column: int, values: F32) -> F32:
        """Round to the nearest code, 0 where the mask prunes."""
        at = int(self._order[column])
        group = at // self._group
        codes: F32 = values * self._inverse[group]
        np.rint(codes, out=codes)
        np.clip(codes, self._least, self._greatest, out=codes)
        if self.mask is not None:
            codes *= self.mask[at]
        self.codes[at] = codes
        codes *= self.scales[group]
        return codes


class SecondPlane:
    """A `solver.Policy` that rounds what a first plane left, to codes in [-8, 7] of 2^-shift of its step."""

    unit = 128

    def __init__(self, first: GroupRounding, shift: int) -> None:
        self.codes = np.zeros_like(first.codes)
        self._first, self._shift = first, shift

    def enter(self, begin: int, block: F32, upper: F32) -> None:
        """Nothing to prepare."""

    def fix(self, column: int, values: F32) -> F32:
        """The first plane's value plus the nearest remainder."""
        first = self._first
        at = int(first._order[column])
        scales = first.scales[at // first._group]
        base = first.codes[at] * scales
        step = scales * np.float32(2.0**-self._shift)
        codes = nearest(values - base, step, 4)
        if first.mask is not None:
            codes *= first.mask[at]
        self.codes[at] = codes
        fixed: F32 = base + codes * step
        return fixed


def gptq(
    weights: F32,
    hessian: F64,
    *,
    bits: int = 4,
    group: int = 32,
    order: Order = "group",
    damping: float = 0.01,
    lo: bool = True,
    lo_shift: int | None = None,
    mask: B8 | None = None,
    choose: Choose | None = None,
) -> Planes:
    """Quantize a matrix [rows, cols] whose inputs have the second moments `hessian` [cols, cols] (XᵀX / N).

    `lo` adds the second plane (4 bits only) with `lo_shift`, chosen by error if None. `mask` [rows, cols], False where
    a weight must be zero: pruning and rounding are then solved together, each error reaching the survivors. `choose`
    decides that as the loop comes to a group (`prune.masks.sparsegpt`).
    """
    rows = len(weights)
    columns = column_order(hessian, order, group)
    factor = factorize(hessian, columns, damping=damping)
    energy = np.diagonal(hessian).copy()
    energy[energy == 0] = 1.0
    mask_t = None if mask is None else np.ascontiguousarray(mask.T)
    scales = static_scales(weights, energy, bits, group, mask) if order == "static" else None
    policy = GroupRounding(columns, rows, group, bits, energy, scales, mask_t, choose)
    target = np.ascontiguousarray(weights.T[columns], np.float32)
    error, left = _solve(target, factor, policy)
    solution = Planes(
        codes=np.ascontiguousarray(policy.codes.T),
        lo=None,
        scales=np.ascontiguousarray(policy.scales.T),
        lo_shift=0,
        error=error,
        lo_error=None,
        damping=factor.damping,
    )
    if lo and bits == 4:
        kept = None if policy.mask is None else np.ascontiguousarray(policy.mask.T)
        shift = best_shift(weights, solution, energy, group, kept) if lo_shift is None else lo_shift
        second = SecondPlane(policy, shift)
        np.copyto(left, weights.T[columns])
        solution.lo_error, _ = _solve(left, factor, second)
        solution.lo, solution.lo_shift = np.ascontiguousarray(second.codes.T), shift
    return solution


def static_scales(weights: F32, energy: F64, bits: int, group: int, mask: B8 | None = None) -> F32:
    """Scales [rows, groups] of the weights as they are, padding columns left out of account."""
    rows, cols = weights.shape
    out = np.empty((rows, -(-cols // group)), np.float32)
    for index in range(out.shape[1]):
        part = slice(index * group, min((index + 1) * group, cols))
        block = weights[:, part] if mask is None else weights[:, part] * mask[:, part]
        out[:, index] = fit_scales(block, energy[part], bits)
    return out


def best_shift(weights: F32, solution: Planes, energy: F64, group: int, mask: B8 | None = None) -> int:
    """The `lo_shift` whose second plane, rounded to nearest, leaves the least error weighed by activation energy."""
    cols = weights.shape[1]
    errors = dict.fromkeys(LO_SHIFTS, 0.0)
    for index in range(solution.scales.shape[1]):
        part = slice(index * group, min((index + 1) * group, cols))
        scale = solution.scales[:, index : index + 1]
        left = weights[:, part] - solution.codes[:, part] * scale
        if mask is not None:
            left *= mask[:, part]
        for shift in LO_SHIFTS:
            step = scale * np.float32(2.0**-shift)
            wrong = left - nearest(left, step, 4) * step
            errors[shift] += float(np.einsum("rc,rc,c->", wrong, wrong, energy[part]))
    return min(LO_SHIFTS, key=lambda shift: errors[shift])


def _solve(target: F32, factor: Factor, policy: Any) -> tuple[float, F32]:
    """(Σ e² without the damping's part, the array that may be used again)."""
    original = target.copy()
    total = float(eliminate(target, factor.upper, policy).sum())
    original -= target
    extra = factor.damping * float(np.einsum("cr,cr->", original, original, dtype=np.float64))
    return max(total - extra, 0.0), original

"""How long steps take on this machine: an expectation, and a bound that holds for a stated share of them.

    nanoseconds = (fixed + f(tokens) + g(logit rows) + a * context + b * sequences) * slowness

per operating point; f and g are piecewise linear and never fall. The coefficients come from a calibration
(engine/calibrate.py), or from the first steps where there was none, by non-negative least squares; `slowness` follows
the latest steps, because neighbours come and go (engine/slowness.py). What the fit has wrong for steps of one kind
(tokens, rows and context of one order of magnitude) is learned apart, and slowly.

A bound is the expectation times the stated quantile of actual / expected among runs that are expected to take as long
(engine/overrun.py): noise averages out over a long answer, drift does not, stalls come by the time that passes. That of
a single step stands on single steps of its size. Knows no clock: durations are told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from haomiao.engine.overrun import DAMPING, HORIZONS_NS, Overrun
from haomiao.engine.quantile import AdaptiveQuantile
from haomiao.engine.slowness import Slowness
from haomiao.errors import InputError

COVERAGE = 0.99
"""The share of bounds that is to hold unless somebody says otherwise."""
IDLE_MARGIN = 1.1
"""Bound / expectation of a machine without neighbours: most of what steps vary by is their doing."""
LEARNED = 0.1
"""Share of a surprise that is taken into account for steps of the same kind."""
HALF_LIFE_NS = 200_000_000
SINGLE_STEPS, SINGLE_RATE, ENOUGH = 512, 0.03, 64
"""Latest single steps of one size that count, how fast their level follows misses, and how many are enough."""
TOLERANCE = 0.1
"""Relative error beyond which a measured step counts less in a fit."""
TOKEN_KNOTS = (0, 1, 2, 4, 8, 16, 32, 64, 256)
ROW_KNOTS = (0, 1, 4, 16, 64)
TABLE = 1024
"""Tokens and rows up to which f and g are tabulated."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on."""

    point: str
    decode_tokens: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    """K/V positions read, summed over the step's tokens."""
    logit_rows: int = 0
    sequences: int = 1

    @property
    def tokens(self) -> int:
        """Tokens computed; the model runs them alike, whatever they are for."""
        return self.decode_tokens + self.prefill_tokens

    def features(self) -> tuple[float, ...]:
        """The model's inputs: constant, context, sequences, then the parts of tokens and rows between knots."""
        return (
            *(1.0, float(self.context_tokens), float(self.sequences)),
            *_parts(self.tokens, TOKEN_KNOTS),
            *_parts(self.logit_rows, ROW_KNOTS),
        )


class Cost(Protocol):
    """What scheduling needs to know about time; `CostModel` learns it, tests invent it."""

    def predict(self, shape: StepShape) -> float | None:
        """Expected nanoseconds of a step; None if nothing is known."""
        ...

    def bound(self, shape: StepShape) -> float | None:
        """Nanoseconds that the stated share of such steps stay within; None if nothing is known."""
        ...

    def margin(self, nanoseconds: float) -> float:
        """Bound / expectation of a run of steps that is expected to take so long."""
        ...

    def idle(self) -> Cost:
        """The same for a machine without neighbours."""
        ...


class LearningCost(Cost, Protocol):
    """A `Cost` that is told what steps took."""

    coverage: float

    def rest(self, nanoseconds: float) -> None:
        """Nothing ran for a while: what was seen of neighbours grows old."""
        ...

    def observe(self, shape: StepShape, nanoseconds: float) -> None:
        """Take a measured step into account."""
        ...


@dataclass(frozen=True, slots=True)
class Fit:
    """The coefficients of one point, tabulated."""

    fixed: float
    context: float
    sequence: float
    tokens: tuple[float, ...]
    rows: tuple[float, ...]

    @staticmethod
    def of(weights: Sequence[float]) -> Fit:
        """From coefficients in the order of `StepShape.features`."""
        split = 3 + len(TOKEN_KNOTS)
        return Fit(
            weights[0],
            weights[1],
            weights[2],
            _table(weights[3:split], TOKEN_KNOTS),
            _table(weights[split:], ROW_KNOTS),
        )

    def __call__(self, shape: StepShape) -> float:
        """Nanoseconds on the machine as it was when this was fitted."""
        return (
            self.fixed
            + self.context * shape.context_tokens
            + self.sequence * shape.sequences
            + _look(self.tokens, shape.decode_tokens + shape.prefill_tokens)
            + _look(self.rows, shape.logit_rows)
        )


class CostModel:
    """Implements `Cost`. Unless it was calibrated it learns from the first `minimum` steps of each point."""

    def __init__(self, coverage: float = COVERAGE, minimum: int = 32) -> None:
        """Raises `InputError` for a coverage outside 0.5 to 0.9999: no window of steps tells more."""
        if not 0.5 <= coverage <= 0.9999:
            raise InputError(f"coverage must be from 0.5 to 0.9999, not {coverage:g}", param="coverage")
        self.coverage = coverage
        self._minimum = minimum
        self._weights: dict[str, list[float]] = {}
        self._fits: dict[str, Fit] = {}
        self._young: dict[str, list[tuple[StepShape, float]]] = {}  # steps of points that have no fit, or a fresh one
        self._slowness = Slowness()
        self._offsets: dict[tuple[str, int, int, int], float] = {}
        self._overrun = Overrun(coverage)
        self._single: dict[int, AdaptiveQuantile] = {}  # of single steps, by the size of their expectation
        self._seen = self._inside = 0

    # ---- learn ----------------------------------------------------------------------------------------------------

    def calibrate(self, steps: Sequence[tuple[StepShape, float]]) -> None:
        """Fit every point in `steps`, (shape, nanoseconds) in the order in which they ran, and forget what was known
        of it. The errors of these steps are the first that the bounds stand on."""
        for point in dict.fromkeys(shape.point for shape, _ in steps):
            self._fit(point, [(shape, duration) for shape, duration in steps if shape.point == point])
            self._young.pop(point, None)
        self._slowness = Slowness()
        self._offsets.clear()
        self._single.clear()
        self._overrun = Overrun(self.coverage)
        self._overrun.prime([(self._fits[shape.point](shape), duration) for shape, duration in steps])

    def observe(self, shape: StepShape, nanoseconds: float) -> None:
        """Take a measured step into account."""
        fit = self._fits.get(shape.point)
        young = self._young.get(shape.point)
        if fit is None or young is not None:  # nobody calibrated this point: learn as it runs, ever more rarely
            young = self._young.setdefault(shape.point, [])
            young.append((shape, nanoseconds))
            if len(young) >= self._minimum and (len(young) & (len(young) - 1)) == 0:
                self._fit(shape.point, young)
            if len(young) >= 16 * self._minimum:
                del self._young[shape.point]
        if fit is None:
            return
        kind = _kind(shape)
        offset = self._offsets.get(kind, 1.0)
        expected = max(1.0, fit(shape) * offset)
        believed = expected * self._slowness.value
        self._seen += 1
        self._inside += nanoseconds <= self._bound(believed)
        single = self._single.setdefault(_size(believed), AdaptiveQuantile(self.coverage, SINGLE_STEPS, SINGLE_RATE))
        single.add(nanoseconds / (expected * self._slowness.value**DAMPING))
        self._overrun.add(expected, nanoseconds, self._slowness.value)
        self._slowness.add(nanoseconds / expected, expected)
        self._overrun.believe(self._slowness.value)
        surprise = math.log(max(nanoseconds, 1.0) / (expected * self._slowness.latest))
        self._offsets[kind] = min(4.0, max(0.25, offset * math.exp(LEARNED * min(0.3, max(-0.3, surprise)))))

    def _fit(self, point: str, steps: Sequence[tuple[StepShape, float]]) -> None:
        """Relative errors count, since a step of one token matters as much as one of 512: of each shape the median
        counts, and what lies far off counts little (Huber's weights, iterated), because neighbours only ever slow."""
        alike: dict[StepShape, list[float]] = {}
        for shape, duration in steps:
            alike.setdefault(shape, []).append(max(1.0, duration))
        x = np.array([shape.features() for shape in alike], dtype=np.float64)
        y = np.array([median(durations) for durations in alike.values()], dtype=np.float64)
        importance = np.array([len(durations) for durations in alike.values()], dtype=np.float64)
        weights = np.zeros(x.shape[1])
        trust = np.ones_like(y)
        for _ in range(4):
            root = np.sqrt(importance * trust)
            weights = nonnegative_least_squares(x * (root / y)[:, None], root)
            residual = np.abs(1.0 - x @ weights / y)
            trust = TOLERANCE / np.maximum(residual, TOLERANCE)
        self._weights[point] = weights.tolist()
        self._fits[point] = Fit.of(self._weights[point])

    # ---- predict --------------------------------------------------------------------------------------------------

    def knows(self, points: Iterable[str]) -> bool:
        """True if all of these points can be predicted."""
        return all(point in self._fits for point in points)

    def predict(self, shape: StepShape) -> float | None:
        """Expected nanoseconds of a step as the machine is now, or None before enough steps were seen."""
        fit = self._fits.get(shape.point)
        return None if fit is None else fit(shape) * self._offsets.get(_kind(shape), 1.0) * self._slowness.value

    def bound(self, shape: StepShape) -> float | None:
        """Nanoseconds that `coverage` of such steps stay within, or None before enough steps were seen."""
        expected = self.predict(shape)
        return None if expected is None else self._bound(expected)

    def margin(self, nanoseconds: float) -> float:
        """Bound / expectation of a run of steps that is expected to take so long."""
        return self._overrun.margin(nanoseconds)

    @property
    def slowness(self) -> float:
        """How much slower the machine is now than when it was measured."""
        return self._slowness.value

    def idle(self) -> Cost:
        """The machine as it was when it was measured, or as quick as it was since: what even an idle one needs."""
        return _Idle(self)

    def rest(self, nanoseconds: float) -> None:
        """Nothing ran for so long. Half of the slowness is forgotten every `HALF_LIFE_NS`, and of wide margins in ten
        times as long: if they alone kept requests out, nothing would run, and nothing would ever be learned again."""
        lives = max(0.0, nanoseconds) / HALF_LIFE_NS
        self._slowness.fade(0.5**lives)
        self._overrun.believe(self._slowness.value)
        self._overrun.fade(0.5 ** (lives / 10))

    def counters(self) -> dict[str, int]:
        """Steps whose bound was stated, and those that kept it: what measured coverage is made of."""
        return {"steps": self._seen, "inside": self._inside}

    def _bound(self, expected: float) -> float:
        """Of a single step: it stands on steps of its size, since the steps of a run make up for each other."""
        single = self._single.get(_size(expected))
        if single is None or single.value is None or len(single) < ENOUGH:
            return expected * self._overrun.margin(expected)
        return expected * max(1.0, single.value * math.pow(self._slowness.value, DAMPING - 1.0))

    # ---- keep -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What another process on this machine may start from: JSON-ready."""
        return {
            "features": len(StepShape("").features()),
            "weights": self._weights,
            "margins": self._overrun.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Start from what `state` returned. Raises `InputError` for anything else."""
        weights, margins = state.get("weights"), state.get("margins")
        length = len(StepShape("").features())
        if not isinstance(weights, dict) or not isinstance(margins, list) or len(margins) != len(HORIZONS_NS):
            raise InputError("this is not the state of a cost model")
        if not all(isinstance(each, list) and len(each) == length for each in weights.values()):
            raise InputError("this is the state of another cost model")
        for number in (*(n for each in weights.values() for n in each), *margins):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1e15:
                raise InputError("the state of the cost model holds what is not a duration")
        self._weights = {str(point): [float(n) for n in each] for point, each in weights.items()}
        self._fits = {point: Fit.of(each) for point, each in self._weights.items()}
        self._young = {}
        self._overrun = Overrun(self.coverage)
        self._overrun.restore(margins)


class _Idle:
    """A cost model without its slowness. A machine that is quicker now than when it was measured is taken at that: it
    was measured in company."""

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def predict(self, shape: StepShape) -> float | None:
        expected = self._model.predict(shape)
        return None if expected is None else expected / max(1.0, self._model.slowness)

    def bound(self, shape: StepShape) -> float | None:
        expected = self.predict(shape)
        return None if expected is None else expected * self.margin(expected)

    def margin(self, nanoseconds: float) -> float:
        return min(self._model.margin(nanoseconds), IDLE_MARGIN)

    def idle(self) -> Cost:
        return self


def _kind(shape: StepShape) -> tuple[str, int, int, int]:
    """Steps that are alike: the same point, tokens, rows and context a token of one order of magnitude."""
    tokens = shape.decode_tokens + shape.prefill_tokens
    context = shape.context_tokens // max(1, tokens)
    return shape.point, tokens.bit_length(), shape.logit_rows.bit_length(), context.bit_length() // 2


def _size(nanoseconds: float) -> int:
    """Order of magnitude of a step's time, to the base 4."""
    return int(nanoseconds).bit_length() // 2


def nonnegative_least_squares(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`w >= 0` that minimizes |x w - y|: the active-set method of Lawson and Hanson (1974, chapter 23)."""
    scale = np.maximum(np.abs(x).max(axis=0), 1e-300)
    scaled = x / scale
    gram, target = scaled.T @ scaled, scaled.T @ y
    gram[np.diag_indices_from(gram)] += 1e-9 * max(1.0, float(gram.trace()))  # features that never vary alone
    weights = np.zeros(x.shape[1])
    free = np.zeros(x.shape[1], dtype=bool)
    for _ in range(3 * x.shape[1]):
        gradient = np.where(free, -np.inf, target - gram @ weights)
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * max(1.0, float(np.abs(target).max())):
            break
        free[best] = True
        while True:
            trial = np.zeros_like(weights)
            trial[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            if (trial[free] > 0).all():
                break
            falling = free & (trial <= 0)
            step = np.min(weights[falling] / np.maximum(weights[falling] - trial[falling], 1e-300))
            weights = weights + step * (trial - weights)
            free &= weights > 1e-14
            weights[~free] = 0.0
            if not free.any():
                break
        weights = np.where(free, trial, 0.0)
    found: npt.NDArray[np.float64] = weights / scale
    return found


def _parts(count: float, knots: Sequence[int]) -> tuple[float, ...]:
    """How much of `count` lies between each knot and the next; the last part has no end."""
    ends = (*knots[1:], math.inf)
    return tuple(min(max(count - low, 0.0), high - low) for low, high in zip(knots, ends, strict=True))


def _table(weights: Sequence[float], knots: Sequence[int]) -> tuple[float, ...]:
    values = np.interp(np.arange(TABLE + 1), *_corners(weights, knots))
    return tuple(values.tolist())


def _corners(weights: Sequence[float], knots: Sequence[int]) -> tuple[list[float], list[float]]:
    """The piecewise linear function's corners: (counts, values)."""
    at, values = [float(knots[0])], [0.0]
    for weight, low, high in zip(weights, knots, (*knots[1:], 2 * TABLE), strict=True):
        at.append(float(high))
        values.append(values[-1] + weight * (high - low))
    return at, values


def _look(table: Sequence[float], count: int) -> float:
    """An entry, beyond the table by its last slope."""
    if count <= TABLE:
        return table[count]
    return table[TABLE] + (count - TABLE) * (table[TABLE] - table[TABLE - 1])

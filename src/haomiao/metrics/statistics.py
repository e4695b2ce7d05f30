"""Percentiles and confidence intervals. Knows nothing about what the numbers measure; units are the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its two-sided confidence interval, `low <= high`. `samples` counts what was resampled."""

    estimate: float
    low: float
    high: float
    samples: int
    confidence: float = 0.95

    def as_dict(self) -> dict[str, float | int]:
        """A JSON-ready copy."""
        return {
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "samples": self.samples,
            "confidence": self.confidence,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """What a row of a report says about repeated measurements: the median and how far they spread."""

    median: float
    low: float
    high: float
    samples: int

    def as_dict(self) -> dict[str, float | int]:
        """A JSON-ready copy."""
        return {"median": self.median, "low": self.low, "high": self.high, "samples": self.samples}


def percentile(values: Values, q: float) -> float:
    """The `q`-th percentile, 0 <= q <= 100, interpolated linearly between order statistics (Hyndman & Fan, type 7).

    Raises `ValueError` for no values or a `q` outside the range.
    """
    array = _finite(values)
    if not 0.0 <= q <= 100.0:
        raise ValueError(f"a percentile lies between 0 and 100, not at {q}")
    return float(np.percentile(array, q))


def summarize(values: Values) -> Summary:
    """Median, least and greatest of repeated measurements."""
    array = _finite(values)
    return Summary(float(np.median(array)), float(array.min()), float(array.max()), int(array.size))


def bootstrap_mean(
    values: Values,
    weights: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The (weighted) mean of `values` with a percentile bootstrap interval (Efron 1979).

    `values` [n] are resampled whole, so give one value per *independent* unit: for text, the mean of a block rather
    than every token, since neighbouring tokens are correlated. `weights` [n] are then the blocks' sizes. The seed is
    fixed: the same numbers always give the same interval. One value has no spread: the interval is the estimate.
    """
    array = _finite(values)
    sizes = np.ones_like(array) if weights is None else _finite(weights)
    if sizes.shape != array.shape or (sizes < 0).any() or sizes.sum() <= 0:
        raise ValueError("weights must be as many as values, none negative, not all zero")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies between 0 and 1, not at {confidence}")
    estimate = float(array @ sizes / sizes.sum())
    n = int(array.size)
    if n == 1:
        return Interval(estimate, estimate, estimate, 1, confidence)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 256):  # bounded memory: at most 256 x n indexes at a time
        rows = min(256, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n))
        totals = sizes[drawn].sum(axis=1)
        sums = (array * sizes)[drawn].sum(axis=1)
        means[start : start + rows] = np.divide(sums, totals, out=np.full(rows, estimate), where=totals > 0)
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(estimate, float(low), float(high), n, confidence)


def _finite(values: Values) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError("no values to summarize")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite")
    return array

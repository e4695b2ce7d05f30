"""How long a step takes: a linear model fitted on this machine, and a bound that holds for a stated share of steps.

    nanoseconds = c0 + c1 * decode tokens + c2 * prefill tokens + c3 * context + c4 * logit rows

per operating point, by least squares over the latest steps; the bound is the prediction times the quantile, at
`coverage`, of actual / predicted over the same steps. Admission (a later step of this project) stands on it; the
scheduler uses it to size prefill chunks. Knows nothing about clocks: durations are told to it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on."""

    point: str
    decode_tokens: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    """K/V positions read, summed over the step's tokens."""
    logit_rows: int = 0

    def features(self) -> tuple[float, ...]:
        """The model's inputs, float [5], the constant first."""
        return (1.0, self.decode_tokens, self.prefill_tokens, self.context_tokens, self.logit_rows)


class CostModel:
    """Learns from the latest `window` steps of each point; refitted every `refit` of them."""

    def __init__(self, coverage: float = 0.99, window: int = 256, minimum: int = 32, refit: int = 32) -> None:
        self.coverage = coverage
        self.minimum = minimum
        self.refit = refit
        self._window = window
        self._steps: dict[str, deque[tuple[tuple[float, ...], float]]] = {}
        self._fits: dict[str, tuple[npt.NDArray[np.float64], float]] = {}
        self._since: dict[str, int] = {}

    def observe(self, shape: StepShape, nanoseconds: int) -> None:
        """Take a measured step into account."""
        steps = self._steps.setdefault(shape.point, deque(maxlen=self._window))
        steps.append((shape.features(), float(nanoseconds)))
        self._since[shape.point] = self._since.get(shape.point, 0) + 1
        if len(steps) >= self.minimum and (shape.point not in self._fits or self._since[shape.point] >= self.refit):
            self.fit(shape.point)

    def fit(self, point: str) -> None:
        """Fit the coefficients and the bound. Negative coefficients are left out: more work never saves time."""
        steps = self._steps.get(point)
        if not steps:
            return
        x = np.array([features for features, _ in steps], dtype=np.float64)
        y = np.array([duration for _, duration in steps], dtype=np.float64)
        scale = np.maximum(np.abs(x).max(axis=0), 1.0)
        kept = list(range(x.shape[1]))
        weights = np.zeros(x.shape[1])
        while kept:
            part, *_ = np.linalg.lstsq(x[:, kept] / scale[kept], y, rcond=None)
            if (part >= 0).all():
                weights[kept] = part / scale[kept]
                break
            kept = [index for index, weight in zip(kept, part, strict=True) if weight >= 0]
        predicted = np.maximum(x @ weights, 1.0)
        self._fits[point] = (weights, max(1.0, float(np.quantile(y / predicted, self.coverage))))
        self._since[point] = 0

    def predict(self, shape: StepShape) -> float | None:
        """Expected nanoseconds of a step, or None before enough steps were seen."""
        fit = self._fits.get(shape.point)
        return None if fit is None else float(np.dot(fit[0], shape.features()))

    def bound(self, shape: StepShape) -> float | None:
        """Nanoseconds that `coverage` of such steps stay within, or None before enough steps were seen."""
        fit = self._fits.get(shape.point)
        return None if fit is None else float(np.dot(fit[0], shape.features())) * fit[1]

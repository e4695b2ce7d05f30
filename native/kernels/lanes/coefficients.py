"""Derives the polynomial coefficients of `math.h`: minimax fits by Lawson's iteratively reweighted least squares.

Run it to print them (`python coefficients.py`). Not part of the build. Each fit minimizes the greatest relative error
of the function that math.h evaluates; coefficients are then rounded to float32 one by one, lowest power first, the rest
being fitted again after each (so that later ones absorb the rounding of earlier ones).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def fit(x: F64, target: F64, weight: F64, degree: int) -> list[np.float32]:
    """Coefficients c of sum c[i] x^i nearest to `target` in the greatest `weight * |error|`, as float32."""
    done: list[np.float32] = []
    for first in range(degree + 1):
        rest = target - sum(float(c) * x**i for i, c in enumerate(done))
        basis = np.stack([x**i for i in range(first, degree + 1)], axis=1)
        lawson = np.full(x.shape, 1 / x.size)
        for _ in range(400):
            root = np.sqrt(lawson) * weight
            solution = np.linalg.lstsq(basis * root[:, None], rest * root, rcond=None)[0]
            error = np.abs((basis @ solution - rest) * weight)
            lawson = lawson * error
            lawson /= lawson.sum()
        done.append(np.float32(solution[0]))
    return done


def report(name: str, coefficients: list[np.float32], x: F64, target: F64, weight: F64) -> None:
    value = sum(float(c) * x**i for i, c in enumerate(coefficients))
    print(f"{name}: greatest relative error {np.abs((value - target) * weight).max():.2e}")
    print("  " + ", ".join(f"{float(c).hex()}f" for c in coefficients))


def nodes(low: float, high: float, count: int = 2000) -> F64:
    """Chebyshev nodes of [low, high]; an even count leaves out the middle."""
    angle = np.pi * (np.arange(count) + 0.5) / count
    return np.asarray((low + high) / 2 + (high - low) / 2 * np.cos(angle))


def elementwise(f: Callable[[float], float], x: F64) -> F64:
    return np.array([f(float(v)) for v in x])


def main() -> None:
    # exp(r) = 1 + r + r^2 q(r) on [-ln2 / 2, ln2 / 2]
    r = nodes(-0.3470, 0.3470)
    target, weight = (np.expm1(r) - r) / r**2, r**2 / np.exp(r)
    report("exp", fit(r, target, weight, 4), r, target, weight)
    # tanh(x) = x + x^3 q(x^2) on |x| <= 0.625
    s = nodes(1e-4, 0.625**2)
    x = np.sqrt(s)
    target, weight = (np.tanh(x) - x) / x**3, x**3 / np.tanh(x)
    report("tanh", fit(s, target, weight, 4), s, target, weight)
    # erfc(z) = exp(-z^2) t q(t), t = 1 / (1 + z / 2), on 0 <= z <= 10
    t = nodes(1 / 6, 1.0)
    z = 2 * (1 / t - 1)
    target, weight = np.empty_like(t), np.empty_like(t)
    scaled = elementwise(scaled_erfc, z)
    target, weight = scaled / t, t / scaled
    report("erfc", fit(t, target, weight, 9), t, target, weight)


def scaled_erfc(z: float) -> float:
    """erfc(z) * exp(z^2), by the continued fraction where erfc itself is too small to be exact."""
    if z < 4:
        return math.erfc(z) * math.exp(z * z)
    fraction = 0.0
    for k in range(80, 0, -1):
        fraction = (k / 2) / (z + fraction)
    return 1 / math.sqrt(math.pi) / (z + fraction)


if __name__ == "__main__":
    main()

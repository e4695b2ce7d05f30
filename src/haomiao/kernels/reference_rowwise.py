"""The numpy twin of the rowwise kernels, in float64: what they mean, not their bits. Knows nothing about plans."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao.types import F32

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    wide = x.astype(np.float64)
    mean = (wide**2).mean(axis=-1, keepdims=True)
    y: F32 = (wide / np.sqrt(mean + eps) * weight).astype(np.float32)
    return y


def layer_norm(x: F32, weight: F32, bias: F32 | None, eps: float) -> F32:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    y: F32 = (centred / np.sqrt(variance + eps) * weight + (0 if bias is None else bias)).astype(np.float32)
    return y


def rope_table(positions: Array, inv_freq: Array, attention_factor: float) -> tuple[F32, F32]:
    """Cosines and sines, float32 [tokens, dim / 2], by the plan's rule: angle f32(position) * inv_freq in float32."""
    angles = positions.astype(np.float32)[:, None] * np.asarray(inv_freq, np.float32)[None, :]
    wide = angles.astype(np.float64)
    cosines, sines = np.cos(wide) * attention_factor, np.sin(wide) * attention_factor
    return cosines.astype(np.float32), sines.astype(np.float32)


def rope(heads: Array, cosines: Array, sines: Array) -> F32:
    """Rotate [..., head_dim] in halves of the leading `2 * cosines.shape[-1]` channels; the rest stays."""
    half = cosines.shape[-1]
    wide = heads.astype(np.float64)
    a, b = wide[..., :half].copy(), wide[..., half : 2 * half].copy()
    wide[..., :half] = a * cosines - b * sines
    wide[..., half : 2 * half] = b * cosines + a * sines
    return wide.astype(np.float32)


def activate(x: Array, function: Literal["silu", "gelu", "gelu_tanh", "relu"]) -> F64:
    """The activation function in float64."""
    wide = x.astype(np.float64)
    if function == "relu":
        return np.maximum(wide, 0)
    if function == "silu":
        return wide * _logistic(wide)
    if function == "gelu_tanh":
        return wide * _logistic(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    tail: F64 = np.vectorize(math.erfc, otypes=[np.float64])(-wide / math.sqrt(2))
    return wide * tail / 2


def glu(gate: Array, up: Array, function: Literal["silu", "gelu", "gelu_tanh", "relu"]) -> F32:
    """function(gate) * up."""
    return (activate(gate, function) * up).astype(np.float32)


def scale_softcap(x: Array, scale: float, softcap: float) -> F32:
    """softcap * tanh(x * scale / softcap); softcap 0 only scales."""
    wide = x.astype(np.float64) * scale
    return (softcap * np.tanh(wide / softcap) if softcap > 0 else wide).astype(np.float32)


def argmax(x: Array) -> int:
    """The lowest index among the greatest; NaN never wins; 0 if all are NaN."""
    valid = np.where(np.isnan(x), -np.inf, x)
    greatest = np.flatnonzero(x == valid.max())
    return int(greatest[0]) if greatest.size else 0


def _logistic(x: F64) -> F64:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))

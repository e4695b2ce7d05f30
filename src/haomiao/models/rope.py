"""Rotary embeddings: the inverse frequencies of every scaling that checkpoints name.

Formulas as transformers computes them (modeling_rope_utils), in float32: RoPE (arXiv:2104.09864), linear interpolation
(2306.15595), YaRN (2309.00071), LongRoPE (2402.13753), and Llama 3.1's piecewise scaling. Knows nothing about layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.models.config import ConfigReader, shorten
from haomiao.models.plan import RopeSpec
from haomiao.types import F32


def rope_section(config: ConfigReader, layer_type: str | None = None) -> ConfigReader:
    """The rope parameters in one spelling, whatever the checkpoint's: `rope_parameters` (transformers 5, possibly per
    layer type) or `rope_theta` + `rope_scaling` (transformers 4). `type` becomes `rope_type`."""
    merged: dict[str, Any] = {k: config.values[k] for k in ("rope_theta", "partial_rotary_factor") if config.has(k)}
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    if parameters is not None and layer_type is not None and parameters.has(layer_type):
        parameters = parameters.section(layer_type)
    for section in (scaling, parameters):
        if section is not None:
            merged.update({key: value for key, value in section.values.items() if value is not None})
    if config.has("original_max_position_embeddings"):  # beside the section (Phi-3) it goes before the section's own
        merged["original_max_position_embeddings"] = config.values["original_max_position_embeddings"]
    merged.setdefault("rope_type", merged.get("type", "default"))
    return ConfigReader(merged, "rope parameters")


def rope_spec(
    section: ConfigReader,
    head_dim: int,
    *,
    max_positions: int,
    max_context: int,
    default_theta: float = 10000.0,
) -> RopeSpec:
    """The rotation of one kind of layer.

    `max_positions` is the checkpoint's limit, `max_context` the longest sequence that will be run: LongRoPE takes its
    long factors when that goes beyond the original limit. Raises `ModelError`, `UnsupportedModelError`.
    """
    theta = section.number("rope_theta", default_theta)
    dim = int(head_dim * section.number("partial_rotary_factor", 1.0, most=1.0))
    if dim < 2 or dim % 2:
        raise ModelError(f"{dim} rotary channels of a head of {head_dim} cannot be rotated in pairs")
    kind = section.text("rope_type", "default")
    if kind not in SCALINGS:
        raise UnsupportedModelError(f"rope scaling {shorten(kind)} is not supported")
    with np.errstate(all="ignore"):  # what is not finite in the end is refused below
        # exponents and powers are rounded to float32, as in the reference: that rounding is part of the model
        pairs = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        powers = (np.float64(np.float32(theta)) ** pairs.astype(np.float64)).astype(np.float32)
        inv_freq, factor = SCALINGS[kind](section, powers, theta, max_positions, max_context)
    if not np.isfinite(inv_freq).all() or not math.isfinite(factor):
        raise ModelError("rope parameters give frequencies that are not finite")
    return RopeSpec(dim, tuple(float(f) for f in inv_freq.astype(np.float32)), factor)


Scaling = Callable[[ConfigReader, F32, float, int, int], tuple[F32, float]]


def _default(section: ConfigReader, powers: F32, theta: float, positions: int, context: int) -> tuple[F32, float]:
    return np.float32(1) / powers, 1.0


def _linear(section: ConfigReader, powers: F32, theta: float, positions: int, context: int) -> tuple[F32, float]:
    return np.float32(1) / powers / np.float32(section.number("factor")), 1.0


def _llama3(section: ConfigReader, powers: F32, theta: float, positions: int, context: int) -> tuple[F32, float]:
    """Low frequencies divided by `factor`, high ones kept, a linear blend between."""
    factor = section.number("factor")
    low = section.number("low_freq_factor")
    high = section.number("high_freq_factor")
    original = section.integer("original_max_position_embeddings", positions)
    if high <= low:
        raise ModelError(f"rope parameters: high_freq_factor {high:g} is not above low_freq_factor {low:g}")
    plain = np.float32(1) / powers
    wavelengths = np.float32(2 * math.pi) / plain
    scaled = np.where(wavelengths > original / low, plain / np.float32(factor), plain)
    blend = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - blend) * scaled / np.float32(factor) + blend * scaled
    medium = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(medium, blended, scaled).astype(np.float32), 1.0


def _yarn(section: ConfigReader, powers: F32, theta: float, positions: int, context: int) -> tuple[F32, float]:
    """Interpolation below, extrapolation above, a ramp between the two correction dimensions."""
    dim = 2 * powers.size
    original = section.integer("original_max_position_embeddings", positions)
    factor = section.number("factor", positions / original)
    low = _correction_dim(_or(section, "beta_fast", 32.0), dim, theta, original)
    high = _correction_dim(_or(section, "beta_slow", 1.0), dim, theta, original)
    if section.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp.astype(np.float32)
    inv_freq = np.float32(1) / (np.float32(factor) * powers) * (1 - keep) + np.float32(1) / powers * keep
    return inv_freq.astype(np.float32), _yarn_attention_factor(section, factor)


def _or(section: ConfigReader, key: str, default: float) -> float:
    """A positive number; 0 counts as absent, as in the reference."""
    return default if section.values.get(key) == 0 else section.number(key, default)


def _correction_dim(rotations: float, dim: int, theta: float, original: int) -> float:
    if theta == 1.0:
        raise ModelError("rope parameters: rope_theta 1 has no YaRN correction range")
    return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))


def _yarn_attention_factor(section: ConfigReader, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if section.has("attention_factor"):
        return section.number("attention_factor")
    if section.values.get("mscale") and section.values.get("mscale_all_dim"):
        return mscale(section.number("mscale")) / mscale(section.number("mscale_all_dim"))
    return mscale(1.0)


def _longrope(section: ConfigReader, powers: F32, theta: float, positions: int, context: int) -> tuple[F32, float]:
    """Each frequency divided by a factor of its own; which list depends on the longest sequence."""
    original = section.integer("original_max_position_embeddings", positions)
    name = "long_factor" if context > original else "short_factor"
    factors = np.array(section.numbers(name, powers.size), dtype=np.float32)
    factor = section.number("factor", positions / original)
    if section.has("attention_factor"):
        attention = section.number("attention_factor")
    elif factor <= 1.0:
        attention = 1.0
    else:
        if original < 2:
            raise ModelError("rope parameters: original_max_position_embeddings must be at least 2")
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return (np.float32(1) / (factors * powers)).astype(np.float32), attention


SCALINGS: Mapping[str, Scaling] = {
    "default": _default,
    "dynamic": _default,  # NTK-aware scaling changes nothing up to max_position_embeddings, and no plan goes beyond
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the name in Phi-3's first checkpoints
}

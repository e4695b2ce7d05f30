"""The numpy twin of the attention kernels: K and V rounded to the KV type, then softmax over all keys in float64.

It knows the rounding of stored K and V, and of queries that meet int8 K (docs/ARCHITECTURE.md, section 6); nothing
about blocks, chunks and splits, and so nothing about the rounding of probabilities that meet int8 V, per split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.kernels.pack import from_bf16, to_bf16
from haomiao.types import F32, KvType

Array = npt.NDArray[Any]


def stored(x: Array, kv: KvType) -> F32:
    """K or V [..., head_dim] as read back from the cache: one scale max|x| / 127 per token and head for int8."""
    x = np.asarray(x, np.float32)
    if kv == "f32":
        return x
    if kv == "bf16":
        return from_bf16(to_bf16(x))
    if kv != "int8":
        raise InputError(f"KV types are f32, bf16 and int8, not {kv!r}")
    greatest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.float32(127) / greatest
        codes = np.rint(x * factor)
        scales = greatest / np.float32(127)
    usable = np.isfinite(greatest) & np.isfinite(factor)
    y = np.where(usable, np.where(usable, codes, 0) * scales, np.float32(0))
    return np.where(np.isfinite(greatest), y, np.float32(np.nan)).astype(np.float32)


def coded(queries: Array) -> F32:
    """Scaled queries [..., head_dim] as int8 K meets them: codes of 16 bits, one scale max|q| / 16383 per row."""
    q = np.asarray(queries, np.float32)
    greatest = np.abs(q).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.float32(16383) / greatest
        codes = np.where(np.isfinite(factor), np.rint(q * factor), np.float32(0))
        found: F32 = (codes * (greatest / np.float32(16383))).astype(np.float32)
    return found


def attend(
    queries: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    kv: KvType = "f32",
) -> F32:
    """Causal attention of the last tokens over all keys of one sequence.

    `queries` [tokens, heads, head_dim]; `k`, `v` [keys, kv_heads, head_dim], the tokens' own included: query i has
    position keys - tokens + i. Returns float32 [tokens, heads, head_dim].
    """
    tokens, heads, _ = queries.shape
    keys, kv_heads, _ = k.shape
    if heads % kv_heads or tokens > keys:
        raise InputError(f"{heads} heads over {kv_heads} kv heads, {tokens} tokens over {keys} keys")
    position = np.arange(keys - tokens, keys)[:, None]
    key = np.arange(keys)[None, :]
    seen = key <= position
    if window > 0:
        seen &= key > position - window
    k, v = stored(k, kv).astype(np.float64), stored(v, kv).astype(np.float64)
    out = np.empty(queries.shape, np.float32)
    scaled = np.asarray(queries, np.float32) * np.float32(scale)
    asked = (coded(scaled) if kv == "int8" else scaled).astype(np.float64)
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = asked[:, head] @ k[:, group].T
        if softcap > 0:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = (p / p.sum(axis=1, keepdims=True)) @ v[:, group]
    return out

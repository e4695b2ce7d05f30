"""A plan's operations on whole sequences, in float32 with blocked matrix products: the forward pass of calibration.

What every operation means is the plan's; here sequences begin at position 0, all of a batch are of one length, and no
K and V outlive the call. `live` says which buffers must be kept to go on from a place of the plan. Knows nothing about
files, samples' origin or what is done with the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from haomiao.errors import UnsupportedModelError
from haomiao.models import plan as ops
from haomiao.types import F32, I32

Buffers = dict[str, F32]
QUERY_ROWS = 256
"""Query tokens whose scores are held at once: [heads of a KV head * rows, keys]."""


@dataclass(frozen=True)
class Weights:
    """Where an operation finds its numbers: a matrix float32 [rows, cols], rows of a table, a vector."""

    matrix: Callable[[str], F32]
    rows: Callable[[str, I32], F32]
    vector: Callable[[str], F32]


def run(plan: ops.Plan, weights: Weights, buffers: Buffers, ids: I32, begin: int, end: int) -> None:
    """Apply operations [begin, end) to `buffers` (each [sequences * tokens, width]); `ids` is [sequences, tokens]."""
    for op in plan.ops[begin:end]:
        _apply(plan, weights, buffers, ids, op)


def live(plan: ops.Plan) -> list[tuple[str, ...]]:
    """For every place of the plan (before operation i; the last entry is the end) the buffers that are read later
    before they are written, in the plan's order of buffers."""
    after: set[str] = set()
    places = [after]
    for op in reversed(plan.ops):
        reads, writes = uses(op)
        after = (after - set(writes)) | set(reads)
        places.append(after)
    return [tuple(name for name in plan.buffers if name in place) for place in reversed(places)]


def uses(op: ops.Op) -> tuple[Sequence[str], Sequence[str]]:
    """(buffers read, buffers wholly written) by an operation."""
    match op:
        case ops.Embed():
            return (), (op.out,)
        case ops.Norm() | ops.Linear() | ops.Glu() | ops.Activate():
            return (op.source,), (op.out,)
        case ops.HeadNorm() | ops.Rope():
            return (op.buffer,), ()
        case ops.Attention():
            return (op.qkv,), (op.out,)
        case ops.Add():
            return (op.target, op.source), ()
        case ops.Head():
            return (op.source,), ()
    raise UnsupportedModelError(f"the plan holds an operation that calibration does not know: {type(op).__name__}")


def _apply(plan: ops.Plan, weights: Weights, buffers: Buffers, ids: I32, op: ops.Op) -> None:
    match op:
        case ops.Embed():
            x = weights.rows(op.table, ids.reshape(-1)) * np.float32(op.scale)
            if op.positions is not None:
                x = x + weights.rows(op.positions, np.tile(np.arange(ids.shape[1], dtype=np.int32), len(ids)))
            buffers[op.out] = x
        case ops.Norm():
            bias = None if op.bias is None else weights.vector(op.bias)
            buffers[op.out] = norm(buffers[op.source], weights.vector(op.weight), bias, op.eps, op.kind == "rms")
        case ops.Linear():
            y = buffers[op.source] @ weights.matrix(op.weight).T
            if op.bias is not None:
                y += weights.vector(op.bias)
            buffers[op.out] = y
        case ops.HeadNorm():
            part = slice(op.offset, op.offset + op.heads * op.head_dim)
            heads = buffers[op.buffer][:, part].reshape(-1, op.head_dim)
            normed = norm(heads, weights.vector(op.weight), None, op.eps, True)
            buffers[op.buffer][:, part] = normed.reshape(-1, op.heads * op.head_dim)
        case ops.Rope():
            _rotate(plan.ropes[op.rope], buffers[op.buffer], ids.shape[1], op)
        case ops.Attention():
            buffers[op.out] = _attend(op, buffers[op.qkv], ids.shape[1])
        case ops.Add():
            buffers[op.target] = buffers[op.target] + buffers[op.source]
        case ops.Glu():
            pairs = buffers[op.source].reshape(len(buffers[op.source]), -1, 2, 32)
            product = activate(pairs[:, :, 0], op.activation)
            product *= pairs[:, :, 1]
            buffers[op.out] = product.reshape(len(product), -1)
        case ops.Activate():
            buffers[op.out] = activate(buffers[op.source], op.activation)
        case _:
            raise UnsupportedModelError(f"calibration does not know the operation {type(op).__name__}")


def norm(x: F32, weight: F32, bias: F32 | None, eps: float, rms: bool) -> F32:
    """RMS or layer norm over the last axis."""
    if not rms:
        x = x - x.mean(axis=-1, keepdims=True, dtype=np.float32)
    mean = np.einsum("ij,ij->i", x, x) / np.float32(x.shape[-1])
    y: F32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps)))[:, None] * weight
    return y if bias is None else y + bias


def activate(x: F32, function: ops.Activation) -> F32:
    """The activation functions in float32."""
    if function == "relu":
        return np.maximum(x, np.float32(0))
    if function == "gelu":
        from scipy.special import erf

        exact: F32 = x * np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5)))
        return exact.astype(np.float32, copy=False)
    z: Any = x
    if function == "gelu_tanh":
        z = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x)  # 2 sqrt(2 / pi)
    with np.errstate(over="ignore"):
        divisor: F32 = np.exp(-z)
    divisor += np.float32(1)
    return np.divide(x, divisor, out=divisor)


def _rotate(spec: ops.RopeSpec, buffer: F32, tokens: int, op: ops.Rope) -> None:
    angles = np.arange(tokens, dtype=np.float32)[:, None] * np.array(spec.inv_freq, np.float32)
    cosines = (np.cos(angles.astype(np.float64)) * spec.attention_factor).astype(np.float32)[None, :, None]
    sines = (np.sin(angles.astype(np.float64)) * spec.attention_factor).astype(np.float32)[None, :, None]
    part = buffer[:, op.offset : op.offset + op.heads * op.head_dim]
    heads = part.reshape(-1, tokens, op.heads, op.head_dim).copy()
    half = spec.dim // 2
    first, second = heads[..., :half].copy(), heads[..., half : spec.dim].copy()
    heads[..., :half] = first * cosines - second * sines
    heads[..., half : spec.dim] = second * cosines + first * sines
    part[...] = heads.reshape(part.shape)


def _attend(op: ops.Attention, qkv: F32, tokens: int) -> F32:
    """Causal attention of every sequence over itself, one KV head and `QUERY_ROWS` queries at a time."""
    if op.sinks is not None:
        raise UnsupportedModelError("attention sinks are not supported")
    shared, dim = op.heads // op.kv_heads, op.head_dim
    sequences = len(qkv) // tokens
    q = qkv[:, : op.heads * dim].reshape(sequences, tokens, op.kv_heads, shared, dim)
    k = qkv[:, op.k_offset : op.k_offset + op.kv_heads * dim].reshape(sequences, tokens, op.kv_heads, dim)
    v = qkv[:, op.v_offset : op.v_offset + op.kv_heads * dim].reshape(sequences, tokens, op.kv_heads, dim)
    out = np.empty((sequences, tokens, op.kv_heads, shared, dim), np.float32)
    for s in range(sequences):
        for head in range(op.kv_heads):
            keys, values = np.ascontiguousarray(k[s, :, head]), np.ascontiguousarray(v[s, :, head])
            for begin in range(0, tokens, QUERY_ROWS):
                end = min(begin + QUERY_ROWS, tokens)
                seen = max(0, begin - op.window + 1) if op.window else 0
                queries = q[s, begin:end, head].transpose(1, 0, 2).reshape(-1, dim)  # [shared * rows, dim]
                scores = (queries * np.float32(op.scale)) @ keys[seen:end].T
                if op.softcap:
                    cap = np.float32(op.softcap)
                    scores = cap * np.tanh(scores / cap)
                grid = scores.reshape(shared, end - begin, -1)
                # keys before `certain` are seen by every query of the block, unless a window ends among them
                certain = seen if op.window else begin
                position, key = np.arange(begin, end)[:, None], np.arange(certain, end)[None, :]
                hidden = key > position
                if op.window:
                    hidden |= key <= position - op.window
                np.copyto(grid[:, :, certain - seen :], np.float32(-np.inf), where=hidden)
                scores -= scores.max(axis=1, keepdims=True)
                np.exp(scores, out=scores)
                mixed = scores @ values[seen:end]
                mixed /= scores.sum(axis=1, keepdims=True)
                mixed = mixed.reshape(shared, end - begin, dim)
                out[s, begin:end, head] = mixed.transpose(1, 0, 2)
    return out.reshape(len(qkv), -1)

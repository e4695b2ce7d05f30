"""What is done to each token by itself: embedding, norms, gates, and the greatest logit. Sums are float32."""

from __future__ import annotations

import triton
import triton.language as tl

from haomiao.engine.executors.torch.kernels.linear import activated, started, table_row


@triton.jit
def embed(
    out,  # f32 [tokens, K]
    indices,  # int32 [tokens]: token ids, or positions
    hi,
    lo,
    scales,
    K,
    padded,
    factor,
    ENCODING: tl.constexpr,
    GROUP: tl.constexpr,
    LO_SHIFT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = table[index] * factor, or added to what is there. Grid [tokens, K / BLOCK]."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(indices + token).to(tl.int64)
    value = table_row(hi, lo, scales, row, cols, cols < K, padded, ENCODING, GROUP, LO_SHIFT) * factor
    where = out + token * K + cols
    if ADD:
        value = value + tl.load(where, mask=cols < K, other=0.0)
    tl.store(where, value, mask=cols < K)


@triton.jit
def norm(
    out,  # f32 [tokens, K]
    x,  # f32 [tokens, K]
    weight,
    bias,
    K,
    eps,
    LAYER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """RMS or layer norm of a row. Grid [tokens]; BLOCK covers the row."""
    started(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < K
    value = tl.load(x + token * K + cols, mask=inside, other=0.0)
    if LAYER:
        value = tl.where(inside, value - tl.sum(value) / K, 0.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value) / K + eps))
    value = value * factor * tl.load(weight + cols, mask=inside, other=0.0)
    if BIAS:
        value = value + tl.load(bias + cols, mask=inside, other=0.0)
    tl.store(out + token * K + cols, value, mask=inside)


@triton.jit
def gate(out, x, K, ACT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """PAIRS: out [tokens, K] = act(gate) * up of x [tokens, 2 K], interleaved by 32; else out = act(x).
    Grid [tokens, K / BLOCK]."""
    started(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < K
    if PAIRS:
        where = x + token * (2 * K) + (cols // 32) * 64 + cols % 32
        value = activated(tl.load(where, mask=inside, other=0.0), ACT) * tl.load(where + 32, mask=inside, other=0.0)
    else:
        value = activated(tl.load(x + token * K + cols, mask=inside, other=0.0), ACT)
    tl.store(out + token * K + cols, value, mask=inside)


@triton.jit
def add(out, x, SIZE, BLOCK: tl.constexpr):
    """out += x. Grid [SIZE / BLOCK]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE
    value = tl.load(out + index, mask=inside, other=0.0) + tl.load(x + index, mask=inside, other=0.0)
    tl.store(out + index, value, mask=inside)


@triton.jit
def greatest_of(value, index, beyond):
    """(greatest, the lowest of its indices)."""
    peak = tl.max(value, axis=0)
    return peak, tl.min(tl.where(value == peak, index, beyond), axis=0)


@triton.jit
def greatest_parts(peaks, places, logits, V, PARTS, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """The greatest of each part of a row of logits and its lowest index; a NaN is never the greatest.
    Grid [rows, PARTS]."""
    started(DEPENDENT)
    row, part = tl.program_id(0), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * V + cols, mask=cols < V, other=float("-inf"))
    value = tl.where(value == value, value, float("-inf"))
    peak, place = greatest_of(value, cols, V - 1)
    tl.store(peaks + row * PARTS + part, peak)
    tl.store(places + row * PARTS + part, tl.minimum(place, V - 1))


@triton.jit
def greatest(out, peaks, places, V, PARTS, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """The lowest index among the greatest of a row. Grid [rows]; BLOCK covers PARTS."""
    started(DEPENDENT)
    row = tl.program_id(0)
    parts = tl.arange(0, BLOCK)
    value = tl.load(peaks + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
    place = tl.load(places + row * PARTS + parts, mask=parts < PARTS, other=V - 1)
    _, best = greatest_of(value, place, V - 1)
    tl.store(out + row, best)

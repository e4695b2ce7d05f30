"""Paged attention: K is rotated, K and V are stored (`store`), queries meet them split by split (`attend`, `merge`).

K and V lie as `memory` keeps them; KV: 0 f32, 1 bf16, 2 int8 with a scale per token and head. A query is a row of some
head of some token; queries of the heads that share K and V, and of neighbouring tokens of a sequence, are worked off
together. bf16 products take a float32 query (or probability) as the sum of two bf16 numbers, so that it loses nothing
that matters; codes of int8 are exact in bf16. After "FlashAttention" (Dao et al. 2022) and "Flash-Decoding" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from haomiao.engine.executors.torch.kernels.linear import bf16, dot16, rounded, started

BLOCK_TOKENS = tl.constexpr(32)


@triton.jit
def coded(x, greatest):
    """(codes of 8 bits f32, scale) of values whose greatest magnitude is this."""
    inverse = tl.div_rn(127.0, greatest)
    none = inverse == float("inf")
    codes = rounded(x * tl.where(none, 0.0, inverse))
    return codes, tl.where(none, 0.0, tl.div_rn(greatest, 127.0))


@triton.jit
def store(
    q_out,  # f32 [tokens, HEADS * HEAD_DIM]
    k,
    v,
    k_scales,
    v_scales,
    qkv,  # f32 [tokens, width]
    positions,  # int32 [tokens]
    slots,  # int32 [tokens]: block * 32 + place
    q_norm,
    k_norm,
    q_cos,
    q_sin,
    k_cos,
    k_sin,  # f32 [positions, half]
    width,
    k_offset,
    v_offset,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    Q_HALF: tl.constexpr,  # half the rotated channels, 0: none
    K_HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    KV: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Norm and rotate q and k of a head; q goes to `q_out`, k and v into the blocks.
    Grid [tokens, HEADS + 2 KV_HEADS]."""
    started(DEPENDENT)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int64)
    d = tl.arange(0, D)
    inside = d < HEAD_DIM
    base = qkv + token * width
    if part < HEADS:
        y = turned(base + part * HEAD_DIM, q_norm, q_cos, q_sin, position, eps, d, HEAD_DIM, Q_HALF, Q_NORM)
        tl.store(q_out + (token * HEADS + part) * HEAD_DIM + d, y, mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if part < HEADS + KV_HEADS:
            head = part - HEADS
            y = turned(
                base + k_offset + head * HEAD_DIM, k_norm, k_cos, k_sin, position, eps, d, HEAD_DIM, K_HALF, K_NORM
            )
            keep(k, k_scales, y, slot, head, d, KV_HEADS, HEAD_DIM, KV)
        else:
            head = part - HEADS - KV_HEADS
            y = tl.load(base + v_offset + head * HEAD_DIM + d, mask=inside, other=0.0)
            keep(v, v_scales, y, slot, head, d, KV_HEADS, HEAD_DIM, KV)


@triton.jit
def turned(x, weight, cos, sin, position, eps, d, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """A head, normed and rotated in halves of its first 2 HALF channels."""
    inside = d < HEAD_DIM
    y = tl.load(x + d, mask=inside, other=0.0)
    factor = 1.0
    if NORM:
        factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y) / HEAD_DIM + eps))
        y = y * factor * tl.load(weight + d, mask=inside, other=0.0)
    if HALF > 0:
        first = d < HALF
        rotates = d < 2 * HALF
        other = tl.where(first, d + HALF, d - HALF)
        z = tl.load(x + other, mask=rotates, other=0.0)
        if NORM:
            z = z * factor * tl.load(weight + other, mask=rotates, other=0.0)
        angle = position * HALF + d % HALF
        c = tl.load(cos + angle, mask=rotates, other=1.0)
        s = tl.load(sin + angle, mask=rotates, other=0.0)
        y = y * c + tl.where(first, -z, z) * s
    return y


@triton.jit
def keep(storage, scales, y, slot, head, d, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KV: tl.constexpr):
    """Store a head of K or V as the KV type keeps it."""
    inside = d < HEAD_DIM
    place = ((slot // BLOCK_TOKENS) * KV_HEADS + head) * BLOCK_TOKENS + slot % BLOCK_TOKENS
    where = storage + place * HEAD_DIM + d
    if KV == 2:
        codes, scale = coded(y, tl.max(tl.abs(y), axis=0))
        tl.store(where, codes.to(tl.int8), mask=inside)
        tl.store(scales + place, scale)
    elif KV == 1:
        tl.store(where, bf16(y).to(tl.bfloat16), mask=inside)
    else:
        tl.store(where, y, mask=inside)


@triton.jit
def product(a, b, KV: tl.constexpr):
    """a (f32) times b (as stored, transposed already): f32 sums."""
    if KV == 0:
        y = tl.dot(a, b, input_precision="ieee")
    else:
        wide = bf16(b.to(tl.float32))  # exact: codes of 8 bits, or bf16 as it was
        upper = bf16(a)
        lower = bf16(a - upper.to(tl.float32))
        y = dot16(lower, wide, dot16(upper, wide, tl.zeros([a.shape[0], b.shape[1]], tl.float32)))
    return y


@triton.jit(do_not_specialize=["table_width", "splits"])
def attend(
    out,  # f32 [tokens, HEADS * HEAD_DIM]
    sums,  # f32 [tokens, HEADS, splits, HEAD_DIM]
    peaks,  # f32 [tokens, HEADS, splits, 2]: greatest score, sum of exponentials
    q,  # f32 [tokens, HEADS * HEAD_DIM]
    k,
    v,
    k_scales,
    v_scales,
    positions,  # int32 [tokens]
    tables,  # int32 [sequences, table_width]
    owners,  # int32 [tokens]: row of `tables`
    starts,  # int32 [blocks]: first token of a block of queries
    counts,  # int32 [blocks]: its tokens, at most QUERIES; 0: nothing
    table_width,
    splits,
    scale,
    window,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program, a power of two of at least 16
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,  # positions of a split; 0: all, and `out` is written
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    KV: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid [blocks of queries, KV_HEADS, splits]."""
    started(DEPENDENT)
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + block)
    PER: tl.constexpr = HEADS // KV_HEADS
    if count > 0:
        first = tl.load(starts + block)
        row = tl.arange(0, ROWS)
        live = row < count * PER
        token = first + row // PER
        head = kv_head * PER + row % PER
        position = tl.load(positions + token, mask=live, other=0)
        earliest = tl.load(positions + first)
        end = tl.load(positions + first + count - 1) + 1
        begin = 0
        if WINDOW:
            begin = tl.maximum(earliest - window + 1, 0)
        if SPLIT > 0:
            begin = tl.maximum(begin, split * SPLIT)
            end = tl.minimum(end, (split + 1) * SPLIT)
        begin = begin // KEYS * KEYS
        d = tl.arange(0, D)
        place = (token.to(tl.int64) * HEADS + head)[:, None]
        asked = tl.load(q + place * HEAD_DIM + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        asked = asked * scale
        table = tables + tl.load(owners + first).to(tl.int64) * table_width
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for start in range(begin, end, KEYS):
            key = start + tl.arange(0, KEYS)
            there = key < end
            ids = tl.load(table + key // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
            spot = (ids * KV_HEADS + kv_head) * BLOCK_TOKENS + key % BLOCK_TOKENS
            where = spot[:, None] * HEAD_DIM + d[None, :]
            inside = there[:, None] & (d < HEAD_DIM)[None, :]
            keys = tl.load(k + where, mask=inside, other=0.0)
            scores = product(asked, tl.trans(keys), KV)
            if KV == 2:
                scores = scores * tl.load(k_scales + spot, mask=there, other=0.0)[None, :]
            if CAP:
                scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
            seen = (key[None, :] <= position[:, None]) & there[None, :]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp(peak - safe)
            weights = tl.exp(scores - safe[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            values = tl.load(v + where, mask=inside, other=0.0)
            if KV == 2:
                weights = weights * tl.load(v_scales + spot, mask=there, other=0.0)[None, :]
            acc = acc * shrink[:, None] + product(weights, values, KV)
            peak = higher
        wanted = live[:, None] & (d < HEAD_DIM)[None, :]
        if SPLIT > 0:
            part = place * splits + split
            tl.store(sums + part * HEAD_DIM + d[None, :], acc, mask=wanted)
            tl.store(peaks + 2 * part, peak[:, None], mask=live[:, None])
            tl.store(peaks + 2 * part + 1, total[:, None], mask=live[:, None])
        else:
            tl.store(out + place * HEAD_DIM + d[None, :], acc / total[:, None], mask=wanted)


@triton.jit(do_not_specialize=["splits"])
def merge(
    out, sums, peaks, splits, HEAD_DIM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Splits of a row become its answer. Grid [tokens, HEADS]; SPLITS is a power of two of at least `splits`."""
    started(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    here = split < splits
    peak = tl.load(peaks + 2 * (row * splits + split), mask=here, other=float("-inf"))
    total = tl.load(peaks + 2 * (row * splits + split) + 1, mask=here, other=0.0)
    share = tl.where(total > 0, tl.exp(peak - tl.max(peak, axis=0)), 0.0)
    filled = here & (total > 0)
    where = (row * splits + split)[:, None] * HEAD_DIM + d[None, :]
    part = tl.load(sums + where, mask=filled[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    whole = tl.sum(part * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out + row * HEAD_DIM + d, whole, mask=d < HEAD_DIM)

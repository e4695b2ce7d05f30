"""A matrix times one token (`gemv`), which is what decoding alone consists of.

Whole rows of weights stream through registers in the order in which they lie, 16 bytes a thread; codes become numbers
without a conversion (`bits`) and meet their scale once per group of 32. ENCODING and ROUND as in `linear`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from haomiao.engine.executors.torch.kernels.linear import (
    INTERPRETED,
    activated,
    bf16,
    factors,
    finished,
    magnitude,
    rounded,
)


@triton.jit
def source_at(x, cols, K, SOURCE: tl.constexpr, ACT: tl.constexpr):
    """f32 activations of columns: as they lie (0, 1), or act(gate) * up of neurons interleaved by 32 (2)."""
    inside = cols < K
    if SOURCE == 2:
        gate = x + (cols // 32) * 64 + cols % 32
        g = tl.load(gate, mask=inside, other=0.0)
        u = tl.load(gate + 32, mask=inside, other=0.0)
        value = activated(g, ACT) * u
    else:
        value = tl.load(x + cols, mask=inside, other=0.0)
    return value


@triton.jit
def weights_at(
    hi,
    lo,
    scales,
    rows,
    N,
    padded,
    ENCODING: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Whole rows of weights as they lie, in pieces of 16 bytes, so that a thread adds up a piece by itself: hi, lo (hi
    where it is not read) and scales (hi where there are none). WIDTH: numbers of a piece; of planes, words."""
    columns: tl.constexpr = 32 if ENCODING >= 3 else WIDTH
    row = rows.to(tl.int64)
    piece = tl.arange(0, PIECES)
    # pieces first: of axes alike the compiler lays lanes along the first, so that they read neighbouring bytes
    there = (piece * columns < padded)[:, None] & (rows < N)[None, :]
    # written so that the compiler sees that a row begins at a multiple of 16 bytes
    first = (row * (padded // 32 * (32 // columns * WIDTH)))[None, :] + (piece * WIDTH)[:, None]
    if ENCODING < 2:
        first = (row * padded)[None, :] + (piece * WIDTH)[:, None]
    where = first[:, :, None] + tl.arange(0, WIDTH)[None, None, :]
    inside = there[:, :, None]
    if ENCODING < 2:  # rows of any length
        inside = inside & ((piece * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :] < padded)[:, None, :]
    w = tl.load(hi + where, mask=inside, other=0, eviction_policy="evict_first")
    v = w
    ws = w
    if ENCODING == 4:
        v = tl.load(lo + where, mask=inside, other=0, eviction_policy="evict_first")
    if ENCODING >= 2:
        of_scales = (row * (padded // GROUP))[None, :] + (piece * columns // GROUP)[:, None]
        ws = tl.load(scales + of_scales, mask=there, other=0.0)
    return w, v, ws


@triton.jit
def masked(words, mask: tl.constexpr, magnitude: tl.constexpr):
    """(words & mask) | magnitude in one instruction, f32; left alone, the compiler makes two."""
    if INTERPRETED:
        y = (words & mask) | magnitude
    else:
        y = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, mask, magnitude], dtype=tl.int32, is_pure=True, pack=1
        )
    return y.to(tl.float32, bitcast=True)


@triton.jit
def upper(words):
    """1 + n / 16, n in bits 19 to 22."""
    return masked(words, 0x00780000, 0x3F800000)


@triton.jit
def lower(words):
    """1 + n / 256, n in bits 15 to 18."""
    return masked(words, 0x00078000, 0x3F800000)


@triton.jit
def byte(words, AT: tl.constexpr):
    """n 2^AT of eight bits from AT on."""
    return masked(words, 0xFF << AT, 0x4B000000) - 8388608.0


@triton.jit
def words_times(w, v, a, b, c, d, e, f, g, h, ENCODING: tl.constexpr, LO_SHIFT: tl.constexpr):
    """Sums of a word's eight codes times their activations, which `evened` made, too great by `excess`. A code becomes
    a float without a conversion: its bits stand in the fraction of 1 + n / 16 or 1 + n / 256, or end 2^23 + n."""
    if ENCODING == 3:
        y = lower(w << 15) * a + upper(w << 15) * b + lower(w << 7) * c + upper(w << 7) * d
        y = y + lower(w >> 1) * e + upper(w >> 1) * f + lower(w >> 9) * g + upper(w >> 9) * h
    else:
        even = ((w & 0x0F0F0F0F) << LO_SHIFT) + (v & 0x0F0F0F0F)  # codes fit into bytes
        odd = (((w >> 4) & 0x0F0F0F0F) << LO_SHIFT) + ((v >> 4) & 0x0F0F0F0F)
        y = byte(even, 0) * a + byte(odd, 0) * b + byte(even, 8) * c + byte(odd, 8) * d
        even = even >> 16
        odd = odd >> 16
        y = y + byte(even, 0) * e + byte(odd, 0) * f + byte(even, 8) * g + byte(odd, 8) * h
    return y


@triton.jit
def excess_of(a, b, c, d, e, f, g, h, ENCODING: tl.constexpr, LO_SHIFT: tl.constexpr):
    """What is too much in a group's sum: the offset of the codes, and for one plane the ones before the fractions."""
    if ENCODING == 3:
        y = 264.0 * (a + c + e + g) + 24.0 * (b + d + f + h)
    else:
        y = (8.0 * (1 << LO_SHIFT) + 8.0) * (a + b + c + d + (e + f + g + h))
    return tl.sum(y, axis=1)


@triton.jit
def evened(a, b, c, d, e, f, g, h, ENCODING: tl.constexpr):
    """Activations for `words_times`: by the powers of two that its floats have too little or too much."""
    if ENCODING == 3:
        a = a * 256.0
        b = b * 16.0
        c = c * 256.0
        d = d * 16.0
        e = e * 256.0
        f = f * 16.0
        g = g * 256.0
        h = h * 16.0
    else:
        c = c * 0.00390625
        d = d * 0.00390625
        g = g * 0.00390625
        h = h * 0.00390625
    return a, b, c, d, e, f, g, h


@triton.jit
def weighed(x, norm, cols, K, factor):
    """Activations, normed."""
    return x * factor * tl.load(norm + cols, mask=cols < K, other=0.0)


@triton.jit
def coded(x, inverse):
    """Codes f32 of activations [groups, n]."""
    return rounded(x * inverse[:, None])


@triton.jit
def gemv(
    out,  # f32 [N]
    x,  # f32 [K], or [2 K] for SOURCE 2
    norm,  # f32 [K] for SOURCE 1
    hi,  # planes: int32 [N, padded / 8]
    lo,
    scales,  # f16 [N, padded / GROUP]
    bias,  # f32 [N]
    K,
    padded,  # columns as stored
    N,
    eps,
    out_scale,
    softcap,
    ENCODING: tl.constexpr,
    GROUP: tl.constexpr,
    LO_SHIFT: tl.constexpr,
    SOURCE: tl.constexpr,
    ACT: tl.constexpr,
    ROUND: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    CAP: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,  # 1, 2 or 4
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,  # a power of two that covers a row
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y = W x for one token, with the norm or the gate before it and the residual after it. A program keeps the
    activations in registers and goes through blocks of TILES tiles of BN rows, the next tile's weights on their way
    while it computes one; the warps add up a block at a time. EARLY: the next kernel may begin at once, not when this
    one has nothing left to load. Grid [programs], at most N / (TILES BN)."""
    block = tl.program_id(0)
    within = tl.arange(0, BN)
    w, v, ws = weights_at(hi, lo, scales, block * TILES * BN + within, N, padded, ENCODING, GROUP, WIDTH, PIECES)
    if DEPENDENT:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    if ENCODING >= 3:
        group = tl.arange(0, PIECES)[:, None] * 32 + tl.arange(0, 4)[None, :]
        a = source_at(x, group, K, SOURCE, ACT)
        b = source_at(x, group + 4, K, SOURCE, ACT)
        c = source_at(x, group + 8, K, SOURCE, ACT)
        d = source_at(x, group + 12, K, SOURCE, ACT)
        e = source_at(x, group + 16, K, SOURCE, ACT)
        f = source_at(x, group + 20, K, SOURCE, ACT)
        g = source_at(x, group + 24, K, SOURCE, ACT)
        h = source_at(x, group + 28, K, SOURCE, ACT)
        if SOURCE == 1:
            total = tl.sum(a * a + b * b + c * c + d * d + e * e + f * f + g * g + h * h)
            factor = tl.div_rn(1.0, tl.sqrt_rn(total / K + eps))
            a = weighed(a, norm, group, K, factor)
            b = weighed(b, norm, group + 4, K, factor)
            c = weighed(c, norm, group + 8, K, factor)
            d = weighed(d, norm, group + 12, K, factor)
            e = weighed(e, norm, group + 16, K, factor)
            f = weighed(f, norm, group + 20, K, factor)
            g = weighed(g, norm, group + 24, K, factor)
            h = weighed(h, norm, group + 28, K, factor)
        if ROUND == 1:
            a = bf16(a).to(tl.float32)
            b = bf16(b).to(tl.float32)
            c = bf16(c).to(tl.float32)
            d = bf16(d).to(tl.float32)
            e = bf16(e).to(tl.float32)
            f = bf16(f).to(tl.float32)
            g = bf16(g).to(tl.float32)
            h = bf16(h).to(tl.float32)
        if ROUND == 2:
            low = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
            high = tl.maximum(tl.maximum(magnitude(e), magnitude(f)), tl.maximum(magnitude(g), magnitude(h)))
            scale, inverse = factors(tl.max(tl.maximum(low, high), axis=1))
            a = coded(a, inverse)
            b = coded(b, inverse)
            c = coded(c, inverse)
            d = coded(d, inverse)
            e = coded(e, inverse)
            f = coded(f, inverse)
            g = coded(g, inverse)
            h = coded(h, inverse)
        excess = excess_of(a, b, c, d, e, f, g, h, ENCODING, LO_SHIFT)
        a, b, c, d, e, f, g, h = evened(a, b, c, d, e, f, g, h, ENCODING)
    else:
        cols = tl.arange(0, PIECES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        a = source_at(x, cols, K, SOURCE, ACT)
        if SOURCE == 1:
            a = weighed(a, norm, cols, K, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(a * a) / K + eps)))
        if ROUND == 1:
            a = bf16(a).to(tl.float32)
        if ROUND == 2:  # a group is two pieces
            pairs = tl.max(tl.reshape(magnitude(a), [PIECES // 2, 2 * WIDTH]), axis=1)
            both = tl.reshape(tl.broadcast_to(pairs[:, None], [PIECES // 2, 2]), [PIECES])
            scale, inverse = factors(both)
            a = coded(a, inverse)
    stride = tl.num_programs(0)
    for at in range(block, tl.cdiv(N, TILES * BN), stride):
        for tile in tl.static_range(TILES):
            if tile < TILES - 1:
                ahead = (at * TILES + tile + 1) * BN
            else:
                ahead = (at + stride) * TILES * BN
            next_w, next_v, next_ws = weights_at(
                hi, lo, scales, ahead + within, N, padded, ENCODING, GROUP, WIDTH, PIECES
            )
            if ENCODING >= 3:
                sums = words_times(
                    w, v, a[:, None, :], b[:, None, :], c[:, None, :], d[:, None, :],
                    e[:, None, :], f[:, None, :], g[:, None, :], h[:, None, :], ENCODING, LO_SHIFT,
                )  # fmt: skip
                part = tl.sum(sums, axis=2) - excess[:, None]
            else:
                part = tl.sum(w.to(tl.float32) * a[:, None, :], axis=2)
            if ENCODING >= 2:
                part = part * ws.to(tl.float32)
            if ROUND == 2:
                part = part * scale[:, None]
            if tile == 0:
                first = part
            if tile == 1:
                second = part
            if tile == 2:
                third = part
            if tile == 3:
                fourth = part
            w = next_w
            v = next_v
            ws = next_ws
        if TILES == 1:
            y = tl.sum(first, axis=0)
            rows = at * BN + within
        elif TILES == 2:
            y = tl.sum(tl.join(first, second), axis=0)
            rows = (at * 2 + tl.arange(0, 2)[None, :]) * BN + within[:, None]
        else:
            y = tl.reshape(tl.sum(tl.join(tl.join(first, second), tl.join(third, fourth)), axis=0), [BN, 4])
            index = tl.arange(0, 4)[None, :]
            rows = (at * 4 + index % 2 * 2 + index // 2) * BN + within[:, None]
        if ENCODING == 4:
            y = y * (1.0 / (1 << LO_SHIFT))
        y = finished(y, bias + rows, rows < N, out + rows, rows < N, BIAS, ADD, out_scale, softcap, CAP)
        tl.store(out + rows, y, mask=rows < N)
    if DEPENDENT and not EARLY:
        gdc_launch_dependents()

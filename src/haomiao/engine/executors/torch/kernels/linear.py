"""Linear layers that read codes, of several tokens (`gemm`), and what all kernels share.

Weights as `matrices` lays them out. ENCODING: 0 f32, 1 bf16, 2 int8, 3 the hi plane, 4 both planes. ROUND says what
becomes of activations: 0 nothing, 1 bf16, 2 codes of 8 bits per group of 32 (docs/ARCHITECTURE.md, section 6). Sums are
float32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter cuts float32 off where it should round to bf16, and cannot multiply bf16."""

# Adding and subtracting 1.5 * 2^23 rounds a float32 of magnitude below 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def activated(x, ACT: tl.constexpr):
    """silu, gelu (erf), gelu (tanh), relu."""
    if ACT == 0:
        y = x / (1.0 + tl.exp(-x))
    elif ACT == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 2:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))  # 0.5 (1 + tanh u) = 1 - 1 / (e^2u + 1)
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def rounded(q):
    """To the nearest integer, ties to even."""
    return (q + ROUNDER) - ROUNDER


@triton.jit
def bf16(x):
    """f32 rounded to bf16, ties to even; the interpreter keeps the value as f32."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def dot16(a, b, acc):
    """a b + acc of bf16 numbers, f32 sums."""
    if INTERPRETED:
        y = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        y = tl.dot(a, b, acc)
    return y


@triton.jit
def factors(greatest):
    """(scale, inverse) of groups whose greatest magnitude is this: 0 where the inverse is infinite, NaN where the group
    holds what is not finite."""
    inverse = tl.div_rn(tl.full(greatest.shape, 127.0, tl.float32), greatest)
    scale = tl.div_rn(greatest, tl.full(greatest.shape, 127.0, tl.float32))
    none = inverse == float("inf")
    scale = tl.where(none, 0.0, scale)
    inverse = tl.where(none, 0.0, inverse)
    broken = ~(greatest < float("inf"))
    return tl.where(broken, float("nan"), scale), tl.where(broken, 0.0, inverse)


@triton.jit
def magnitude(x):
    """|x|, infinite for a NaN, which `max` might lose."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def nibble_codes(hi, lo, offset, mask, ENCODING: tl.constexpr, LO_SHIFT: tl.constexpr):
    """Codes f32 of the low and of the high nibbles; what is masked is 0."""
    packed = tl.load(hi + offset, mask=mask, other=0x88).to(tl.int32)
    first = (packed & 15) - 8
    second = (packed >> 4) - 8
    if ENCODING == 4:
        rest = tl.load(lo + offset, mask=mask, other=0x88).to(tl.int32)
        first = (first << LO_SHIFT) + (rest & 15) - 8
        second = (second << LO_SHIFT) + (rest >> 4) - 8
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def started(DEPENDENT: tl.constexpr):
    """The kernel after this one may begin to load its weights; then everything before this one is done and visible.
    DEPENDENT: launched so that this one itself could begin before the one before it ended."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def finished(
    y, bias, biased, out, wanted, BIAS: tl.constexpr, ADD: tl.constexpr, out_scale, softcap, CAP: tl.constexpr
):
    """Bias (where `biased`), scale, softcap, and what stands at `out` already (where `wanted`), of sums y."""
    if BIAS:
        y = y + tl.load(bias, mask=biased, other=0.0)
    y = y * out_scale
    if CAP:
        y = softcap * (1.0 - 2.0 / (tl.exp(2.0 * y / softcap) + 1.0))
    if ADD:
        y = y + tl.load(out, mask=wanted, other=0.0)
    return y


@triton.jit(do_not_specialize=["M"])
def gemm(
    out,  # f32 [M, N]
    x,  # f32 [M, K]
    hi,
    lo,
    scales,
    bias,
    M,
    K,
    padded,
    N,
    out_scale,
    softcap,
    ENCODING: tl.constexpr,  # 2, 3 or 4
    GROUP: tl.constexpr,
    LO_SHIFT: tl.constexpr,
    ROUND: tl.constexpr,  # 1 or 2
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,  # of 32 columns, a turn
    DEPENDENT: tl.constexpr,
):
    """Y = X Wᵀ, some groups of 32 columns a turn: codes meet codes (or bf16) in tensor cores, which is exact for codes,
    and the scales join outside. A row's result does not depend on the rows beside it. Grid [N / BN, M / BM]."""
    started(DEPENDENT)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, live = rows < N, tokens < M
    row, token = rows.to(tl.int64)[:, None], tokens.to(tl.int64)[:, None]
    half = tl.arange(0, 16)[None, :]
    if ENCODING == 2:
        first = half
        second = half + 16
    else:
        first = half % 4 * 8 + half // 4
        second = first + 4
    acc = tl.zeros([BM, BN], tl.float32)
    for turn in range(0, padded, 32 * GROUPS):
        for each in tl.static_range(GROUPS):
            start = turn + 32 * each
            stored = inside[:, None] & (start + half < padded)
            a = tl.load(x + token * K + start + first, mask=live[:, None] & (start + first < K), other=0.0)
            b = tl.load(x + token * K + start + second, mask=live[:, None] & (start + second < K), other=0.0)
            ws = tl.load(
                scales + rows.to(tl.int64) * (padded // GROUP) + start // GROUP,
                mask=inside & (0 * rows + start < padded),
                other=0.0,
            )
            share = ws.to(tl.float32)[None, :]
            if ROUND == 2:
                greatest = tl.max(tl.maximum(magnitude(a), magnitude(b)), axis=1)
                scale, inverse = factors(greatest)
                a = rounded(a * inverse[:, None])
                b = rounded(b * inverse[:, None])
                share = share * scale[:, None]
            if ENCODING == 2:
                base = row * padded + start + half
                p = tl.load(hi + base, mask=stored, other=0).to(tl.float32)
                q = tl.load(hi + base + 16, mask=stored, other=0).to(tl.float32)
            else:
                p, q = nibble_codes(hi, lo, row * (padded // 2) + start // 2 + half, stored, ENCODING, LO_SHIFT)
            part = dot16(bf16(a), tl.trans(bf16(p)), tl.zeros([BM, BN], tl.float32))
            part = dot16(bf16(b), tl.trans(bf16(q)), part)
            acc += part * share
    if ENCODING == 4:
        acc = acc * (1.0 / (1 << LO_SHIFT))
    where = out + token * N + rows[None, :]
    there = live[:, None] & inside[None, :]
    y = finished(acc, (bias + rows)[None, :], inside[None, :], where, there, BIAS, ADD, out_scale, softcap, CAP)
    tl.store(where, y, mask=there)


@triton.jit
def dequantize(
    out,  # bf16 [N, K]
    hi,
    lo,
    scales,
    K,
    padded,
    N,
    ENCODING: tl.constexpr,
    GROUP: tl.constexpr,
    LO_SHIFT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights as bf16, for products of many tokens: read once here, then cuBLAS. Neighbouring programs
    write neighbouring columns. Grid [padded / BK, N / BN]."""
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    row = rows.to(tl.int64)[:, None]
    cols = (tl.program_id(0) * BK + tl.arange(0, BK))[None, :]
    there = (rows < N)[:, None] & (cols < K)
    if ENCODING >= 3:
        group = tl.program_id(0) * (BK // 32) + tl.arange(0, BK // 32)
        inside = (rows < N)[:, None] & (group < padded // 32)[None, :]
        first = row * (padded // 32 * 4) + group[None, :] * 4
        words = first[:, :, None] + tl.arange(0, 4)[None, None, :]
        w = tl.load(hi + words, mask=inside[:, :, None], other=0)
        v = w
        if ENCODING == 4:
            v = tl.load(lo + words, mask=inside[:, :, None], other=0)
        ws = tl.load(scales + row * (padded // GROUP) + (group * 32 // GROUP)[None, :], mask=inside, other=0.0)
        share = ws.to(tl.float32)[:, :, None]
        if ENCODING == 4:
            share = share * (1.0 / (1 << LO_SHIFT))
        # nibble n of word k is column 4 n + k
        even = tl.join(nibble(w, v, share, 0, ENCODING, LO_SHIFT), nibble(w, v, share, 4, ENCODING, LO_SHIFT))
        even = tl.join(
            even, tl.join(nibble(w, v, share, 2, ENCODING, LO_SHIFT), nibble(w, v, share, 6, ENCODING, LO_SHIFT))
        )
        odd = tl.join(nibble(w, v, share, 1, ENCODING, LO_SHIFT), nibble(w, v, share, 5, ENCODING, LO_SHIFT))
        odd = tl.join(
            odd, tl.join(nibble(w, v, share, 3, ENCODING, LO_SHIFT), nibble(w, v, share, 7, ENCODING, LO_SHIFT))
        )
        y = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 4, 5, 2)), [BN, BK])
    else:
        y = table_row(hi, lo, scales, row, cols, there, padded, ENCODING, GROUP, LO_SHIFT)
    tl.store(out + row * K + cols, bf16(y).to(tl.bfloat16), mask=there)


@triton.jit
def nibble(w, v, share, n: tl.constexpr, ENCODING: tl.constexpr, LO_SHIFT: tl.constexpr):
    """Weights f32 whose codes are nibble n of words."""
    code = (w >> (4 * n)) & 15
    if ENCODING == 4:
        code = (code << LO_SHIFT) + ((v >> (4 * n)) & 15) - (8 << LO_SHIFT)
    return (code - 8).to(tl.float32) * share


@triton.jit
def table_row(
    hi, lo, scales, row, cols, inside, padded, ENCODING: tl.constexpr, GROUP: tl.constexpr, LO_SHIFT: tl.constexpr
):
    """Weights f32 of rows and columns of any encoding, one by one."""
    if ENCODING >= 3:
        offset = row * (padded // 2) + (cols // 32) * 16 + cols % 4 * 4 + cols % 32 // 8
        p, q = nibble_codes(hi, lo, offset, inside, ENCODING, LO_SHIFT)
        value = tl.where(cols % 8 < 4, p, q)
        if ENCODING == 4:
            value = value * (1.0 / (1 << LO_SHIFT))
    else:
        value = tl.load(hi + row * padded + cols, mask=inside, other=0.0).to(tl.float32)
    if ENCODING >= 2:
        value = value * tl.load(scales + row * (padded // GROUP) + cols // GROUP, mask=inside, other=0.0).to(tl.float32)
    return value

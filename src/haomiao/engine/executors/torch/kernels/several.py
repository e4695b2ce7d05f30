"""A matrix of codes times a few tokens: `prepare` makes the activations ready, `gemm_codes` multiplies in tensor cores.

A turn of `gemm_codes` reads some groups of 32 columns of each row, 16 bytes a thread, makes bf16 of codes by their bits
(exact), multiplies every group as one of a batch of small products, and scales what comes out; the batch is added up
once, at the end. Columns of planes lie in the order of their bits: place 8 k + 2 m + i of a group is column
16 i + 4 m + k, so that two neighbours come out of one word at once. ENCODING and ROUND as in `linear`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from haomiao.engine.executors.torch.kernels.linear import (
    INTERPRETED,
    bf16,
    factors,
    finished,
    magnitude,
    rounded,
    started,
)
from haomiao.engine.executors.torch.kernels.vector import source_at


@triton.jit
def prepare(
    short,  # bf16 [M, padded]: activations, or their codes, in the order of the weights
    x_scales,  # f32 [M, padded / 32] for ROUND 2
    x,  # f32 [M, K], or [M, 2 K] for SOURCE 2
    norm,  # f32 [K] for SOURCE 1
    K,
    padded,
    eps,
    SOURCE: tl.constexpr,
    ACT: tl.constexpr,
    ROUND: tl.constexpr,  # 1 or 2
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,  # covers a row
    DEPENDENT: tl.constexpr,
):
    """Norm or gate, and rounding. Grid [M, padded / 32 / GROUPS]; each program takes the norm's sum by itself."""
    started(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, 32)[None, :]
    column = place
    if PLANES:
        column = place % 2 * 16 + place // 2 % 4 * 4 + place // 8
    cols = group[:, None] * 32 + column
    if SOURCE == 2:
        value = source_at(x + token * (2 * K), cols, K, SOURCE, ACT)
    else:
        value = source_at(x + token * K, cols, K, SOURCE, ACT)
    if SOURCE == 1:
        all_of_them = tl.arange(0, BLOCK)
        row = tl.load(x + token * K + all_of_them, mask=all_of_them < K, other=0.0)
        factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(row * row) / K + eps))
        value = value * factor * tl.load(norm + cols, mask=cols < K, other=0.0)
    here = group < padded // 32
    if ROUND == 2:
        scale, inverse = factors(tl.max(magnitude(value), axis=1))
        value = rounded(value * inverse[:, None])
        tl.store(x_scales + token * (padded // 32) + group, scale, mask=here)
    where = token * (padded // 32 * 32) + group[:, None] * 32 + place
    tl.store(short + where, bf16(value).to(tl.bfloat16), mask=here[:, None])


@triton.jit
def two(w, v, m: tl.constexpr, ENCODING: tl.constexpr, LO_SHIFT: tl.constexpr):
    """Codes bf16 of nibbles m and m + 4 of words; in the interpreter f32."""
    if ENCODING == 4:
        low = (((w >> (4 * m)) & 15) << LO_SHIFT) + ((v >> (4 * m)) & 15) - ((8 << LO_SHIFT) + 8)
        high = (((w >> (4 * m + 16)) & 15) << LO_SHIFT) + ((v >> (4 * m + 16)) & 15) - ((8 << LO_SHIFT) + 8)
        a = bf16(low.to(tl.float32))
        b = bf16(high.to(tl.float32))
    elif INTERPRETED:
        a = (((w >> (4 * m)) & 15) - 8).to(tl.float32)
        b = (((w >> (4 * m + 16)) & 15) - 8).to(tl.float32)
    else:  # 128 + n is n in the last bits of 128, twice in a word; less 136
        a, b = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; mov.b32 u, 0x43084308; shr.u32 t, $2, $3; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;"
            " sub.rn.bf16x2 t, t, u; mov.b32 {$0, $1}, t; }",
            "=h,=h,r,r", [w, 4 * m], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b


@triton.jit(do_not_specialize=["M"])
def gemm_codes(
    out,  # f32 [M, N]
    short,  # as `prepare` leaves it
    x_scales,
    hi,  # planes: int32 [N, padded / 8]
    lo,
    scales,
    bias,
    M,
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
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Y = X Wᵀ. A row's result does not depend on the rows beside it. Grid [N / BN, M / BM]."""
    started(DEPENDENT)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, live = rows < N, tokens < M
    row, token = rows.to(tl.int64), tokens.to(tl.int64)
    groups = padded // 32
    place = tl.arange(0, 32)[None, None, :]
    acc = tl.zeros([GROUPS, BN, BM], tl.float32)
    for turn in range(0, groups, GROUPS):
        group = turn + tl.arange(0, GROUPS)
        here = group < groups
        there = here[:, None] & inside[None, :]  # groups first: neighbouring lanes then read neighbouring bytes
        where = (token * (groups * 32))[None, :, None] + (group * 32)[:, None, None] + place
        a = tl.load(short + where, mask=live[None, :, None] & here[:, None, None], other=0.0)
        of_scales = (row * (padded // GROUP))[None, :] + (group * 32 // GROUP)[:, None]
        share = tl.load(scales + of_scales, mask=there, other=0.0).to(tl.float32)[:, :, None]
        if ROUND == 2:
            of_x = (token * groups)[None, :] + group[:, None]
            share = share * tl.load(x_scales + of_x, mask=live[None, :] & here[:, None], other=0.0)[:, None, :]
        if ENCODING == 2:
            whole = (row * (groups * 32))[None, :, None] + (group * 32)[:, None, None] + place
            b = bf16(tl.load(hi + whole, mask=there[:, :, None], other=0).to(tl.float32))
        else:
            first = (row * (padded // 8))[None, :] + (group * 4)[:, None]
            words = first[:, :, None] + tl.arange(0, 4)[None, None, :]
            w = tl.load(hi + words, mask=there[:, :, None], other=0)
            v = w
            if ENCODING == 4:
                v = tl.load(lo + words, mask=there[:, :, None], other=0)
            c, d = two(w, v, 0, ENCODING, LO_SHIFT)
            e, f = two(w, v, 1, ENCODING, LO_SHIFT)
            g, h = two(w, v, 2, ENCODING, LO_SHIFT)
            i, j = two(w, v, 3, ENCODING, LO_SHIFT)
            # last i, then m: its lower bit before its upper one
            even = tl.join(tl.join(c, g), tl.join(e, i))  # [.., upper bit, lower bit] of m
            odd = tl.join(tl.join(d, h), tl.join(f, j))
            b = tl.reshape(tl.join(even, odd), [GROUPS, BN, 32])
        if INTERPRETED:
            part = tl.dot(b, tl.permute(a.to(tl.float32), (0, 2, 1)), input_precision="ieee")
        else:
            part = tl.dot(b, tl.permute(a, (0, 2, 1)))
        acc += part * share
    y = tl.sum(acc, axis=0)
    if ENCODING == 4:
        y = y * (1.0 / (1 << LO_SHIFT))
    to = out + token[None, :] * N + rows[:, None]
    wanted = live[None, :] & inside[:, None]
    y = finished(y, (bias + rows)[:, None], inside[:, None], to, wanted, BIAS, ADD, out_scale, softcap, CAP)
    tl.store(to, y, mask=wanted)

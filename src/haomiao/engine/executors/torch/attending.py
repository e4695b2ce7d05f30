"""Launches of attention's kernels: writing K and V, attending in splits, merging them. Knows kernels and tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haomiao.engine.executors.torch import launch
from haomiao.engine.executors.torch.kernels import attention
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.engine.executors.torch.memory import LayerMemory

KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of an attention, and the norms and rotations before it."""

    heads: int
    kv_heads: int
    head_dim: int
    k_offset: int
    v_offset: int
    scale: float
    window: int
    softcap: float
    eps: float = 0.0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_rope: tuple[Tensor, Tensor] | None = None
    k_rope: tuple[Tensor, Tensor] | None = None


def store(q: Tensor, qkv: Tensor, memory: LayerMemory, positions: Tensor, slots: Tensor, shape: Heads) -> None:
    """Norm and rotate; q f32 [tokens, heads * head_dim], K and V into their slots."""
    none = qkv
    q_rope, k_rope = shape.q_rope or (none, none), shape.k_rope or (none, none)
    attention.store[(qkv.shape[0], shape.heads + 2 * shape.kv_heads)](
        q, memory.k, memory.v, memory.k if memory.k_scales is None else memory.k_scales,
        memory.v if memory.v_scales is None else memory.v_scales, qkv, positions, slots,
        none if shape.q_norm is None else shape.q_norm, none if shape.k_norm is None else shape.k_norm,
        *q_rope, *k_rope, qkv.shape[1], shape.k_offset, shape.v_offset, shape.eps,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, HEAD_DIM=shape.head_dim, D=launch.power(shape.head_dim, 16),
        Q_HALF=q_rope[0].shape[1] if shape.q_rope else 0, K_HALF=k_rope[0].shape[1] if shape.k_rope else 0,
        Q_NORM=shape.q_norm is not None, K_NORM=shape.k_norm is not None, KV=KV_KINDS[memory.k.dtype], num_warps=1,
        **launch.dependence(q.device),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Queries:
    """Which tokens attend to what. `starts`, `counts` cut them into blocks of at most `most` tokens of one sequence;
    `split` positions are worked off by one program, 0: all of them."""

    positions: Tensor
    tables: Tensor
    owners: Tensor
    starts: Tensor
    counts: Tensor
    most: int
    split: int
    splits: int


def attend(out: Tensor, q: Tensor, memory: LayerMemory, queries: Queries, shape: Heads) -> None:
    """Attention over what is stored: out f32 [tokens, heads * head_dim]."""
    split = queries.split if queries.splits > 1 else 0
    sums = peaks = out
    if split:
        rows = out.shape[0] * shape.heads * queries.splits
        sums = torch.empty(rows, shape.head_dim, device=out.device)
        peaks = torch.empty(rows, 2, device=out.device)
    width, kind = launch.power(shape.head_dim, 16), KV_KINDS[memory.k.dtype]
    most = launch.power(queries.most * (shape.heads // shape.kv_heads), 16)
    attention.attend[(queries.starts.shape[0], shape.kv_heads, queries.splits)](
        out, sums, peaks, q, memory.k, memory.v, memory.k if memory.k_scales is None else memory.k_scales,
        memory.v if memory.v_scales is None else memory.v_scales, queries.positions, queries.tables, queries.owners,
        queries.starts, queries.counts, queries.tables.shape[1], queries.splits,
        shape.scale, shape.window, shape.softcap,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, HEAD_DIM=shape.head_dim, D=width,
        ROWS=most, KEYS=32 if kind == 0 else launch.BLOCKS.keys,
        SPLIT=split, WINDOW=shape.window > 0, CAP=shape.softcap != 0, KV=kind,
        # many rows, or f32, which has no tensor cores: fewer numbers a thread
        num_warps=8 if kind == 0 or most * width >= 8192 else launch.BLOCKS.attend_warps,
        **launch.dependence(out.device),
    )  # fmt: skip
    if split:
        attention.merge[(out.shape[0], shape.heads)](
            out,
            sums,
            peaks,
            queries.splits,
            HEAD_DIM=shape.head_dim,
            D=width,
            SPLITS=launch.power(queries.splits),
            **launch.dependence(out.device),
        )

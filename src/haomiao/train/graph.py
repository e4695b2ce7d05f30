"""A plan's operations in torch, with gradients: whole sequences, positions from 0, no state.

What every operation means is the plan's (docs/ARCHITECTURE.md, section 3); weights are tensors in the plan's own shapes
[rows, cols], so that what was trained needs no translation. Knows nothing about files, text or optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haomiao.errors import UnsupportedModelError
from haomiao.models import plan as ops

Weights = Mapping[str, Tensor]
"""Name in the plan -> tensor: matrices and tables [rows, cols], vectors [rows]."""


class Graph:
    """The forward pass of one plan. Holds no weights; tables of rotations are made once for each device."""

    def __init__(self, plan: ops.Plan) -> None:
        self.plan = plan
        self._rotations: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}

    def logits(self, weights: Weights, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Token ids int64 [sequences, tokens] -> logits [sequences, tokens, vocab]; row i predicts token i + 1. With
        `wanted`, bool [sequences, tokens], the head is computed for those places alone: logits [places, vocab]."""
        return self._logits(weights, ids, wanted, None)

    def observed(self, weights: Weights, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits as above, and the residual stream [sequences, tokens, width] after every addition to it."""
        sums: list[Tensor] = []
        return self._logits(weights, ids, None, sums), sums

    def _logits(self, weights: Weights, ids: Tensor, wanted: Tensor | None, sums: list[Tensor] | None) -> Tensor:
        *body, head = self.plan.ops
        if not isinstance(head, ops.Head):
            raise UnsupportedModelError(f"the plan of {self.plan.family} does not end with its head")
        buffers: dict[str, Tensor] = {}
        for op in body:
            self._apply(op, weights, buffers, ids)
            if sums is not None and isinstance(op, ops.Add):
                sums.append(buffers[op.target])
        hidden = buffers[head.source] if wanted is None else buffers[head.source][wanted]
        y = _linear(hidden, weights, head.weight, head.bias)
        if head.scale != 1.0:
            y = y * head.scale
        return head.softcap * torch.tanh(y / head.softcap) if head.softcap else y

    def _apply(self, op: ops.Op, weights: Weights, buffers: dict[str, Tensor], ids: Tensor) -> None:
        match op:
            case ops.Embed():
                x = F.embedding(ids, weights[op.table]) * op.scale
                if op.positions is not None:
                    x = x + weights[op.positions][: ids.shape[1]]
                buffers[op.out] = x
            case ops.Norm():
                buffers[op.out] = _norm(op, weights, buffers[op.source])
            case ops.Linear():
                buffers[op.out] = _linear(buffers[op.source], weights, op.weight, op.bias)
            case ops.HeadNorm():
                part = _heads(buffers[op.buffer], op.offset, op.heads, op.head_dim)
                normed = F.rms_norm(part.float(), (op.head_dim,), weights[op.weight], op.eps)
                buffers[op.buffer] = _replaced(buffers[op.buffer], op.offset, normed.flatten(-2))
            case ops.Rope():
                part = _heads(buffers[op.buffer], op.offset, op.heads, op.head_dim)
                rotated = self._rotate(op.rope, part)
                buffers[op.buffer] = _replaced(buffers[op.buffer], op.offset, rotated.flatten(-2))
            case ops.Attention():
                buffers[op.out] = _attend(op, buffers[op.qkv])
            case ops.Add():
                buffers[op.target] = buffers[op.target] + buffers[op.source]
            case ops.Glu():
                pairs = buffers[op.source]
                pairs = pairs.reshape(*pairs.shape[:-1], -1, 2, 32)
                buffers[op.out] = (_activate(pairs[..., 0, :], op.activation) * pairs[..., 1, :]).flatten(-2)
            case ops.Activate():
                buffers[op.out] = _activate(buffers[op.source], op.activation)
            case _:
                raise UnsupportedModelError(f"training does not know the operation {type(op).__name__}")

    def _rotate(self, rope: int, x: Tensor) -> Tensor:
        """x [sequences, tokens, heads, head_dim], rotated in halves."""
        spec, tokens = self.plan.ropes[rope], x.shape[1]
        key = (rope, tokens, str(x.device))
        if key not in self._rotations:
            angles = np.arange(tokens, dtype=np.float32)[:, None] * np.array(spec.inv_freq, np.float32)
            wide = angles.astype(np.float64)
            self._rotations[key] = (
                torch.tensor((np.cos(wide) * spec.attention_factor).astype(np.float32), device=x.device)[:, None],
                torch.tensor((np.sin(wide) * spec.attention_factor).astype(np.float32), device=x.device)[:, None],
            )
        cosines, sines = self._rotations[key]
        half = spec.dim // 2
        first, second = x[..., :half], x[..., half : spec.dim]
        parts = [first * cosines - second * sines, second * cosines + first * sines]
        return torch.cat([*parts, x[..., spec.dim :]] if spec.dim < x.shape[-1] else parts, dim=-1).to(x.dtype)


def _linear(x: Tensor, weights: Weights, name: str, bias: str | None) -> Tensor:
    return F.linear(x, weights[name], None if bias is None else weights[bias])


def _norm(op: ops.Norm, weights: Weights, x: Tensor) -> Tensor:
    """In float32 whatever autocast says: a mean of squares does not survive bf16."""
    weight, size = weights[op.weight], (x.shape[-1],)
    if op.kind == "rms":
        return F.rms_norm(x.float(), size, weight, op.eps)
    return F.layer_norm(x.float(), size, weight, None if op.bias is None else weights[op.bias], op.eps)


def _activate(x: Tensor, function: ops.Activation) -> Tensor:
    match function:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


def _heads(buffer: Tensor, offset: int, heads: int, dim: int) -> Tensor:
    """Columns of a buffer [..., width] as [..., heads, dim]."""
    return buffer[..., offset : offset + heads * dim].reshape(*buffer.shape[:-1], heads, dim)


def _replaced(buffer: Tensor, offset: int, part: Tensor) -> Tensor:
    """The buffer with some columns new. Gradients do not allow writing in place."""
    return torch.cat([buffer[..., :offset], part.to(buffer.dtype), buffer[..., offset + part.shape[-1] :]], dim=-1)


def _attend(op: ops.Attention, qkv: Tensor) -> Tensor:
    """Causal attention of every sequence over itself."""
    if op.sinks is not None:
        raise UnsupportedModelError("attention sinks are not supported")
    q = _heads(qkv, 0, op.heads, op.head_dim).transpose(1, 2)
    k = _heads(qkv, op.k_offset, op.kv_heads, op.head_dim).transpose(1, 2)
    v = _heads(qkv, op.v_offset, op.kv_heads, op.head_dim).transpose(1, 2)
    tokens = q.shape[2]
    shared = op.heads != op.kv_heads
    if not op.softcap and (not op.window or op.window >= tokens):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=op.scale, enable_gqa=shared)
    else:
        position = torch.arange(tokens, device=q.device)
        seen = position[None, :] <= position[:, None]
        if op.window:
            seen &= position[None, :] > position[:, None] - op.window
        if not op.softcap:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=op.scale, enable_gqa=shared)
        else:
            k, v = (t.repeat_interleave(op.heads // op.kv_heads, dim=1) for t in (k, v))
            scores = op.softcap * torch.tanh(q @ k.transpose(2, 3) * (op.scale / op.softcap))
            mixed = torch.softmax(scores.masked_fill(~seen, float("-inf")).float(), dim=-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(-2)

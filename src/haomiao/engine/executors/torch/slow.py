"""One step, operation by operation, with the twins: the second reference, on any device.

Knows the plan and the device's model; nothing about kernels, graphs or buffers that outlive a step.
"""

from __future__ import annotations

import numpy as np
import torch

from haomiao.engine.executors.torch import twins
from haomiao.engine.executors.torch.copies import copied_slots
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.engine.executors.torch.model import DeviceModel, kv_width
from haomiao.errors import UnsupportedModelError
from haomiao.models import plan as ops
from haomiao.types import KV_BLOCK_TOKENS, POINTS, RowDraws, StepBatch


def run_slowly(model: DeviceModel, batch: StepBatch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logits f32 [rows, vocab], the places of their greatest, int32 [rows], the tokens that were drawn, int32 [rows],
    and the hidden states that were asked for, on the device."""
    step = _SlowStep(model, batch)
    for op in model.ops:
        step.apply(op)
    places = twins.greatest(step.logits) if step.logits.shape[0] else step.rows.int()
    drawn = None if batch.draws is None else twins.draw(step.logits, draws_on(batch.draws, model.device))
    return step.logits, places, drawn, step.hidden


def draws_on(draws: RowDraws, device: torch.device) -> twins.Draws:
    """How rows are drawn, on the device."""
    numbers = (draws.uniform, draws.top_p, draws.temperature, draws.min_p, draws.top_k)
    return twins.Draws(*(torch.from_numpy(each).to(device) for each in numbers))


class _SlowStep:
    """The buffers of one step."""

    def __init__(self, model: DeviceModel, batch: StepBatch) -> None:
        self.model, self.batch, self.point = model, batch, POINTS[batch.point]
        device = model.device
        lengths = np.diff(batch.span_starts)
        spans = [past + np.arange(n) for past, n in zip(batch.past, lengths, strict=True)]
        self.positions = torch.from_numpy(np.concatenate(spans).astype(np.int64)).to(device)
        self.tokens = torch.from_numpy(batch.token_ids.astype(np.int64)).to(device)
        self.rows = torch.from_numpy(batch.logit_rows.astype(np.int64)).to(device)
        self.tables = torch.from_numpy(batch.block_tables.astype(np.int64)).to(device)
        owner = torch.from_numpy(np.repeat(np.arange(lengths.size), lengths)).to(device)
        blocks = self.tables[owner, self.positions // KV_BLOCK_TOKENS]
        self.slots = blocks * KV_BLOCK_TOKENS + self.positions % KV_BLOCK_TOKENS
        copied = copied_slots(batch)
        self.copies = None if copied is None else torch.from_numpy(copied).to(device)
        self.buffers: dict[str, Tensor] = {
            name: torch.zeros(batch.tokens, width, device=device) for name, width in model.plan.buffers.items()
        }
        self.logits: Tensor = torch.zeros(0, model.plan.vocab_size, device=device)
        self.hidden: Tensor | None = None

    def apply(self, op: ops.Op) -> None:
        """Run one operation. An unknown one is refused by name."""
        name = type(op).__name__.lower()
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise UnsupportedModelError(f"the plan holds an operation that is not supported: {name}")
        method(op)

    def vector(self, name: str | None) -> Tensor | None:
        return None if name is None else self.model.vectors[name]

    def do_embed(self, op: ops.Embed) -> None:
        x = self.model.matrices[op.table].values("hi+lo", self.tokens) * np.float32(op.scale).item()
        if op.positions is not None:
            x = x + self.model.matrices[op.positions].values("hi+lo", self.positions)
        self.buffers[op.out] = x

    def do_norm(self, op: ops.Norm) -> None:
        x, weight = self.buffers[op.source], self.model.vectors[op.weight]
        if op.kind == "rms":
            self.buffers[op.out] = twins.rms_norm(x, weight, op.eps)
        else:
            self.buffers[op.out] = twins.layer_norm(x, weight, self.vector(op.bias), op.eps)

    def do_linear(self, op: ops.Linear) -> None:
        matrix, planes = self.model.matrices[op.weight], self.point.planes
        y = twins.linear(matrix, self.buffers[op.source], self.point, planes, self.vector(op.bias))
        self.buffers[op.out] = y

    def section(self, buffer: str, offset: int, heads: int, head_dim: int) -> Tensor:
        """A view [tokens, heads, head_dim] of a range of columns."""
        return self.buffers[buffer][:, offset : offset + heads * head_dim].unflatten(1, (heads, head_dim))

    def do_headnorm(self, op: ops.HeadNorm) -> None:
        x = self.section(op.buffer, op.offset, op.heads, op.head_dim)
        x.copy_(twins.rms_norm(x, self.model.vectors[op.weight], op.eps))

    def do_rope(self, op: ops.Rope) -> None:
        cos, sin = (table[self.positions] for table in self.model.ropes[op.rope])
        x = self.section(op.buffer, op.offset, op.heads, op.head_dim)
        x.copy_(twins.rotate(x, cos, sin))

    def do_attention(self, op: ops.Attention) -> None:
        if op.sinks is not None:
            raise UnsupportedModelError("attention sinks are not supported")
        memory = self.model.memory[op.layer]
        q = self.section(op.qkv, 0, op.heads, op.head_dim)
        k, v = (
            self.buffers[op.qkv][:, offset : offset + kv_width(op)].unflatten(1, (op.kv_heads, op.head_dim))
            for offset in (op.k_offset, op.v_offset)
        )
        out = torch.zeros(self.batch.tokens, op.heads * op.head_dim, device=self.model.device)
        memory.write(self.slots, k, v)
        if self.copies is not None:
            memory.copy_slots(*self.copies)
        starts = self.batch.span_starts
        for span in range(starts.size - 1):
            for offset, t in enumerate(range(int(starts[span]), int(starts[span + 1]))):
                length = int(self.batch.past[span]) + offset + 1
                keys, values = memory.read(self.tables[span], length)
                answer = twins.attend(
                    q[t], keys, values,
                    scale=op.scale, window=op.window, softcap=op.softcap, int8=self.model.kv_type == "int8",
                )  # fmt: skip
                out[t] = answer.reshape(-1).float()
        self.buffers[op.out] = out

    def do_add(self, op: ops.Add) -> None:
        self.buffers[op.target] = self.buffers[op.target] + self.buffers[op.source]

    def do_glu(self, op: ops.Glu) -> None:
        self.buffers[op.out] = twins.glu(self.buffers[op.source], op.activation)

    def do_activate(self, op: ops.Activate) -> None:
        self.buffers[op.out] = twins.activate(self.buffers[op.source], op.activation).float()

    def do_head(self, op: ops.Head) -> None:
        if self.batch.hidden_rows is not None:
            self.hidden = self.buffers[op.source][torch.from_numpy(self.batch.hidden_rows.astype(np.int64))]
        rows = self.buffers[op.source][self.rows]
        if rows.shape[0] == 0:
            return
        matrix = self.model.matrices[op.weight]
        logits = twins.linear(matrix, rows, self.point, self.point.head, self.vector(op.bias))
        scaled = logits * np.float32(op.scale).item()
        self.logits = twins.softcapped(scaled.double(), op.softcap).float() if op.softcap else scaled

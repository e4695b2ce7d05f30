"""A model on a device: weights, rotation tables and K/V, which the slow and the fast step both run on.

Knows the plan's names; not how a step is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from haomiao.engine.executors.torch.matrices import DeviceMatrix, Tensor, place
from haomiao.engine.executors.torch.memory import LayerMemory, bytes_per_block, make_memory
from haomiao.kernels.packed import PackedTensor
from haomiao.models.plan import Attention, Op, Plan, RopeSpec
from haomiao.types import F32, KvType


@dataclass(frozen=True)
class DeviceModel:
    """Everything that lies on the device."""

    plan: Plan
    device: torch.device
    kv_type: KvType
    kv_blocks: int
    matrices: dict[str, DeviceMatrix]
    vectors: dict[str, Tensor]
    ropes: tuple[tuple[Tensor, Tensor], ...]
    """cos and sin, f32 [max_context, dim / 2] each."""
    memory: tuple[LayerMemory, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.plan.ops

    @property
    def kv_bytes_per_block(self) -> int:
        layers = zip(self.plan.kv_heads, self.plan.head_dims, strict=True)
        return sum(bytes_per_block(self.kv_type, heads, dim) for heads, dim in layers)

    @property
    def weight_bytes(self) -> int:
        total = sum(m.nbytes for m in self.matrices.values())
        return total + sum(int(4 * v.numel()) for v in self.vectors.values())

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks of every layer, as if in order: at once where no block is written and read, or written twice."""
        sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
        apart = len({*sources} | {*targets}) == len({*sources}) + len(targets)
        for some in [pairs] if apart and pairs else [[pair] for pair in pairs]:
            read, written = (torch.tensor([pair[side] for pair in some], device=self.device) for side in (0, 1))
            for layer in self.memory:
                for storage in layer.parts:
                    storage[written] = storage[read]


def load(
    plan: Plan,
    tensors: Mapping[str, PackedTensor],
    vectors: Mapping[str, F32],
    *,
    device: torch.device,
    kv_type: KvType,
    kv_blocks: int,
) -> DeviceModel:
    """Put a model on the device. `tensors` and `vectors` were checked against the plan."""
    matrices = {name: place(tensors[name], device) for name, spec in plan.weights.items() if spec.kind != "vector"}
    small = {
        name: torch.from_numpy(np.array(vectors[name], np.float32)).to(device)
        for name, spec in plan.weights.items()
        if spec.kind == "vector"
    }
    return assemble(plan, matrices, small, device=device, kv_type=kv_type, kv_blocks=kv_blocks)


def assemble(
    plan: Plan,
    matrices: dict[str, DeviceMatrix],
    vectors: dict[str, Tensor],
    *,
    device: torch.device,
    kv_type: KvType,
    kv_blocks: int,
) -> DeviceModel:
    """A model of weights that are on the device already."""
    shapes = zip(plan.kv_heads, plan.head_dims, strict=True)
    memory = tuple(make_memory(kv_type, kv_blocks, heads, dim, device) for heads, dim in shapes)
    ropes = tuple(rope_table(spec, plan.max_context, device) for spec in plan.ropes)
    return DeviceModel(plan, device, kv_type, kv_blocks, matrices, vectors, ropes, memory)


def rope_table(spec: RopeSpec, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of f32(position) * inv_freq (rounded once to f32), taken in double and rounded."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * np.array(spec.inv_freq, np.float32)
    wide = angles.astype(np.float64)
    tables = (np.cos(wide) * spec.attention_factor, np.sin(wide) * spec.attention_factor)
    cos, sin = (torch.from_numpy(table.astype(np.float32)).to(device) for table in tables)
    return cos, sin


def kv_width(op: Attention) -> int:
    """Columns of K, or of V, in a step's buffer."""
    return op.kv_heads * op.head_dim

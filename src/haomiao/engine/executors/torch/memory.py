"""K and V of all layers on a device, in blocks of 32 tokens. Knows how they are kept; nothing about sequences.

One block more than the executor offers takes what padding tokens write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haomiao.engine.executors.torch import twins
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.types import KV_BLOCK_TOKENS, KvType

DTYPES: dict[KvType, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """K and V of one layer, [blocks, kv_heads, 32, head_dim]; int8 has scales f32 [blocks, kv_heads, 32]."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v f32 [tokens, kv_heads, head_dim]; `slots` int64 [tokens] is block * 32 + place."""
        block, place = slots // KV_BLOCK_TOKENS, slots % KV_BLOCK_TOKENS
        for storage, scales, x in ((self.k, self.k_scales, k), (self.v, self.v_scales, v)):
            if scales is None:
                storage[block, :, place] = x.to(storage.dtype)
            else:
                storage[block, :, place], scales[block, :, place] = twins.kv_codes(x)

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None:
        """Copy tokens' K and V between slots, int64 [copies] each."""
        for storage in self.parts:
            found = storage[sources // KV_BLOCK_TOKENS, :, sources % KV_BLOCK_TOKENS]
            storage[targets // KV_BLOCK_TOKENS, :, targets % KV_BLOCK_TOKENS] = found

    def read(self, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """K, V f32 [kv_heads, length, head_dim] of the sequence whose blocks are `table`."""
        blocks = table[: -(-length // KV_BLOCK_TOKENS)]

        def gathered(storage: Tensor, scales: Tensor | None) -> Tensor:
            x = storage[blocks].float()
            if scales is not None:
                x = x * scales[blocks][..., None]
            return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3])[:, :length]

        return gathered(self.k, self.k_scales), gathered(self.v, self.v_scales)


def make_memory(kv_type: KvType, blocks: int, kv_heads: int, head_dim: int, device: torch.device) -> LayerMemory:
    """A layer's K and V, zero, with a block for padding behind the others."""
    shape = (blocks + 1, kv_heads, KV_BLOCK_TOKENS, head_dim)
    k, v = (torch.zeros(shape, dtype=DTYPES[kv_type], device=device) for _ in range(2))
    if kv_type != "int8":
        return LayerMemory(k, v, None, None)
    k_scales, v_scales = (torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2))
    return LayerMemory(k, v, k_scales, v_scales)


def bytes_per_block(kv_type: KvType, kv_heads: int, head_dim: int) -> int:
    """Bytes of one block of one layer."""
    item: int = DTYPES[kv_type].itemsize
    per_token = kv_heads * (head_dim * item + (4 if kv_type == "int8" else 0))
    return 2 * KV_BLOCK_TOKENS * per_token

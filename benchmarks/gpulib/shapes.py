"""Models of real shape with random weights, made on the device itself. For speed only: such weights say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from haomiao.engine.executors.torch.matrices import DeviceMatrix
from haomiao.engine.executors.torch.model import DeviceModel, assemble
from haomiao.kernels.packed import padded_columns
from haomiao.models.plan import Head, Linear, Plan
from haomiao.models.registry import plan_for
from haomiao.types import POINTS, KvType

GROUP = 32
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        **COMMON, "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 1e6,
    },
    "0.5b": {  # Qwen2.5-0.5B
        **COMMON, "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 1e6,
    },
    "1b": {  # Llama-3.2-1B
        **COMMON, "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 5e5,
    },
    "8b": {  # Llama-3.1-8B
        **COMMON, "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_theta": 5e5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A model on the device and what a step of it reads."""

    model: DeviceModel

    def step_bytes(self, point: str, sequences: int, context: int) -> int:
        """Bytes of weights and of K and V that a decode step reads."""
        plan, chosen, total = self.model.plan, POINTS[point], 0
        for op in plan.ops:
            if isinstance(op, Linear | Head):
                planes = chosen.planes if isinstance(op, Linear) else chosen.head
                matrix = self.model.matrices[op.weight]
                total += matrix.nbytes
                if matrix.lo is not None and not matrix.reads_lo(planes):
                    total -= matrix.lo.numel()
        return total + sequences * context * self.model.kv_bytes_per_block // 32

    def with_new_memory(self) -> DeviceModel:
        """The same weights beside K and V of their own."""
        model = self.model
        return assemble(
            model.plan, model.matrices, model.vectors,
            device=model.device, kv_type=model.kv_type, kv_blocks=model.kv_blocks,
        )  # fmt: skip

    @property
    def matrix_weights(self) -> int:
        """Weights of the linear layers, the head left out."""
        weights = self.model.plan.weights
        return sum(
            weights[op.weight].rows * weights[op.weight].cols for op in self.model.plan.ops if isinstance(op, Linear)
        )


def make(
    shape: str,
    storage: str,
    device: torch.device,
    *,
    kv_type: KvType = "bf16",
    kv_blocks: int = 1200,
    layers: int | None = None,
) -> Made:
    """`storage`: f32, bf16, int8 or planes. Codes are random, scales make y about as great as x. `layers`: only so
    many."""
    config = CONFIGS[shape]
    plan: Plan = plan_for(config if layers is None else config | {"num_hidden_layers": layers})
    generator = torch.Generator(device).manual_seed(0)
    matrices, vectors = {}, {}
    for name, spec in plan.weights.items():
        if spec.kind == "vector":
            vectors[name] = torch.full((spec.rows,), 0.0 if spec.role == "bias" else 1.0, device=device)
        else:
            matrices[name] = random_matrix(spec.rows, spec.cols, storage, generator, device)
    return Made(assemble(plan, matrices, vectors, device=device, kv_type=kv_type, kv_blocks=kv_blocks))


def random_matrix(rows: int, cols: int, storage: str, generator: torch.Generator, device: torch.device) -> DeviceMatrix:
    """A matrix [rows, cols] in that storage."""
    if storage in ("bf16", "f32"):
        dtype = torch.bfloat16 if storage == "bf16" else torch.float32
        values = torch.randn(rows, cols, generator=generator, device=device, dtype=dtype) / cols**0.5
        return DeviceMatrix("bf16" if storage == "bf16" else "f32", rows, cols, cols, 0, 0, values)
    padded = padded_columns("planes", cols, GROUP)

    def bytes_of(width: int) -> torch.Tensor:
        return torch.randint(0, 256, (rows, width), generator=generator, device=device, dtype=torch.uint8)

    size = 0.2 if storage == "planes" else 0.013
    scales = torch.full((rows, padded // GROUP), size / cols**0.5, device=device, dtype=torch.float16)
    if storage == "int8":
        return DeviceMatrix("int8", rows, cols, padded, GROUP, 0, bytes_of(padded).view(torch.int8), None, scales)
    hi, lo = bytes_of(padded // 2), bytes_of(padded // 2)
    return DeviceMatrix("planes", rows, cols, padded, GROUP, 4, hi, lo, scales)

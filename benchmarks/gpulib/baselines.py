"""What others do on the same GPU in the same run: transformers with torch.compile, a decoder in the manner of gpt-fast.

The second one is our own few lines of plain torch: static K/V, one compiled decode step replayed as a CUDA graph
(`mode="reduce-overhead"`), weights bf16 or in torch's int4 format (`_weight_int4pack_mm`, groups of 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpulib.shapes import CONFIGS

Step = Callable[[], Any]
ROOM = 256
"""Positions beyond the context. The cache of transformers counts its own length, so no more steps may be taken."""


def transformers_step(shape: str, batch: int, context: int, device: torch.device) -> Step:
    """One decode step of transformers: static cache, torch.compile, bf16."""
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[shape])
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=context + ROOM)
    prompt = torch.ones(batch, context, dtype=torch.long, device=device)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    compiled = torch.compile(model, mode="reduce-overhead")
    token = torch.ones(batch, 1, dtype=torch.long, device=device)
    position = torch.full((batch, 1), context, device=device)

    def step() -> Any:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(token, position_ids=position, past_key_values=cache, use_cache=True).logits
            return logits[:, -1].argmax(-1).cpu()

    return step


class Int4Linear(torch.nn.Module):
    """A linear layer in torch's own int4 format."""

    def __init__(self, rows: int, cols: int, device: torch.device) -> None:
        super().__init__()
        packed = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=device)
        self.weight = torch.nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        scales = torch.full((cols // 32, rows, 2), 0.2 / cols**0.5, dtype=torch.bfloat16, device=device)
        self.scales = torch.nn.Buffer(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm(x.flatten(0, -2), self.weight, 32, self.scales)
        return y.view(*x.shape[:-1], -1)


class Decoder(torch.nn.Module):
    """A Llama with static K/V, one token of each sequence a step."""

    def __init__(self, shape: str, batch: int, context: int, int4: bool, device: torch.device) -> None:
        super().__init__()
        c = CONFIGS[shape]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim = c.get("head_dim", c["hidden_size"] // self.heads)
        hidden, ffn, width = c["hidden_size"], c["intermediate_size"], (self.heads + 2 * self.kv_heads) * self.dim

        def linear(rows: int, cols: int) -> torch.nn.Module:
            if int4 and cols % 32 == 0 and rows % 8 == 0 and cols % 128 == 0:
                return Int4Linear(rows, cols, device)
            return torch.nn.Linear(cols, rows, bias=False, device=device, dtype=torch.bfloat16)

        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "qkv": linear(width, hidden), "out": linear(hidden, self.heads * self.dim),
                    "up": linear(2 * ffn, hidden), "down": linear(hidden, ffn),
                }
            )
            for _ in range(c["num_hidden_layers"])
        )  # fmt: skip
        self.table = torch.nn.Embedding(c["vocab_size"], hidden, device=device, dtype=torch.bfloat16)
        self.norm = torch.nn.Buffer(torch.ones(hidden, device=device, dtype=torch.bfloat16))
        sizes = (c["num_hidden_layers"], batch, self.kv_heads, context + ROOM, self.dim)
        self.k, self.v = (torch.nn.Buffer(torch.zeros(sizes, device=device, dtype=torch.bfloat16)) for _ in range(2))
        inverse = 1e4 ** (-torch.arange(0, self.dim, 2, device=device) / self.dim)
        self.inverse = torch.nn.Buffer(inverse)

    def turned(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        angle = position.float() * self.inverse
        cos, sin = angle.cos(), angle.sin()
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = self.table(token)
        seen = torch.arange(self.k.shape[3], device=x.device)[None, None, None, :] <= position
        for index, layer in enumerate(self.layers):
            h = F.rms_norm(x, x.shape[-1:], self.norm)
            q, k, v = (
                t.view(x.shape[0], 1, -1, self.dim).transpose(1, 2)
                for t in layer["qkv"](h).split([self.heads * self.dim, *[self.kv_heads * self.dim] * 2], dim=-1)
            )
            q, k = self.turned(q, position), self.turned(k, position)
            self.k[index].index_copy_(2, position, k)
            self.v[index].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, self.k[index], self.v[index], attn_mask=seen, enable_gqa=True)
            x = x + layer["out"](y.transpose(1, 2).flatten(2))
            gate, up = layer["up"](F.rms_norm(x, x.shape[-1:], self.norm)).chunk(2, dim=-1)
            x = x + layer["down"](F.silu(gate) * up)
        logits = F.rms_norm(x, x.shape[-1:], self.norm) @ self.table.weight.T
        return logits[:, -1].argmax(-1)


def compiled_step(shape: str, batch: int, context: int, device: torch.device, *, int4: bool) -> Step:
    """One decode step of the second kind."""
    model = Decoder(shape, batch, context, int4, device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.ones(batch, 1, dtype=torch.long, device=device)
    position = torch.tensor([context], device=device)

    def step() -> Any:
        with torch.no_grad():
            return compiled(token, position).cpu()

    return step

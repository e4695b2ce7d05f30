"""The shapes of well-known dense decoders, and what a step of each must read and compute. Arithmetic only.

Used where speed is asked of a shape rather than of a checkpoint: `haomiao doctor` and benchmarks/make_model.py. The
numbers are those of the models' published config.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

INT4_BYTES = 0.5
SCALE_BYTES = 2.0  # one float16 per group of columns


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense Llama-like decoder: grouped-query attention, gated feed-forward, RMS norms."""

    name: str
    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    rope_theta: float
    max_context: int

    @property
    def body_weights(self) -> int:
        """Weights of the linear layers, without embedding and head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head_weights(self) -> int:
        """Weights of the vocabulary head: read once a step, whether tied or not."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of all matrices: body, embedding, and the head if it is its own."""
        return self.body_weights + self.head_weights * (1 if self.tied else 2)

    def bytes_per_step(self, point: str, group: int = 32) -> float:
        """Bytes of weights that one step reads at `int4` or `int8`; the head is read at both planes in either case.

        docs/ARCHITECTURE.md, section 4: hi is 1/2 byte a weight and a float16 per group, lo another 1/2 byte.
        """
        hi = INT4_BYTES + SCALE_BYTES / group
        both = hi + INT4_BYTES
        return self.body_weights * (hi if point == "int4" else both) + self.head_weights * both

    def operations_per_token(self) -> float:
        """Multiplications and additions of one token in prefill: two per weight of the body."""
        return 2.0 * self.body_weights


SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, True, False, 1e5, 8192),
        ModelShape("qwen2.5-0.5b", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, True, True, 1e6, 32768),
        ModelShape("llama-3.2-1b", "llama", 16, 2048, 8192, 32, 8, 64, 128256, True, False, 5e5, 131072),
        ModelShape("llama-2-7b", "llama", 32, 4096, 11008, 32, 32, 128, 32000, False, False, 1e4, 4096),
    )
}

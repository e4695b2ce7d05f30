"""GGUF files for tests, written from the format's definition, so that every field can be made wrong."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
CODES = {4: "I", 5: "i", 6: "f", 10: "Q", 12: "d"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: Any) -> bytes:
    """Type and value of a metadata entry: bool, int (u32), float (f32), str, or a list of one of them."""
    if isinstance(value, bytes):
        return value  # already type and value
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind = {str: STRING, int: 5, float: F32}[type(value[0])]
    body = b"".join(text(item) if kind == STRING else struct.pack("<" + CODES[kind], item) for item in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + body


@dataclass
class Tensor:
    """`shape` as numpy says it; `offset` and `type` may lie."""

    shape: Sequence[int]
    data: bytes
    type: int = 0
    offset: int | None = None


@dataclass
class Gguf:
    """A file in pieces."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    entry_count: int | None = None

    def add(self, name: str, values: np.ndarray) -> None:
        """A float32 tensor."""
        self.tensors[name] = Tensor(values.shape, np.ascontiguousarray(values, "<f4").tobytes())

    def header(self) -> bytes:
        entries = len(self.metadata) if self.entry_count is None else self.entry_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        out = self.magic + struct.pack("<IQQ", self.version, tensors, entries)
        for key, value in self.metadata.items():
            out += text(key) + value_bytes(value)
        offset = 0
        for name, tensor in self.tensors.items():
            at = offset if tensor.offset is None else tensor.offset
            out += text(name) + struct.pack("<I", len(tensor.shape))
            out += b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape))
            out += struct.pack("<IQ", tensor.type, at)
            offset += -(-len(tensor.data) // self.alignment) * self.alignment
        return out + bytes(-len(out) % self.alignment)

    def bytes(self) -> bytes:
        out = self.header()
        for tensor in self.tensors.values():
            out += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return out


def tiny(architecture: str, layers: int = 2, **metadata: Any) -> Gguf:
    """A model of the architecture with all the metadata that converters write and the tensors of its layers."""
    rng = np.random.default_rng(5)
    hidden, heads, kv_heads, head_dim, inner, vocab = 32, 4, 2, 8, 48, 64
    file = Gguf({"general.architecture": architecture})
    common = {
        "context_length": 128,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": inner,
        "attention.head_count": heads,
    }
    if architecture == "gpt2":
        common["attention.layer_norm_epsilon"] = 1e-5
    else:
        common.update(
            {
                "attention.head_count_kv": kv_heads,
                "attention.key_length": head_dim,
                "attention.value_length": head_dim,
                "attention.layer_norm_rms_epsilon": 1e-6,
                "rope.freq_base": 50000.0,
            }
        )
    file.metadata.update({f"{architecture}.{key}": value for key, value in common.items()})
    file.metadata.update(metadata)

    def add(name: str, *shape: int) -> None:
        file.add(name, rng.standard_normal(shape))

    add("token_embd.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    for i in range(layers):
        for name, shape in layer_shapes(architecture, hidden, heads, kv_heads, head_dim, inner).items():
            add(f"blk.{i}.{name}", *shape)
    if architecture == "gpt2":
        add("position_embd.weight", 128, hidden)
        add("output_norm.bias", hidden)
    return file


def layer_shapes(
    architecture: str, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int
) -> Mapping[str, tuple[int, ...]]:
    q, kv = heads * head_dim, kv_heads * head_dim
    norms = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if architecture == "gpt2":
        linear = {"attn_qkv": (3 * hidden, hidden), "attn_output": (hidden, hidden)}
        linear |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        biases = {f"{name}.bias": shape[:1] for name, shape in linear.items()}
        biases |= {name.replace("weight", "bias"): shape for name, shape in norms.items()}
        return norms | biases | {f"{name}.weight": shape for name, shape in linear.items()}
    shapes = norms | {"attn_output.weight": (hidden, q), "ffn_down.weight": (hidden, inner)}
    if architecture == "phi3":
        return shapes | {"attn_qkv.weight": (q + 2 * kv, hidden), "ffn_up.weight": (2 * inner, hidden)}
    shapes |= {"attn_q.weight": (q, hidden), "attn_k.weight": (kv, hidden), "attn_v.weight": (kv, hidden)}
    shapes |= {"ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden)}
    if architecture == "qwen2":
        shapes |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if architecture in ("qwen3", "gemma3"):
        shapes |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture in ("gemma2", "gemma3"):
        shapes |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    return shapes


def llama3_factors(theta: float, dim: int, factor: float, original: int) -> np.ndarray:
    """The table that converters write for Llama 3's rotary scaling, computed channel by channel."""
    factors = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)

"""The plan: the flat, versioned list of operations that computes one step of a model.

A family file (`models/llama.py`, ...) writes it once at load; every executor runs the same one. It says *what* is
computed and by which rule its bits are fixed (docs/ARCHITECTURE.md, "Plan"); *how* (phases, fusion, threads) is the
executor's own business. Knows nothing about weights' bytes, kernels or sequences.

Buffers are float32 [tokens, width] unless an operation says otherwise. Every operation reads and writes named buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

PLAN_VERSION = 1

RESERVED_OPS = ("routed_linear", "embed_input", "recurrent", "cut")
"""Reserved names: mixture of experts; embeddings as input with non-causal spans (vision, audio); recurrent state
(hybrid and linear-attention models); a pipeline cut between devices. A plan that holds one is refused by name."""

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one kind of layer. `dim` leading channels of each head are rotated, in halves:
    (x[i], x[i + dim/2]) by angle f32(position) * inv_freq[i]; cos and sin are multiplied by `attention_factor`."""

    dim: int
    inv_freq: tuple[float, ...]  # [dim / 2], float32 values
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Embed:
    """out[t] = table[token[t]] * scale (+ positions[position[t]] if given)."""

    out: str
    table: str
    scale: float = 1.0
    positions: str | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """`rms`: x / sqrt(mean(x^2) + eps) * weight. `layer`: (x - mean) / sqrt(var + eps) * weight + bias.
    Families whose weight is stored as an offset from one fold the one in at conversion."""

    out: str
    source: str
    weight: str
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """out[t, n] = sum_k source[t, k] * W[n, k] (+ bias[n]). The point decides encoding and activation type."""

    out: str
    source: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each head of a section of `buffer`, in place: columns [offset, offset + heads * head_dim)."""

    buffer: str
    offset: int
    heads: int
    head_dim: int
    weight: str  # [head_dim]
    eps: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotate each head of a section of `buffer` in place. `rope` indexes `Plan.ropes`."""

    buffer: str
    offset: int
    heads: int
    head_dim: int
    rope: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Write K and V of this step's tokens into the sequence's state (layer `layer`), then attend, causally.

    `qkv` holds q at column 0, k at `k_offset`, v at `v_offset`. `window` > 0 keeps keys with
    position > query position - window. `softcap` > 0 replaces a score s by softcap * tanh(s / softcap).
    """

    out: str  # [tokens, heads * head_dim]
    qkv: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    k_offset: int
    v_offset: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: str | None = None
    """Reserved: per-head sink logits."""


@dataclass(frozen=True, slots=True)
class Add:
    """target += source."""

    target: str
    source: str


@dataclass(frozen=True, slots=True)
class Glu:
    """out[:, j] = act(gate[j]) * up[j]. `source` is tile-interleaved: columns 64i..64i+31 hold gates 32i..32i+31 and
    columns 64i+32..64i+63 the ups of the same neurons; neurons are padded with zeros to a multiple of 32."""

    out: str
    source: str
    activation: Activation


@dataclass(frozen=True, slots=True)
class Activate:
    """out = act(source), elementwise."""

    out: str
    source: str
    activation: Activation


@dataclass(frozen=True, slots=True)
class Head:
    """logits[r] = source[logit_rows[r]] @ W.T (+ bias), float32 [rows, vocab]; `scale` multiplies, then `softcap` as in
    `Attention`. Uses the point's head planes."""

    source: str
    weight: str
    bias: str | None = None
    scale: float = 1.0
    softcap: float = 0.0


Op: TypeAlias = Embed | Norm | Linear | HeadNorm | Rope | Attention | Add | Glu | Activate | Head


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight of the plan and where it comes from.

    `matrix`: [rows, cols], stored in the artifact's encoding, the concatenation of `sources` along rows (`concat`) or
    their 32-row interleaving (`interleave`: gate and up). `table`: as matrix, read by row (embedding). `vector`:
    float32. `transform` names what is done to each source on its way in: `transpose` (GPT-2's Conv1D) or `plus_one`
    (Gemma's norms).
    `slices` optionally takes rows [a, b) of each source (Phi-3's fused checkpoints).
    """

    name: str
    kind: Literal["matrix", "table", "vector"]
    rows: int
    cols: int  # 1 for vectors
    sources: tuple[str, ...]
    layout: Literal["concat", "interleave"] = "concat"
    transform: Literal["none", "transpose", "plus_one"] = "none"
    slices: tuple[tuple[int, int], ...] = ()
    role: Literal["body", "head", "embedding", "norm", "bias"] = "body"
    shapes: tuple[tuple[int, ...], ...] = ()
    """The shape that each source must have in the checkpoint; anything else contradicts the config."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything an executor needs besides the weights' bytes and the batch."""

    version: int
    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    kv_heads: tuple[int, ...]  # per layer
    head_dims: tuple[int, ...]  # per layer
    windows: tuple[int, ...]  # per layer, 0 = all
    max_context: int
    buffers: dict[str, int]  # name -> width
    ops: tuple[Op, ...]
    weights: dict[str, WeightSpec]
    ropes: tuple[RopeSpec, ...] = ()
    extras: dict[str, str] = field(default_factory=dict)

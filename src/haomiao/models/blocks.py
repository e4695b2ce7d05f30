"""The blocks that families are put together from: a plan under construction, and the pre-norm decoder most share.

Knows operations and weights; a family's names and habits reach it as a `Decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from haomiao.errors import ModelError
from haomiao.models.plan import (
    PLAN_VERSION,
    Activation,
    Add,
    Attention,
    Embed,
    Glu,
    Head,
    HeadNorm,
    Linear,
    Norm,
    Op,
    Plan,
    Rope,
    RopeSpec,
    WeightSpec,
)

Layout = Literal["concat", "interleave"]
Transform = Literal["none", "transpose", "plus_one"]
Role = Literal["body", "head", "embedding", "norm", "bias"]
Source = tuple[str, tuple[int, ...]]


@dataclass
class PlanBuilder:
    """Collects buffers, weights and operations; `build` hands over the plan."""

    family: str
    vocab_size: int
    hidden_size: int
    max_context: int
    buffers: dict[str, int] = field(default_factory=dict)
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    ropes: list[RopeSpec] = field(default_factory=list)
    kv_heads: list[int] = field(default_factory=list)
    head_dims: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def buffer(self, name: str, width: int) -> str:
        """A float32 [tokens, width] buffer; the same name always has the same width."""
        if self.buffers.setdefault(name, width) != width:
            raise ModelError(f"buffer {name} is used with widths {self.buffers[name]} and {width}")
        return name

    def matrix(
        self,
        name: str,
        rows: int,
        cols: int,
        *sources: Source,
        layout: Layout = "concat",
        transform: Transform = "none",
        slices: tuple[tuple[int, int], ...] = (),
        role: Role = "body",
        kind: Literal["matrix", "table"] = "matrix",
    ) -> str:
        """Declare a matrix [rows, cols] (see `WeightSpec`); a source is a checkpoint's name and the shape it must have."""
        names, shapes = tuple(s[0] for s in sources), tuple(s[1] for s in sources)
        self.weights[name] = WeightSpec(name, kind, rows, cols, names, layout, transform, slices, role, shapes)
        return name

    def vector(
        self,
        name: str,
        size: int,
        *sources: Source,
        transform: Transform = "none",
        layout: Layout = "concat",
        role: Role = "norm",
    ) -> str:
        """Declare a float32 vector."""
        names, shapes = tuple(s[0] for s in sources), tuple(s[1] for s in sources)
        self.weights[name] = WeightSpec(name, "vector", size, 1, names, layout, transform, (), role, shapes)
        return name

    def rope(self, spec: RopeSpec) -> int:
        """Index of a rotation, shared by the layers that use it."""
        if spec not in self.ropes:
            self.ropes.append(spec)
        return self.ropes.index(spec)

    def layer(self, kv_heads: int, head_dim: int, window: int) -> int:
        """Declare the state of the next attention layer and return its index."""
        self.kv_heads.append(kv_heads)
        self.head_dims.append(head_dim)
        self.windows.append(window)
        return len(self.kv_heads) - 1

    def build(self) -> Plan:
        """The finished plan."""
        return Plan(
            version=PLAN_VERSION,
            family=self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=len(self.kv_heads),
            kv_heads=tuple(self.kv_heads),
            head_dims=tuple(self.head_dims),
            windows=tuple(self.windows),
            max_context=self.max_context,
            buffers=dict(self.buffers),
            ops=tuple(self.ops),
            weights=dict(self.weights),
            ropes=tuple(self.ropes),
        )


@dataclass(frozen=True)
class Decoder:
    """A pre-norm transformer decoder with RMS norms and a gated FFN, in the terms its family file fills in."""

    family: str
    vocab_size: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: Activation
    max_context: int
    tied: bool
    ropes: tuple[RopeSpec | None, ...]  # per layer; None: no positions (NoPE)
    windows: tuple[int, ...]  # per layer; 0: all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: bool = False
    """Norm weights are stored as offsets from one (Gemma)."""
    post_norms: bool = False
    """Attention's and FFN's outputs are normed before they join the residual (Gemma 2, 3)."""
    fused: bool = False
    """The checkpoint holds qkv_proj and gate_up_proj (Phi-3)."""
    scale: float | None = None
    """Of attention scores; None: head_dim ** -0.5."""
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: float = 1.0
    pre_ffn_norm: str = "post_attention_layernorm"


def padded_neurons(ffn: int) -> int:
    """FFN width padded to whole 32-row tiles, as the interleaved gate/up matrix stores it."""
    return -(-ffn // 32) * 32


def decoder_plan(model: Decoder) -> Plan:
    """The plan of a `Decoder`."""
    b = PlanBuilder(model.family, model.vocab_size, model.hidden, model.max_context)
    table = "model.embed_tokens.weight"
    embed = b.matrix(
        "embed",
        model.vocab_size,
        model.hidden,
        (table, (model.vocab_size, model.hidden)),
        kind="matrix" if model.tied else "table",
        role="head" if model.tied else "embedding",
    )
    x = b.buffer("x", model.hidden)
    b.ops.append(Embed(out=x, table=embed, scale=model.embed_scale))
    for index in range(model.layers):
        _attention_block(b, model, index)
        _ffn_block(b, model, index)
    _norm(b, model, "final_norm", "model.norm.weight", source=x, out=b.buffer("h", model.hidden))
    head = embed
    if not model.tied:
        head = b.matrix(
            "head", model.vocab_size, model.hidden, ("lm_head.weight", (model.vocab_size, model.hidden)), role="head"
        )
    b.ops.append(Head(source="h", weight=head, softcap=model.logit_softcap))
    return b.build()


def _norm(b: PlanBuilder, model: Decoder, name: str, checkpoint_name: str, *, source: str, out: str) -> None:
    transform: Transform = "plus_one" if model.norm_offset else "none"
    weight = b.vector(name, model.hidden, (checkpoint_name, (model.hidden,)), transform=transform)
    b.ops.append(Norm(out=out, source=source, weight=weight, eps=model.eps))


def _attention_block(b: PlanBuilder, model: Decoder, index: int) -> None:
    prefix, name = f"model.layers.{index}.", f"layers.{index}."
    attention = f"{prefix}self_attn."
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    width = q + 2 * kv
    h = b.buffer("h", model.hidden)
    _norm(b, model, f"{name}attention_norm", f"{prefix}input_layernorm.weight", source="x", out=h)
    projections = {"qkv_proj": width} if model.fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    sources = (((f"{attention}{p}.weight", (rows, model.hidden))) for p, rows in projections.items())
    qkv = b.matrix(f"{name}qkv", width, model.hidden, *sources)
    bias = None
    if model.qkv_bias:
        biases = ((f"{attention}{p}.bias", (rows,)) for p, rows in projections.items())
        bias = b.vector(f"{name}qkv.bias", width, *biases, role="bias")
    buffer = b.buffer("qkv", width)
    b.ops.append(Linear(out=buffer, source=h, weight=qkv, bias=bias))
    sections = ((0, model.heads, "q_norm"), (q, model.kv_heads, "k_norm"))
    if model.qk_norm:
        transform: Transform = "plus_one" if model.norm_offset else "none"
        for offset, heads, norm in sections:
            source = (f"{attention}{norm}.weight", (model.head_dim,))
            weight = b.vector(f"{name}{norm}", model.head_dim, source, transform=transform)
            b.ops.append(HeadNorm(buffer, offset, heads, model.head_dim, weight, model.eps))
    rope = model.ropes[index]
    if rope is not None:
        for offset, heads, _ in sections:
            b.ops.append(Rope(buffer, offset, heads, model.head_dim, b.rope(rope)))
    layer = b.layer(model.kv_heads, model.head_dim, model.windows[index])
    b.ops.append(
        Attention(
            out=b.buffer("attention", q),
            qkv=buffer,
            layer=layer,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            k_offset=q,
            v_offset=q + kv,
            scale=model.scale if model.scale is not None else model.head_dim**-0.5,
            window=model.windows[index],
            softcap=model.attention_softcap,
        )
    )
    out = b.matrix(f"{name}out", model.hidden, q, (f"{attention}o_proj.weight", (model.hidden, q)))
    out_bias = None
    if model.out_bias:
        out_bias = b.vector(f"{name}out.bias", model.hidden, (f"{attention}o_proj.bias", (model.hidden,)), role="bias")
    _join_residual(
        b, model, "attention", out, out_bias, f"{name}post_attention_norm", f"{prefix}post_attention_layernorm"
    )


def _ffn_block(b: PlanBuilder, model: Decoder, index: int) -> None:
    prefix, name = f"model.layers.{index}.", f"layers.{index}."
    neurons = padded_neurons(model.ffn)
    _norm(b, model, f"{name}ffn_norm", f"{prefix}{model.pre_ffn_norm}.weight", source="x", out="h")
    ffn, hidden = model.ffn, model.hidden
    sources: tuple[Source, ...]
    if model.fused:
        sources = ((f"{prefix}mlp.gate_up_proj.weight", (2 * ffn, hidden)),) * 2
    else:
        sources = tuple((f"{prefix}mlp.{p}_proj.weight", (ffn, hidden)) for p in ("gate", "up"))
    slices = ((0, ffn), (ffn, 2 * ffn)) if model.fused else ()
    gate_up = b.matrix(f"{name}gate_up", 2 * neurons, hidden, *sources, layout="interleave", slices=slices)
    bias = down_bias = None
    if model.mlp_bias:
        biases = ((f"{prefix}mlp.{p}_proj.bias", (ffn,)) for p in ("gate", "up"))
        bias = b.vector(f"{name}gate_up.bias", 2 * neurons, *biases, layout="interleave", role="bias")
        down_bias = b.vector(f"{name}down.bias", hidden, (f"{prefix}mlp.down_proj.bias", (hidden,)), role="bias")
    b.ops.append(Linear(out=b.buffer("gate_up", 2 * neurons), source="h", weight=gate_up, bias=bias))
    b.ops.append(Glu(out=b.buffer("ffn", neurons), source="gate_up", activation=model.activation))
    down = b.matrix(f"{name}down", hidden, neurons, (f"{prefix}mlp.down_proj.weight", (hidden, ffn)))
    _join_residual(b, model, "ffn", down, down_bias, f"{name}post_ffn_norm", f"{prefix}post_feedforward_layernorm")


def _join_residual(
    b: PlanBuilder, model: Decoder, source: str, weight: str, bias: str | None, norm: str, checkpoint_norm: str
) -> None:
    """x += W source (+ bias), normed before it joins where the family does so."""
    y = b.buffer("y", model.hidden)
    b.ops.append(Linear(out=y, source=source, weight=weight, bias=bias))
    if model.post_norms:
        _norm(b, model, norm, f"{checkpoint_norm}.weight", source=y, out=b.buffer("z", model.hidden))
        y = "z"
    b.ops.append(Add(target="x", source=y))

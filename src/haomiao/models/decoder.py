"""The pre-norm decoder that most families share: attention and a gated FFN, each normed before (and maybe after).

Knows operations and weights; a family's names and habits reach it as a `Decoder`, filled in by the family's file.
"""

from __future__ import annotations

from dataclasses import dataclass

from haomiao.models.blocks import PlanBuilder, Source, Transform, padded_neurons
from haomiao.models.config import ConfigReader, attention_heads, layer_count
from haomiao.models.plan import (
    Activation,
    Add,
    Attention,
    Embed,
    Glu,
    Head,
    HeadNorm,
    Linear,
    Norm,
    Plan,
    Rope,
    RopeSpec,
)
from haomiao.models.rope import rope_section, rope_spec


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
    windows: tuple[int, ...] = ()  # per layer, 0: all; none at all: no layer slides
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


def read_decoder(
    config: ConfigReader,
    family: str,
    max_context: int,
    *,
    positions: int = 2048,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    activation: str = "silu",
    theta: float = 10000.0,
) -> Decoder:
    """What every family's config says in the same words. The keywords are the family's defaults for what a config may
    leave out: the position limit, the head dimension (None: hidden / heads), and so on. Raises `ModelError`."""
    hidden, layers = config.integer("hidden_size"), layer_count(config)
    heads, kv_heads, size = attention_heads(config, hidden, head_dim)
    rope = rope_spec(
        rope_section(config),
        size,
        max_positions=config.integer("max_position_embeddings", positions),
        max_context=max_context,
        default_theta=theta,
    )
    return Decoder(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        ffn=config.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        eps=config.number("rms_norm_eps", eps, most=1.0),
        activation=config.activation("hidden_act", "hidden_activation", default=activation),
        max_context=max_context,
        tied=config.flag("tie_word_embeddings", tied),
        ropes=(rope,) * layers,
    )


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


def window_of(model: Decoder, index: int) -> int:
    """The sliding window of a layer, 0 for none."""
    return model.windows[index] if model.windows else 0


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
    layer = b.layer(model.kv_heads, model.head_dim, window_of(model, index))
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
            window=window_of(model, index),
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

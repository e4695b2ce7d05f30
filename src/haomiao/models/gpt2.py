"""GPT-2: layer norms, learned positions, biases everywhere, weights stored [in, out] (Conv1D)."""

from __future__ import annotations

from haomiao.errors import ModelError
from haomiao.models.blocks import PlanBuilder
from haomiao.models.config import MAX_SIZE, ConfigReader
from haomiao.models.plan import Activate, Activation, Add, Attention, Embed, Head, Linear, Norm, Plan


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a GPT-2 config; `max_context` is the longest sequence that will be run."""
    hidden = gpt2_size(config, "n_embd", "hidden_size")
    heads = gpt2_size(config, "n_head", "num_attention_heads", greatest=1 << 12)
    layers = gpt2_size(config, "n_layer", "num_hidden_layers", greatest=1 << 12)
    positions = gpt2_size(config, "n_positions", "max_position_embeddings", 1024)
    if hidden % heads:
        raise ModelError(f"config contradicts itself: n_embd {hidden} does not divide into {heads} heads")
    b = PlanBuilder("gpt2", config.integer("vocab_size"), hidden, max_context)
    eps = config.number("layer_norm_epsilon", 1e-5, most=1.0)
    activation = config.activation("activation_function", default="gelu_new")
    tied = config.flag("tie_word_embeddings", True)
    embed = b.matrix(
        "embed",
        b.vocab_size,
        hidden,
        ("transformer.wte.weight", (b.vocab_size, hidden)),
        kind="matrix" if tied else "table",
        role="head" if tied else "embedding",
    )
    table = b.matrix(
        "positions", positions, hidden, ("transformer.wpe.weight", (positions, hidden)), kind="table", role="embedding"
    )
    b.ops.append(Embed(out=b.buffer("x", hidden), table=embed, positions=table))
    for index in range(layers):
        _layer(b, config, index, hidden, heads, eps, activation)
    _norm(b, "final_norm", "transformer.ln_f", hidden, eps)
    head = (
        embed
        if tied
        else b.matrix("head", b.vocab_size, hidden, ("lm_head.weight", (b.vocab_size, hidden)), role="head")
    )
    b.ops.append(Head(source="h", weight=head))
    return b.build()


def gpt2_size(
    config: ConfigReader, key: str, other: str, default: int | None = None, *, greatest: int = MAX_SIZE
) -> int:
    """A size under GPT-2's own name or the one that other families use."""
    return config.integer(key if config.has(key) or not config.has(other) else other, default, greatest=greatest)


def _layer(
    b: PlanBuilder, config: ConfigReader, index: int, hidden: int, heads: int, eps: float, activation: Activation
) -> None:
    prefix, name = f"transformer.h.{index}.", f"layers.{index}."
    head_dim, ffn = hidden // heads, config.integer("n_inner", 4 * hidden)
    _norm(b, f"{name}attention_norm", f"{prefix}ln_1", hidden, eps)
    _linear(b, f"{name}qkv", f"{prefix}attn.c_attn", "h", "qkv", 3 * hidden, hidden)
    scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    if config.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= index + 1
    b.ops.append(
        Attention(
            out=b.buffer("attention", hidden),
            qkv="qkv",
            layer=b.layer(heads, head_dim, 0),
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            k_offset=hidden,
            v_offset=2 * hidden,
            scale=scale,
        )
    )
    _linear(b, f"{name}out", f"{prefix}attn.c_proj", "attention", "y", hidden, hidden)
    b.ops.append(Add(target="x", source="y"))
    _norm(b, f"{name}ffn_norm", f"{prefix}ln_2", hidden, eps)
    _linear(b, f"{name}up", f"{prefix}mlp.c_fc", "h", "up", ffn, hidden)
    b.ops.append(Activate(out=b.buffer("ffn", ffn), source="up", activation=activation))
    _linear(b, f"{name}down", f"{prefix}mlp.c_proj", "ffn", "y", hidden, ffn)
    b.ops.append(Add(target="x", source="y"))


def _norm(b: PlanBuilder, name: str, checkpoint_name: str, hidden: int, eps: float) -> None:
    weight = b.vector(name, hidden, (f"{checkpoint_name}.weight", (hidden,)))
    bias = b.vector(f"{name}.bias", hidden, (f"{checkpoint_name}.bias", (hidden,)), role="bias")
    b.ops.append(Norm(out=b.buffer("h", hidden), source="x", weight=weight, eps=eps, kind="layer", bias=bias))


def _linear(b: PlanBuilder, name: str, checkpoint_name: str, source: str, out: str, rows: int, cols: int) -> None:
    weight = b.matrix(name, rows, cols, (f"{checkpoint_name}.weight", (cols, rows)), transform="transpose")
    bias = b.vector(f"{name}.bias", rows, (f"{checkpoint_name}.bias", (rows,)), role="bias")
    b.ops.append(Linear(out=b.buffer(out, rows), source=source, weight=weight, bias=bias))

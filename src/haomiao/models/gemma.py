"""Gemma 2 and Gemma 3 (text): offset norms before and after each block, alternating sliding and full layers, capped
scores and logits (2), norms on q and k and two rotary bases (3), embeddings scaled by sqrt(hidden)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.kernels.pack import from_bf16, to_bf16
from haomiao.models.blocks import Decoder, decoder_plan
from haomiao.models.config import ConfigReader, attention_heads, layer_count
from haomiao.models.plan import Plan, RopeSpec
from haomiao.models.rope import rope_section, rope_spec


def plan_for(values: Mapping[str, Any], max_context: int) -> Plan:
    """The plan of a Gemma 2 or Gemma 3 text config."""
    config = ConfigReader(values)
    third = values.get("model_type") == "gemma3_text"
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError("bidirectional attention (embedding models) is not supported")
    hidden, layers = config.integer("hidden_size"), layer_count(config)
    sized = config if config.has("head_dim") else ConfigReader({**values, "head_dim": 256})
    heads, kv_heads, head_dim = attention_heads(sized, hidden)
    sliding = _sliding_layers(config, layers, 6 if third else 2)
    window = config.integer("sliding_window", 4096) if any(sliding) else 0
    local, full = _ropes(config, head_dim, max_context, third)
    return decoder_plan(
        Decoder(
            family="gemma3" if third else "gemma2",
            vocab_size=config.integer("vocab_size"),
            hidden=hidden,
            ffn=config.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=config.number("rms_norm_eps", 1e-6, most=1.0),
            activation=config.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
            max_context=max_context,
            tied=config.flag("tie_word_embeddings", True),
            ropes=tuple(local if is_sliding else full for is_sliding in sliding),
            windows=tuple(window if is_sliding else 0 for is_sliding in sliding),
            qkv_bias=config.flag("attention_bias", False),
            out_bias=config.flag("attention_bias", False),
            qk_norm=third,
            norm_offset=True,
            post_norms=True,
            pre_ffn_norm="pre_feedforward_layernorm",
            scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=_softcap(config, "attn_logit_softcapping", 0.0 if third else 50.0),
            logit_softcap=_softcap(config, "final_logit_softcapping", 0.0 if third else 30.0),
            embed_scale=embedding_scale(hidden, values),
        )
    )


def embedding_scale(hidden: int, values: Mapping[str, Any]) -> float:
    """sqrt(hidden), rounded to the checkpoint's own type: the models were trained with the rounded value."""
    exact = np.float32(hidden**0.5)
    dtype = values.get("dtype") or values.get("torch_dtype")
    if dtype == "bfloat16":
        return float(from_bf16(to_bf16(np.array([exact])))[0])
    return float(np.float16(exact)) if dtype == "float16" else float(exact)


def _softcap(config: ConfigReader, key: str, default: float) -> float:
    """A cap, 0 for none. A key that is there and null switches it off; an absent one means the family's default."""
    if key in config.values and config.values[key] is None:
        return 0.0
    return config.number(key, default)


def _sliding_layers(config: ConfigReader, layers: int, pattern: int) -> list[bool]:
    """Which layers slide: `layer_types`, or all but every `sliding_window_pattern`-th."""
    kinds = config.layer_types(layers)
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    pattern = config.integer("sliding_window_pattern", pattern)
    return [(index + 1) % pattern != 0 for index in range(layers)]


def _ropes(config: ConfigReader, head_dim: int, max_context: int, third: bool) -> tuple[RopeSpec, RopeSpec]:
    """(of sliding layers, of full layers)."""
    positions = config.integer("max_position_embeddings", 131072 if third else 8192)

    def spec(section: ConfigReader, theta: float) -> RopeSpec:
        return rope_spec(section, head_dim, max_positions=positions, max_context=max_context, default_theta=theta)

    if not third:
        rope = spec(rope_section(config), 10000.0)
        return rope, rope
    parameters = config.values.get("rope_parameters")
    if isinstance(parameters, Mapping) and "sliding_attention" in parameters:
        local = rope_section(config, "sliding_attention")
    elif isinstance(parameters, Mapping) and "rope_theta" in parameters and not config.has("rope_local_base_freq"):
        raise ModelError("config: rope_parameters of Gemma 3 must name sliding_attention and full_attention")
    else:  # transformers 4: scaling applies to the full layers only
        local = ConfigReader({"rope_theta": config.number("rope_local_base_freq", 10000.0)}, "rope parameters")
    return spec(local, 10000.0), spec(rope_section(config, "full_attention"), 1_000_000.0)

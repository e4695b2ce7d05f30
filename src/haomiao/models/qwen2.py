"""Qwen2, Qwen2.5 and Qwen3 (dense): biases on q, k, v (2) or norms on q and k (3), optional sliding layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haomiao.models.blocks import Decoder, decoder_plan
from haomiao.models.config import ConfigReader, attention_heads, layer_count
from haomiao.models.plan import Plan
from haomiao.models.rope import rope_section, rope_spec


def plan_for(values: Mapping[str, Any], max_context: int) -> Plan:
    """The plan of a Qwen2 or Qwen3 config."""
    config = ConfigReader(values)
    third = values.get("model_type") == "qwen3"
    hidden, layers = config.integer("hidden_size"), layer_count(config)
    # Qwen3's heads have 128 channels where the config does not say
    sized = ConfigReader({**values, "head_dim": 128}) if third and not config.has("head_dim") else config
    heads, kv_heads, head_dim = attention_heads(sized, hidden)
    rope = rope_spec(
        rope_section(config),
        head_dim,
        max_positions=config.integer("max_position_embeddings", 32768),
        max_context=max_context,
    )
    bias = config.flag("attention_bias", False) if third else True
    return decoder_plan(
        Decoder(
            family="qwen3" if third else "qwen2",
            vocab_size=config.integer("vocab_size"),
            hidden=hidden,
            ffn=config.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=config.number("rms_norm_eps", 1e-6, most=1.0),
            activation=config.activation("hidden_act", default="silu"),
            max_context=max_context,
            tied=config.flag("tie_word_embeddings", False),
            ropes=(rope,) * layers,
            windows=_windows(config, layers),
            qkv_bias=bias,
            out_bias=third and bias,
            qk_norm=third,
        )
    )


def _windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """Sliding windows: layers from `max_window_layers` on, or as `layer_types` says, if switched on at all."""
    if not config.flag("use_sliding_window", False) or not config.has("sliding_window"):
        return (0,) * layers
    window = config.integer("sliding_window")
    kinds = config.layer_types(layers)
    if kinds is None:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if index >= first else 0 for index in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

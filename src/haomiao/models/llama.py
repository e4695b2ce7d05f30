"""Llama 2 and 3, Mistral, SmolLM and SmolLM3: the plain pre-norm decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haomiao.errors import ModelError
from haomiao.models.blocks import Decoder, decoder_plan
from haomiao.models.config import ConfigReader, attention_heads, layer_count
from haomiao.models.plan import Plan
from haomiao.models.rope import rope_section, rope_spec


def plan_for(values: Mapping[str, Any], max_context: int) -> Plan:
    """The plan of a checkpoint's config; `max_context` is the longest sequence that will be run."""
    config = ConfigReader(values)
    hidden, layers = config.integer("hidden_size"), layer_count(config)
    heads, kv_heads, head_dim = attention_heads(config, hidden)
    rope = rope_spec(
        rope_section(config),
        head_dim,
        max_positions=config.integer("max_position_embeddings", 2048),
        max_context=max_context,
    )
    bias = config.flag("attention_bias", False)
    window = config.integer("sliding_window", 0, least=0) if values.get("model_type") == "mistral" else 0
    return decoder_plan(
        Decoder(
            family="llama",
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
            tied=config.flag("tie_word_embeddings", values.get("model_type") == "smollm3"),
            ropes=tuple(rope if used else None for used in _rope_layers(config, layers)),
            windows=(window,) * layers,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
        )
    )


def _rope_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers rotate: all, but for SmolLM3, whose `no_rope_layers` holds 1 where a layer does."""
    if config.values.get("model_type") != "smollm3":
        return [True] * layers
    given = config.values.get("no_rope_layers")
    if given is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(given, (list, tuple)) or len(given) != layers or any(v not in (0, 1) for v in given):
        raise ModelError(f"config: no_rope_layers must hold 0 or 1 for each of the {layers} layers")
    return [bool(v) for v in given]

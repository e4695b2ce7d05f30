"""Phi-3 and Phi-3.5 / Phi-4 mini: fused qkv and gate/up matrices, LongRoPE, partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haomiao.models.blocks import Decoder, decoder_plan
from haomiao.models.config import ConfigReader, attention_heads, layer_count
from haomiao.models.plan import Plan
from haomiao.models.rope import rope_section, rope_spec


def plan_for(values: Mapping[str, Any], max_context: int) -> Plan:
    """The plan of a Phi-3 config."""
    config = ConfigReader(values)
    hidden, layers = config.integer("hidden_size"), layer_count(config)
    heads, kv_heads, head_dim = attention_heads(config, hidden)
    rope = rope_spec(
        rope_section(config),
        head_dim,
        max_positions=config.integer("max_position_embeddings", 4096),
        max_context=max_context,
    )
    return decoder_plan(
        Decoder(
            family="phi3",
            vocab_size=config.integer("vocab_size"),
            hidden=hidden,
            ffn=config.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=config.number("rms_norm_eps", 1e-5, most=1.0),
            activation=config.activation("hidden_act", default="silu"),
            max_context=max_context,
            tied=config.flag("tie_word_embeddings", False),
            ropes=(rope,) * layers,
            windows=(config.integer("sliding_window", 0, least=0),) * layers,
            fused=True,
        )
    )

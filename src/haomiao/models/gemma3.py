"""Gemma 3 (text): as Gemma 2, with norms on q and k and a rotation of their own for the sliding layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from haomiao.errors import ModelError
from haomiao.models.config import ConfigReader
from haomiao.models.decoder import decoder_plan
from haomiao.models.gemma2 import read_gemma, sliding_layers, softcap
from haomiao.models.plan import Plan, RopeSpec
from haomiao.models.rope import rope_section, rope_spec

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""What the text config inside a multimodal checkpoint leaves out."""

POSITIONS = 131_072


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Gemma 3 text config; `max_context` is the longest sequence that will be run."""
    model = read_gemma(
        ConfigReader({**config.values, "rope_scaling": None, "rope_parameters": None}),
        "gemma3",
        max_context,
        positions=POSITIONS,
    )
    sliding = sliding_layers(config, model.layers, config.integer("sliding_window_pattern", 6))
    window = config.window(default=4096)
    local, full = _ropes(config, model.head_dim, max_context)
    return decoder_plan(
        replace(
            model,
            ropes=tuple(local if slides else full for slides in sliding),
            windows=tuple(window if slides else 0 for slides in sliding),
            qk_norm=True,
            attention_softcap=softcap(config, "attn_logit_softcapping", 0.0),
            logit_softcap=softcap(config, "final_logit_softcapping", 0.0),
        )
    )


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's config inside a multimodal one; its vision tower is left aside."""
    nested = values.get("text_config")
    if not isinstance(nested, Mapping):
        raise ModelError("config of gemma3 has no text_config")
    outer = {key: values[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if values.get(key) is not None}
    return {**DEFAULTS, **outer, **nested, "model_type": "gemma3_text", "architectures": None}


def _ropes(config: ConfigReader, head_dim: int, max_context: int) -> tuple[RopeSpec, RopeSpec]:
    """(of sliding layers, of full layers)."""
    parameters = config.section("rope_parameters")
    if parameters is None:  # transformers 4: scaling applies to the full layers only
        local = ConfigReader({"rope_theta": config.number("rope_local_base_freq", 10000.0)}, "rope parameters")
    elif parameters.has("sliding_attention") or parameters.has("full_attention"):
        local = rope_section(config, "sliding_attention")
    else:
        raise ModelError("config: rope_parameters of Gemma 3 must name sliding_attention and full_attention")

    def spec(section: ConfigReader, theta: float) -> RopeSpec:
        positions = config.integer("max_position_embeddings", POSITIONS)
        return rope_spec(section, head_dim, max_positions=positions, max_context=max_context, default_theta=theta)

    return spec(local, 10000.0), spec(rope_section(config, "full_attention"), 1_000_000.0)

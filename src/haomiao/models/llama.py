"""Llama 2 and 3, Mistral, SmolLM and SmolLM3: the plain pre-norm decoder."""

from __future__ import annotations

from dataclasses import replace

from haomiao.errors import ModelError
from haomiao.models.config import ConfigReader
from haomiao.models.decoder import decoder_plan, read_decoder
from haomiao.models.plan import Plan


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Llama config; `max_context` is the longest sequence that will be run."""
    bias = config.flag("attention_bias", False)
    return decoder_plan(
        replace(
            read_decoder(config, "llama", max_context),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
        )
    )


def plan_for_mistral(config: ConfigReader, max_context: int) -> Plan:
    """Mistral: every layer slides, by 4,096 tokens where the config does not mention a window."""
    model = read_decoder(config, "mistral", max_context, positions=131072)
    return decoder_plan(replace(model, windows=(config.window(default=4096),) * model.layers))


def plan_for_smollm3(config: ConfigReader, max_context: int) -> Plan:
    """SmolLM3: every fourth layer has no positions (NoPE)."""
    bias = config.flag("attention_bias", False)
    model = read_decoder(config, "smollm3", max_context, positions=32768, tied=True, theta=2_000_000.0)
    rotated = _rotated_layers(config, model.layers)
    window = config.window() if config.flag("use_sliding_window", False) else 0
    kinds = config.layer_types(model.layers)
    sliding = [not used for used in rotated] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return decoder_plan(
        replace(
            model,
            ropes=tuple(rope if used else None for rope, used in zip(model.ropes, rotated, strict=True)),
            windows=tuple(window if slides else 0 for slides in sliding),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
        )
    )


def _rotated_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers rotate: `no_rope_layers` holds 1 where a layer does (sic)."""
    given = config.values.get("no_rope_layers")
    if given is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(given, (list, tuple)) or len(given) < layers or any(v not in (0, 1) for v in given):
        raise ModelError(f"config: no_rope_layers must hold 0 or 1 for each of the {layers} layers")
    return [bool(v) for v in given[:layers]]

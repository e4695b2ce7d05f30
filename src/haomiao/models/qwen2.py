"""Qwen2 and Qwen2.5: biases on q, k and v, and sliding layers where they are switched on."""

from __future__ import annotations

from dataclasses import replace

from haomiao.models.config import ConfigReader
from haomiao.models.decoder import decoder_plan, read_decoder
from haomiao.models.plan import Plan


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Qwen2 config; `max_context` is the longest sequence that will be run."""
    model = read_decoder(config, "qwen2", max_context, positions=32768)
    return decoder_plan(replace(model, windows=sliding_windows(config, model.layers), qkv_bias=True))


def sliding_windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """The window of each layer: those from `max_window_layers` on slide, or those that `layer_types` names, if sliding
    is switched on at all."""
    window = config.window(default=4096) if config.flag("use_sliding_window", False) else 0
    kinds = config.layer_types(layers)
    if kinds is None:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if index >= first else 0 for index in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

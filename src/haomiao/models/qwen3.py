"""Qwen3 (dense): RMS norms on the heads of q and k, heads whose width the hidden size does not fix."""

from __future__ import annotations

from dataclasses import replace

from haomiao.models.config import ConfigReader
from haomiao.models.decoder import decoder_plan, read_decoder
from haomiao.models.plan import Plan
from haomiao.models.qwen2 import sliding_windows


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Qwen3 config; `max_context` is the longest sequence that will be run."""
    model = read_decoder(config, "qwen3", max_context, positions=32768, head_dim=128)
    bias = config.flag("attention_bias", False)
    windows = sliding_windows(config, model.layers)
    return decoder_plan(replace(model, windows=windows, qk_norm=True, qkv_bias=bias, out_bias=bias))

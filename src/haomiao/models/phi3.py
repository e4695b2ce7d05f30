"""Phi-3, Phi-3.5 mini and Phi-4 mini: fused qkv and gate/up matrices, LongRoPE, partly rotated heads.

LongRoPE has two lists of factors, for sequences within and beyond the original limit. Keys that are cached cannot be
rotated anew, so the choice is made once, by the longest sequence that will be run (`max_context`); without one, the
registry plans for the original limit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haomiao.errors import UnsupportedModelError
from haomiao.models.config import ConfigReader, shorten
from haomiao.models.decoder import decoder_plan, read_decoder
from haomiao.models.plan import Plan
from haomiao.models.rope import rope_section

ORIGINAL_POSITIONS = 4096
"""Where the config does not say."""


def plan_for(config: ConfigReader, max_context: int) -> Plan:
    """The plan of a Phi-3 config; `max_context` is the longest sequence that will be run."""
    model = read_decoder(standard(config), "phi3", max_context, positions=ORIGINAL_POSITIONS, eps=1e-5)
    return decoder_plan(replace(model, windows=(config.window(),) * model.layers, fused=True))


def standard(config: ConfigReader) -> ConfigReader:
    """The config in the words that other families use: the first checkpoints call LongRoPE `su` or `yarn`."""
    section = rope_section(config)
    kind = section.text("rope_type", "default")
    if kind not in ("default", "longrope", "su", "yarn"):
        raise UnsupportedModelError(f"rope scaling {shorten(kind)} is not supported in Phi-3")
    values: dict[str, Any] = {**config.values, "rope_scaling": None}
    values["rope_parameters"] = {**section.values, "rope_type": "default" if kind == "default" else "longrope"}
    values.setdefault("original_max_position_embeddings", ORIGINAL_POSITIONS)
    return ConfigReader(values)

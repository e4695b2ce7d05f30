"""Which family file reads which checkpoint. One entry per `model_type`; nothing is guessed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.models.config import ConfigReader, shorten
from haomiao.models.plan import Plan

FAMILIES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""model_type -> module of haomiao.models."""

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "SmolLM3ForCausalLM": "smollm3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}
"""For configs without model_type."""

REASONS: Mapping[str, str] = {
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "deepseek_v2": "mixture of experts",
    "deepseek_v3": "mixture of experts",
    "qwen3_next": "hybrid linear attention",
    "mamba": "recurrent state",
    "mamba2": "recurrent state",
    "jamba": "hybrid recurrent layers",
    "qwen2_vl": "vision input",
    "qwen2_5_vl": "vision input",
    "llava": "vision input",
    "mllama": "vision input",
    "bert": "an encoder, not a causal language model",
    "t5": "an encoder-decoder",
}
"""What is missing for well-known kinds, so that the refusal says more than a name."""


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: Gemma 3's multimodal checkpoints nest it."""
    if isinstance(values, Mapping) and values.get("model_type") == "gemma3":
        nested = values.get("text_config")
        if not isinstance(nested, Mapping):
            raise ModelError("config of gemma3 has no text_config")
        return {"model_type": "gemma3_text", "vocab_size": 262208, **nested}
    return values


def model_type(values: Mapping[str, Any]) -> str:
    """The checkpoint's kind. Raises `UnsupportedModelError` by name."""
    config = ConfigReader(values)
    kind = values.get("model_type")
    if kind is None:
        architectures = values.get("architectures")
        known = (
            [ARCHITECTURES[a] for a in architectures if isinstance(a, str) and a in ARCHITECTURES]
            if isinstance(architectures, (list, tuple))
            else []
        )
        if not known:
            raise ModelError("config names neither a model_type nor an architecture that is known")
        return known[0]
    kind = config.text("model_type")
    if kind not in FAMILIES:
        reason = f" ({REASONS[kind]})" if kind in REASONS else ""
        raise UnsupportedModelError(
            f"models of type {shorten(kind)} are not supported{reason}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return kind


def position_limit(values: Mapping[str, Any]) -> int:
    """The longest sequence that the checkpoint is made for."""
    config = ConfigReader(text_config(values))
    key = "n_positions" if model_type(config.values) == "gpt2" else "max_position_embeddings"
    return config.integer(key, 2048)


def plan_for(values: Mapping[str, Any], max_context: int | None = None) -> Plan:
    """The plan of a checkpoint's config.

    `max_context` (default: the checkpoint's own limit) is the longest sequence that will be run. Raises `ModelError`
    for a config that contradicts itself, `UnsupportedModelError` for kinds that are not supported.
    """
    values = text_config(values)
    kind = model_type(values)
    limit = position_limit(values)
    context = limit if max_context is None else max_context
    if not 1 <= context <= limit:
        raise ModelError(f"a context of {context} tokens was asked for; the model is made for 1 to {limit}")
    module = importlib.import_module(f"haomiao.models.{FAMILIES[kind]}")
    plan: Plan = module.plan_for({**values, "model_type": kind}, context)
    return plan

"""Which family file reads which checkpoint. One entry per `model_type`; nothing is guessed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from haomiao.errors import InputError, ModelError, UnsupportedModelError
from haomiao.models.config import MAX_SIZE, ConfigReader, shorten
from haomiao.models.gemma3 import text_config
from haomiao.models.gpt2 import gpt2_size
from haomiao.models.phi3 import standard
from haomiao.models.plan import Plan
from haomiao.models.rope import rope_section

FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "plan_for"),
    "mistral": ("llama", "plan_for_mistral"),
    "smollm3": ("llama", "plan_for_smollm3"),
    "qwen2": ("qwen2", "plan_for"),
    "qwen3": ("qwen3", "plan_for"),
    "gemma2": ("gemma2", "plan_for"),
    "gemma3_text": ("gemma3", "plan_for"),
    "phi3": ("phi3", "plan_for"),
    "gpt2": ("gpt2", "plan_for"),
}
"""model_type -> (module of haomiao.models, function)."""

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
"""architecture -> model_type: what a checkpoint must call itself, and the way to read configs without model_type."""

KINDS: Sequence[tuple[str, Sequence[str]]] = (
    ("a mixture of experts", ("moe", "mixtral", "deepseek", "gpt_oss", "dbrx", "llama4", "minimax", "jetmoe", "olmoe")),
    (
        "a hybrid or recurrent model",
        ("mamba", "jamba", "bamba", "zamba", "rwkv", "next", "recurrent", "lfm2", "hybrid"),
    ),
    (
        "a multimodal model",
        ("vl", "llava", "mllama", "vision", "omni", "audio", "whisper", "paligemma", "gemma3n", "pix"),
    ),
    ("an encoder", ("bert", "deberta", "electra")),
    ("an encoder-decoder", ("t5", "bart", "pegasus", "marian")),
)
"""What well-known kinds are, by a part of their name, so that a refusal says more than the name."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def plan_for(values: Mapping[str, Any], max_context: int | None = None) -> Plan:
    """The plan of a checkpoint's config.

    `max_context` is the longest sequence that will be run (default: `default_context`). Raises `ModelError` for a
    config that contradicts itself, `UnsupportedModelError` for kinds that are not supported, `InputError` for a
    context that the model is not made for.
    """
    kind, config = identify(values)
    limit = _limit(kind, config)
    context = _default_context(kind, config) if max_context is None else max_context
    if not 1 <= context <= limit:
        raise InputError(
            f"a context of {shorten(context)} tokens was asked for; the model is made for 1 to {limit}",
            param="max_context",
        )
    module, function = FAMILIES[kind]
    plan: Plan = getattr(importlib.import_module(f"haomiao.models.{module}"), function)(config, context)
    return plan


def position_limit(values: Mapping[str, Any]) -> int:
    """The longest sequence that the checkpoint is made for."""
    return _limit(*identify(values))


def default_context(values: Mapping[str, Any]) -> int:
    """The longest sequence that is run unless more is asked for: the limit, but for LongRoPE the original limit, up to
    which the checkpoint answers as if it had never been extended (the factors are chosen once, see `phi3`)."""
    return _default_context(*identify(values))


def identify(values: Mapping[str, Any]) -> tuple[str, ConfigReader]:
    """(model_type, the text model's config). Raises `ModelError`, and `UnsupportedModelError` by name."""
    config = ConfigReader(values)
    if config.text("model_type", "") == "gemma3":
        config = ConfigReader(text_config(values))
    architectures = _architectures(config)
    named = next((ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES), "")
    kind = config.text("model_type", named)
    if not kind:
        raise ModelError("config names neither a model_type nor an architecture that is known")
    if kind not in FAMILIES:
        reason = next((f" ({what})" for what, parts in KINDS if any(part in kind for part in parts)), "")
        raise UnsupportedModelError(
            f"models of type {shorten(kind)}{reason} are not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    if architectures and all(ARCHITECTURES.get(name) != kind for name in architectures):
        raise UnsupportedModelError(
            f"{shorten(architectures[0])} is not a causal language model of type {kind}; nothing else is supported"
        )
    _refuse_experts(config)
    return kind, config


def _architectures(config: ConfigReader) -> list[str]:
    given = config.values.get("architectures") or []
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise ModelError(f"config: architectures must be a list of names, not {shorten(given)}")
    return list(given)


def _refuse_experts(config: ConfigReader) -> None:
    """Refuse what a supported model_type must not hold: experts, an encoder, a vision tower."""
    for key in EXPERTS:
        if config.has(key) and config.integer(key, least=0) > 1:
            raise UnsupportedModelError(f"mixtures of experts are not supported (config: {key})")
    if config.flag("is_encoder_decoder", False) or config.flag("add_cross_attention", False):
        raise UnsupportedModelError("encoder-decoder models are not supported")
    for key in ("vision_config", "audio_config"):
        if config.has(key):
            raise UnsupportedModelError(f"multimodal models are not supported (config: {key})")


def _limit(kind: str, config: ConfigReader) -> int:
    if kind == "gpt2":
        return gpt2_size(config, "n_positions", "max_position_embeddings", 1024)
    limit = config.integer("max_position_embeddings", 2048)
    section = rope_section(config, "full_attention")
    if section.text("rope_type", "default") == "yarn" and section.has("factor"):
        # checkpoints whose YaRN is switched on by hand (Qwen2.5) leave the unextended limit standing
        original = section.integer("original_max_position_embeddings", limit)
        return max(limit, min(int(original * section.number("factor", most=1e6)), MAX_SIZE))
    return limit


def _default_context(kind: str, config: ConfigReader) -> int:
    limit = _limit(kind, config)
    section = rope_section(standard(config) if kind == "phi3" else config, "full_attention")
    if section.text("rope_type", "default") in ("longrope", "su"):
        return min(limit, section.integer("original_max_position_embeddings", limit))
    return limit

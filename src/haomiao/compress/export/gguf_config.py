"""What llama.cpp must be told about a model: the inverse of `load/gguf/config`. Knows plans and words, no weights.

Sizes are taken from the plan, which was checked, rather than from the config, which may leave them out. What the format
has no words for is found by reading the file back: `agrees` compares the plan that it gives with the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from haomiao.compress.export.gguf_file import Value
from haomiao.errors import UnsupportedModelError
from haomiao.models.config import ConfigReader
from haomiao.models.phi3 import standard
from haomiao.models.plan import Attention, Embed, Head, Norm, Plan
from haomiao.models.registry import identify, position_limit
from haomiao.models.rope import rope_section
from haomiao.types import F32

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""model_type -> `general.architecture`."""
BIASES: Mapping[str, Sequence[str]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
}
"""The biases that llama.cpp reads, by architecture; none in the others."""
QUANTIZATION_VERSION = 2
ROPE_TOLERANCE = 1e-5
EMBED_TOLERANCE = 2.0**-8
"""Gemma's factor of the embedding is rounded to the checkpoint's own type; llama.cpp takes it as float32."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """`general.architecture`. Raises `UnsupportedModelError` for families that GGUF export does not know."""
    kind, _ = identify(config)
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"models of type {kind} cannot be exported to GGUF; these can: {known}")
    return ARCHITECTURES[kind]


def describe(config: Mapping[str, Any], plan: Plan) -> tuple[dict[str, Value], dict[str, F32]]:
    """The metadata of the model's shape and arithmetic, and the rope tables that are tensors in a GGUF file."""
    architecture = architecture_of(config)
    kind, reader = identify(config)
    biases = [name for spec in plan.weights.values() if spec.role == "bias" for name in spec.sources]
    for name in biases:
        if name.split(".")[-2] not in BIASES.get(architecture, ()):
            raise UnsupportedModelError(f"llama.cpp reads no {name} in a model of architecture {architecture}")
    attentions = [op for op in plan.ops if isinstance(op, Attention)]
    found: dict[str, Value] = {
        "context_length": position_limit(config),
        "embedding_length": plan.hidden_size,
        "block_count": plan.layers,
        "feed_forward_length": _each(_neurons(plan)),
        "attention.head_count": _each([op.heads for op in attentions]),
        "attention.head_count_kv": _each([op.kv_heads for op in attentions]),
        "attention.key_length": attentions[0].head_dim,
        "attention.value_length": attentions[0].head_dim,
        "attention.layer_norm_rms_epsilon": next(op.eps for op in plan.ops if isinstance(op, Norm)),
        "rope.dimension_count": plan.ropes[0].dim,
        "vocab_size": plan.vocab_size,
    }
    if window := max(plan.windows, default=0):
        found["attention.sliding_window"] = window
    head = next(op for op in plan.ops if isinstance(op, Head))
    if attentions[0].softcap:
        found["attn_logit_softcapping"] = attentions[0].softcap
    if head.softcap:
        found["final_logit_softcapping"] = head.softcap
    section = rope_section(standard(reader) if kind == "phi3" else reader, "full_attention")
    default_theta = 10000.0
    if kind == "gemma3_text":
        default_theta = 1_000_000.0
        found["rope.freq_base_swa"] = _local_theta(reader)
    theta = section.number("rope_theta", default_theta)
    found["rope.freq_base"] = theta
    scaling, tables = _scaling(section, plan, theta)
    values = {f"{architecture}.{key}": value for key, value in (found | scaling).items()}
    return {"general.architecture": architecture} | values, tables


def agrees(plan: Plan, again: Plan) -> str | None:
    """What differs between the model and the one that the file describes, or None."""
    if (plan.layers, plan.hidden_size, plan.vocab_size) != (again.layers, again.hidden_size, again.vocab_size):
        return "sizes"
    for ours, theirs in zip(plan.ops, again.ops, strict=False):
        if isinstance(ours, Embed) and isinstance(theirs, Embed):
            if not np.isclose(ours.scale, theirs.scale, rtol=EMBED_TOLERANCE):
                return "the factor of the embedding"
        elif ours != theirs:
            return type(ours).__name__.lower()
    if len(plan.ops) != len(again.ops) or plan.weights.keys() != again.weights.keys():
        return "the list of operations"
    for mine, other in zip(plan.ropes, again.ropes, strict=True):
        same = mine.dim == other.dim and np.isclose(mine.attention_factor, other.attention_factor, rtol=ROPE_TOLERANCE)
        if not same or not np.allclose(mine.inv_freq, other.inv_freq, rtol=ROPE_TOLERANCE):
            return "rope"
    return None


def _each(values: list[int]) -> Value:
    """One number where the layers agree, else an array."""
    return values[0] if len(set(values)) == 1 else np.array(values, np.int32)


def _neurons(plan: Plan) -> list[int]:
    """The FFN's width in every layer, without padding."""
    return [plan.weights[f"layers.{index}.down"].shapes[0][1] for index in range(plan.layers)]


def _local_theta(reader: ConfigReader) -> float:
    parameters = reader.section("rope_parameters")
    if parameters is None:
        return reader.number("rope_local_base_freq", 10000.0)
    return rope_section(reader, "sliding_attention").number("rope_theta", 10000.0)


def _scaling(section: ConfigReader, plan: Plan, theta: float) -> tuple[dict[str, Value], dict[str, F32]]:
    """Keys and tables of the rope scaling."""
    kind = section.text("rope_type", "default")
    prefix = "rope.scaling."
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {prefix + "type": "linear", prefix + "factor": section.number("factor")}, {}
    rope = plan.ropes[-1]
    if kind == "llama3":
        powers = np.float64(theta) ** (-np.arange(0, rope.dim, 2) / rope.dim)
        return {}, {"rope_freqs.weight": (powers / np.array(rope.inv_freq)).astype(np.float32)}
    original: dict[str, Value] = {}
    if section.has("original_max_position_embeddings"):
        original[prefix + "original_context_length"] = section.integer("original_max_position_embeddings")
    if kind == "yarn":
        factor = section.number("factor")
        found: dict[str, Value] = {prefix + "type": "yarn", prefix + "factor": factor, **original}
        for name in ("beta_fast", "beta_slow"):
            if section.has(name):
                found[f"{prefix}yarn_{name}"] = section.number(name)
        usual = 0.1 * float(np.log(factor)) + 1.0
        if not np.isclose(rope.attention_factor, usual, rtol=1e-6):  # llama.cpp multiplies the usual one
            found[prefix + "attn_factor"] = rope.attention_factor / usual
        return found, {}
    if kind in ("longrope", "su"):
        count = rope.dim // 2
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        tables = {name: np.array(section.numbers(key, count), np.float32) for name, key in names.items()}
        return {**original, prefix + "attn_factor": rope.attention_factor}, tables
    raise UnsupportedModelError(f"rope scaling {kind[:32]} cannot be exported to GGUF")

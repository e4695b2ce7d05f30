"""GGUF tensor names -> Hugging Face names and back, per architecture. Knows names only.

The GGUF side is ggml-org/ggml, docs/gguf.md ("Standardized tensor names"); the other side is what each family's
checkpoints on the hub use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

BLOCK = re.compile(r"blk\.(\d{1,4})\.([a-z0-9_]+)\.(weight|bias)")
TOP = re.compile(r"([a-z0-9_]+)\.(weight|bias)")

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tables that become part of the config (`config.rope_scaling`)."""

_DECODER_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_FEED_FORWARD, "ffn_norm": "post_attention_layernorm"}
_GEMMA = {
    **_ATTENTION,
    **_FEED_FORWARD,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",  # gate and up, one after the other
    "ffn_down": "mlp.down_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

TABLES: Mapping[str, tuple[Mapping[str, str], str, Mapping[str, str]]] = {
    "llama": (_DECODER_TOP, "model.layers", _LLAMA),
    "qwen2": (_DECODER_TOP, "model.layers", _LLAMA),
    "qwen3": (_DECODER_TOP, "model.layers", _LLAMA),
    "gemma2": (_DECODER_TOP, "model.layers", _GEMMA),
    "gemma3": (_DECODER_TOP, "model.layers", _GEMMA),
    "phi3": (_DECODER_TOP, "model.layers", _PHI3),
    "gpt2": (_GPT2_TOP, "transformer.h", _GPT2),
}
"""Architecture -> (names outside the layers, prefix of the layers, names inside a layer)."""


def translate(architecture: str, name: str) -> str | None:
    """The Hugging Face name of a tensor of a known architecture, or None for a name that it does not have."""
    top, prefix, inside = TABLES[architecture]
    if match := BLOCK.fullmatch(name):
        layer, middle, kind = match.groups()
        if middle not in inside or str(int(layer)) != layer:
            return None
        return f"{prefix}.{layer}.{inside[middle]}.{kind}"
    if (match := TOP.fullmatch(name)) and match[1] in top:
        return f"{top[match[1]]}.{match[2]}"
    return None


def untranslate(architecture: str, name: str) -> str | None:
    """The GGUF name of a tensor that a checkpoint calls `name`: the inverse of `translate`, None likewise."""
    top, prefix, inside = TABLES[architecture]
    middle, dot, kind = name.rpartition(".")
    if not dot or kind not in ("weight", "bias"):
        return None
    if found := _key_of(top, middle):
        return f"{found}.{kind}"
    layer, dot, rest = middle.removeprefix(prefix + ".").partition(".")
    if not (middle.startswith(prefix + ".") and layer.isdecimal()) or not (found := _key_of(inside, rest)):
        return None
    return f"blk.{layer}.{found}.{kind}"


def _key_of(table: Mapping[str, str], value: str) -> str | None:
    return next((key for key, name in table.items() if name == value), None)

"""Tiny checkpoints as float32 GGUF files, made with the `gguf` package as llama.cpp's converter would.

What the converter does to a checkpoint (rotary rows of `llama` in pairs, Gemma's norms plus one, GPT-2's Conv1D
transposed, LongRoPE and Llama 3 factors as tensors) is written here a second time, from its effect on the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haomiao.models.registry import plan_for
from haomiao.types import F32
from tests.golden.cases import Case
from tests.golden.checkpoint import random_checkpoint

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def gguf_name(name: str, gemma: bool) -> str:
    """The name of a tensor in the file."""
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").removeprefix("transformer.h.").split(".", 1)
    return f"blk.{layer}.{(GEMMA_NORMS if gemma else {}).get(rest) or LAYER[rest]}.{kind}"


def in_pairs(rows: F32, heads: int) -> F32:
    """Rotary halves (i, i + dim / 2) of each head become neighbours."""
    shape = rows.shape
    return np.ascontiguousarray(rows.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape))


def as_stored(name: str, tensor: F32, architecture: str, config: Mapping[str, Any]) -> F32:
    """A tensor as the converter leaves it."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return in_pairs(tensor, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    if architecture == "gpt2" and ".h." in name and tensor.ndim == 2:
        return np.ascontiguousarray(tensor.T)
    return tensor


def write_gguf(case: Case, path: Path) -> Path:
    """The case's checkpoint as a GGUF file."""
    import gguf

    config = case.config
    architecture = ARCHITECTURES[case.family]
    writer = gguf.GGUFWriter(str(path), architecture)
    if architecture == "gpt2":
        write_gpt2(writer, config)
    else:
        write_decoder(writer, config)
        write_rope(writer, case)
    for key in ("bos", "eos"):
        getattr(writer, f"add_{key}_token_id")(config[f"{key}_token_id"])
    writer.add_token_list([f"token{i}" for i in range(config["vocab_size"])])
    for name, tensor in random_checkpoint(config, case.seed).items():
        stored = as_stored(name, tensor, architecture, config)
        writer.add_tensor(gguf_name(name, architecture.startswith("gemma")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gpt2(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def write_decoder(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            getattr(writer, f"add_{key}")(config[key])


def write_rope(writer: Any, case: Case) -> None:
    """Theta and scaling; what GGUF holds as tensors is taken from the plan's own frequencies."""
    import gguf

    config = case.config
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    default = 1_000_000.0 if case.family == "gemma3_text" else 10000.0
    theta = section.get("rope_theta", config.get("rope_theta", default))
    writer.add_rope_freq_base(theta)
    kind = section.get("rope_type", section.get("type"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(section["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(section["factor"])
        writer.add_rope_scaling_orig_ctx_len(section["original_max_position_embeddings"])
    elif kind == "llama3":
        rope = plan_for(config).ropes[0]
        plain = theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
        writer.add_tensor("rope_freqs.weight", (plain / np.array(rope.inv_freq)).astype(np.float32))
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(section[f"{length}_factor"], np.float32))

"""Writes a Llama-architecture Hugging Face directory as a float32 GGUF file, with its byte-level BPE vocabulary.

For tests and benchmarks only: the `gguf` package does the writing, so that our own reader is checked against another
hand. Only what the trained small model and the real-shape checkpoints need is covered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def interleaved_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs (i, i + dim/2) become neighbours, as the `llama` architecture of GGUF stores q and k."""
    rows, cols = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols))


def target_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def write_gguf(directory: Path, out: Path, tensors: dict[str, np.ndarray], *, pre: str = "qwen2") -> Path:
    """`tensors`: float32 by Hugging Face name. `directory` holds config.json and (optionally) tokenizer.json."""
    import gguf

    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    arch = {"llama": "llama", "qwen2": "qwen2"}[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(str(out), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    write_vocabulary(writer, directory / "tokenizer.json", config, pre)
    for name, weight in tensors.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        data = np.asarray(weight, dtype=np.float32)
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            data = interleaved_rows(data, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(target_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def write_vocabulary(writer: Any, path: Path, config: dict[str, Any], pre: str) -> None:
    import gguf

    vocab_size = config["vocab_size"]
    tokens = [f"[unused{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    merges: list[str] = []
    if path.exists():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        for token, index in tokenizer["model"]["vocab"].items():
            tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
        for added in tokenizer["added_tokens"]:
            tokens[added["id"]], types[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if config.get(key) is not None:
            add(config[key])
    writer.add_add_bos_token(False)

"""GGUF metadata -> the config that the same model has on the Hugging Face hub. Knows numbers and words, no weights.

What GGUF leaves out (llama.cpp keeps it in code) is filled in as llama.cpp does: Gemma's layer patterns and query
scale, and Llama 3's rotary scaling, which the file holds as a table of factors instead of its parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.gguf.reader import GgufFile
from haomiao.types import F32

MODEL_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Control tokens that end an answer; GGUF names one or two of them, checkpoints on the hub list all."""
CONTROL = 3  # tokenizer.ggml.token_type
LLAMA3_CONTEXTS = (8192,)
LLAMA3_FREQUENCY_FACTORS = (1.0, 4.0)
MAX_LAYERS = 4096


def translate_config(file: GgufFile, rope_tables: dict[str, F32], tied: bool) -> dict[str, Any]:
    """config.json of the model in `file`. `rope_tables` holds the `names.ROPE_TENSORS` that it has; `tied` says that
    it has no head of its own. Raises `ModelError`, `UnsupportedModelError`."""
    architecture = file.text("general.architecture")
    if architecture not in MODEL_TYPES:
        raise UnsupportedModelError(f"{file.path}: architecture '{architecture[:64]}' is not supported")
    if file.integer(f"{architecture}.expert_count", 0, least=0) > 0:
        raise UnsupportedModelError(f"{file.path}: mixtures of experts are not supported")
    model_type, name = MODEL_TYPES[architecture]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [name], "tie_word_embeddings": tied}
    config["vocab_size"] = _vocab_size(file)
    config.update(_gpt2(file) if architecture == "gpt2" else _decoder(file, architecture))
    if architecture in ("gemma2", "gemma3"):
        config.update(_gemma(file, architecture, config))
    elif architecture == "qwen2":
        config["use_sliding_window"] = False
    elif architecture == "phi3":
        config.update(_phi3(file, config))
    elif architecture == "llama":
        config.update(_llama(file))
    if architecture != "gpt2":
        config["rope_scaling"] = _rope_scaling(file, architecture, config, rope_tables)
    tokens = _special_tokens(file)
    config.update({key: value for key, value in tokens.items() if key != "eos_token_id"})
    if "eos_token_id" in tokens:
        config["eos_token_id"] = tokens["eos_token_id"][0]
    config["generation_config"] = tokens
    return config


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path}: no token_embd.weight with two dimensions")
    return embedding.shape[0]


def _decoder(file: GgufFile, architecture: str) -> dict[str, Any]:
    def key(suffix: str) -> str:
        return f"{architecture}.{suffix}"

    hidden, heads = file.integer(key("embedding_length")), file.integer(key("attention.head_count"))
    head_dim = file.integer(key("attention.key_length"), max(1, hidden // heads))
    if file.integer(key("attention.value_length"), head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path}: keys and values of different length are not supported")
    rotated = file.integer(key("rope.dimension_count"), head_dim)
    if rotated > head_dim:
        raise ModelError(f"{file.path}: {rotated} rotated channels in heads of {head_dim}")
    config = {
        "hidden_size": hidden,
        "intermediate_size": file.integer(key("feed_forward_length")),
        "num_hidden_layers": file.integer(key("block_count"), most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(key("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer(key("context_length")),
        "rms_norm_eps": file.number(key("attention.layer_norm_rms_epsilon")),
        "rope_theta": file.number(key("rope.freq_base"), 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    return config


def _llama(file: GgufFile) -> dict[str, Any]:
    window = file.integer("llama.attention.sliding_window", 0, least=0)
    if not window:
        return {}
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _gemma(file: GgufFile, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    largest = layers == (46 if architecture == "gemma2" else 62)  # the 27B models scale queries differently
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    special: dict[str, Any] = {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
    if architecture == "gemma2":
        period, default = 2, 4096
        special["attn_logit_softcapping"] = file.number("gemma2.attn_logit_softcapping", 50.0)
        special["final_logit_softcapping"] = file.number("gemma2.final_logit_softcapping", 30.0)
    else:
        period, default = 6, 0
        special["rope_local_base_freq"] = file.number("gemma3.rope.freq_base_swa", 10000.0)
        special["sliding_window_pattern"] = period
        if "gemma3.final_logit_softcapping" in file:
            special["final_logit_softcapping"] = file.number("gemma3.final_logit_softcapping")
    window = file.integer(f"{architecture}.attention.sliding_window", default, least=0)
    special["sliding_window"] = window or None
    special["layer_types"] = [
        "sliding_attention" if window and (layer + 1) % period else "full_attention" for layer in range(layers)
    ]
    return special


def _phi3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    original = file.integer("phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
    window = file.integer("phi3.attention.sliding_window", 0, least=0)
    return {"original_max_position_embeddings": original, "sliding_window": window or None}


def _gpt2(file: GgufFile) -> dict[str, Any]:
    return {
        "n_embd": file.integer("gpt2.embedding_length"),
        "n_layer": file.integer("gpt2.block_count", most=MAX_LAYERS),
        "n_head": file.integer("gpt2.attention.head_count"),
        "n_inner": file.integer("gpt2.feed_forward_length"),
        "n_positions": file.integer("gpt2.context_length"),
        "layer_norm_epsilon": file.number("gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


# ---- rotary scaling -----------------------------------------------------------------------------------------------


def _rope_scaling(
    file: GgufFile, architecture: str, config: dict[str, Any], tables: dict[str, F32]
) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling."
    context = config["max_position_embeddings"]
    long, short = tables.get("rope_factors_long.weight"), tables.get("rope_factors_short.weight")
    if long is not None and short is not None:
        scaling = {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        scaling["original_max_position_embeddings"] = file.integer(prefix + "original_context_length", context)
        if prefix + "attn_factor" in file:
            scaling["attention_factor"] = file.number(prefix + "attn_factor")
        return scaling
    if "rope_freqs.weight" in tables:
        return _from_factors(tables["rope_freqs.weight"], config)
    kind = file.text(prefix + "type", "none")
    if kind == "none":
        return None
    factor = file.number(prefix + "factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(file, prefix, factor, context)
    raise UnsupportedModelError(f"{file.path}: rope scaling '{kind[:32]}' is not supported")


def _yarn(file: GgufFile, prefix: str, factor: float, context: int) -> dict[str, Any]:
    original = file.integer(prefix + "original_context_length", context)
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if prefix + key in file:
            scaling[name] = file.number(prefix + key)
    multiplier = file.number(prefix + "attn_factor", 1.0)
    if multiplier != 1.0 and factor > 1.0:  # llama.cpp multiplies what YaRN's own formula gives
        scaling["attention_factor"] = multiplier * (0.1 * math.log(factor) + 1.0)
    return scaling


def _from_factors(factors: F32, config: dict[str, Any]) -> dict[str, Any] | None:
    """Divisors of the inverse frequencies: Llama 3's parameters if they explain the table, else the table itself."""
    if np.all(factors == 1):
        return None
    largest = float(factors.max())
    inverse = config["rope_theta"] ** (-np.arange(len(factors), dtype=np.float64) / len(factors))
    low, high = LLAMA3_FREQUENCY_FACTORS
    for original in LLAMA3_CONTEXTS:
        turns = original * inverse / (2 * math.pi)  # of each channel over the original context
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    table = factors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": table,
        "short_factor": table,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


# ---- special tokens -----------------------------------------------------------------------------------------------


def _special_tokens(file: GgufFile) -> dict[str, Any]:
    """generation_config: every token that ends an answer, the file's own choice first."""
    count = file.count("tokenizer.ggml.tokens")
    found: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if f"tokenizer.ggml.{key}" in file:
            found[name] = file.integer(f"tokenizer.ggml.{key}", least=0, most=max(0, count - 1))
    ends: list[int] = []
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        if f"tokenizer.ggml.{key}" in file:
            ends.append(file.integer(f"tokenizer.ggml.{key}", least=0, most=max(0, count - 1)))
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(kinds, tuple) and len(kinds) == count and CONTROL in kinds:
        tokens = file.strings("tokenizer.ggml.tokens")
        ends += [i for i, kind in enumerate(kinds) if kind == CONTROL and tokens[i] in END_OF_TURN]
    if ends:
        found["eos_token_id"] = list(dict.fromkeys(ends))
    return found

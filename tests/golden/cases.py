"""The tiny models whose answers tests/golden keeps: configs of every family, in both spellings of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint. `config` is what its config.json would say."""

    name: str
    config: dict[str, Any]
    max_context: int | None = None
    """Handed to `plan_for`; LongRoPE chooses its factors by it."""
    seed: int = 1
    prompt_tokens: int = 24
    greedy_tokens: int = 64
    skips: frozenset[str] = field(default_factory=frozenset)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])


def case(name: str, model_type: str, *, max_context: int | None = None, seed: int = 1, **changes: Any) -> Case:
    """A case that differs from `BASE` by `changes`."""
    return Case(name, {**BASE, "model_type": model_type, **changes}, max_context, seed)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SHORT_FACTORS = [1.0, 1.1, 1.2, 1.4, 1.7, 2.0]
LONG_FACTORS = [1.0, 1.5, 2.5, 4.0, 8.0, 16.0]


def _llama() -> list[Case]:
    return [
        case("llama-gqa-tied", "llama", tie_word_embeddings=True),
        case(
            "llama-odd-bias",
            "llama",
            hidden_size=40,
            intermediate_size=100,
            num_attention_heads=5,
            num_key_value_heads=5,
            attention_bias=True,
            mlp_bias=True,
            vocab_size=101,
        ),
        case("llama-mqa-head24", "llama", head_dim=24, num_key_value_heads=1, rope_theta=500000.0, seed=2),
        case("llama3-rope", "llama", rope_theta=500000.0, rope_scaling=LLAMA3, head_dim=32),
        case("llama3-rope-v5", "llama", rope_parameters={**LLAMA3, "rope_theta": 10000.0}),
        case("llama-linear", "llama", rope_scaling={"type": "linear", "factor": 4.0}),
        case("llama-dynamic", "llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
        case("llama-yarn", "llama", rope_scaling={"rope_type": "yarn", **YARN}),
        case(
            "llama-yarn-mscale",
            "llama",
            rope_parameters={
                "rope_type": "yarn",
                **YARN,
                "rope_theta": 50000.0,
                "mscale": 0.8,
                "mscale_all_dim": 0.4,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
            head_dim=32,
        ),
        case("llama-gelu", "llama", hidden_act="gelu"),
    ]


def _mistral() -> list[Case]:
    return [
        case("mistral-window", "mistral", sliding_window=20),
        case("mistral-window-head24", "mistral", sliding_window=33, head_dim=24),
        case("mistral-full", "mistral", sliding_window=None, num_key_value_heads=4, seed=2),
    ]


def _smollm3() -> list[Case]:
    return [
        case("smollm3-nope", "smollm3", num_hidden_layers=4, no_rope_layer_interval=2, tie_word_embeddings=True),
        case("smollm3-list", "smollm3", no_rope_layers=[0, 1], attention_bias=True),
    ]


def _qwen() -> list[Case]:
    return [
        case("qwen2-tied", "qwen2", tie_word_embeddings=True),
        case("qwen2-odd", "qwen2", hidden_size=40, num_attention_heads=5, num_key_value_heads=1, intermediate_size=70),
        case(
            "qwen2-sliding",
            "qwen2",
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=20,
            max_window_layers=1,
        ),
        case("qwen2-yarn", "qwen2", seed=3, rope_scaling={"type": "yarn", **YARN}, rope_theta=1000000.0),
        case("qwen3-head32", "qwen3", head_dim=32, seed=2),
        case("qwen3-bias-tied", "qwen3", head_dim=16, attention_bias=True, tie_word_embeddings=True, seed=2),
        case(
            "qwen3-layer-types",
            "qwen3",
            head_dim=24,
            use_sliding_window=True,
            sliding_window=18,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ]


def _gemma() -> list[Case]:
    gemma: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 16, "intermediate_size": 80}
    return [
        case("gemma2-window", "gemma2", **gemma, sliding_window=20, query_pre_attn_scalar=24),
        case(
            "gemma2-plain",
            "gemma2",
            **{**gemma, "head_dim": 24},
            hidden_size=48,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
            query_pre_attn_scalar=16,
            attention_bias=True,
            sliding_window=300,
        ),
        case("gemma2-caps", "gemma2", **gemma, final_logit_softcapping=4.0, attn_logit_softcapping=1.5),
        case(
            "gemma3-v4",
            "gemma3_text",
            **gemma,
            num_hidden_layers=3,
            sliding_window=20,
            sliding_window_pattern=3,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            query_pre_attn_scalar=16,
        ),
        case(
            "gemma3-v5",
            "gemma3_text",
            **{**gemma, "head_dim": 32},
            hidden_size=40,
            sliding_window=24,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
            query_pre_attn_scalar=32,
            final_logit_softcapping=5.0,
        ),
        case("gemma3-default-pattern", "gemma3_text", **gemma, num_hidden_layers=7, sliding_window=16, seed=2),
    ]


def _phi3() -> list[Case]:
    long = {"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
    partial: dict[str, Any] = {"partial_rotary_factor": 0.75}
    return [
        case("phi3-plain", "phi3", num_key_value_heads=4, intermediate_size=100),
        case("phi3-window", "phi3", sliding_window=20),
        case("phi3-short", "phi3", **partial, rope_scaling=long, original_max_position_embeddings=128),
        case("phi3-long", "phi3", **partial, rope_scaling=long, original_max_position_embeddings=16, max_context=256),
        case(
            "phi3-long-tied",
            "phi3",
            rope_scaling={
                "rope_type": "longrope",
                "short_factor": [*SHORT_FACTORS, 2.2, 2.5],
                "long_factor": [*LONG_FACTORS, 17.0, 18.0],
            },
            original_max_position_embeddings=20,
            tie_word_embeddings=True,
            max_context=200,
        ),
    ]


def _gpt2() -> list[Case]:
    gpt2: dict[str, Any] = {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 48,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return [
        Case("gpt2-plain", gpt2, seed=2),
        Case(
            "gpt2-odd",
            {**gpt2, "n_embd": 40, "n_head": 5, "n_inner": 70, "scale_attn_by_inverse_layer_idx": True},
            seed=2,
        ),
        Case("gpt2-relu", {**gpt2, "activation_function": "relu", "scale_attn_weights": False}),
    ]


CASES = [*_llama(), *_mistral(), *_smollm3(), *_qwen(), *_gemma(), *_phi3(), *_gpt2()]

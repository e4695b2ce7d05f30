"""Hostile and contradictory configs, one value at a time: one clear line, never anything else, never a huge plan."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import HaomiaoError, InputError, ModelError, UnsupportedModelError
from haomiao.models.config import eos_token_ids
from haomiao.models.plan import Plan
from haomiao.models.registry import default_context, plan_for, position_limit
from tests.golden.cases import CASES

BY_NAME = {case.name: case.config for case in CASES}
LLAMA, GEMMA3, PHI3, GPT2 = (BY_NAME[n] for n in ("llama-gqa-tied", "gemma3-v4", "phi3-short", "gpt2-plain"))
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = PHI3["rope_scaling"]


def assert_refused(config: Any, error: type[HaomiaoError] = ModelError, **options: Any) -> str:
    with pytest.raises(error) as raised:
        plan_for(config, **options)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    return message


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
]
NOT_SIZES = [0, -1, 1.5, "64", [64], {}, True, float("nan"), float("inf"), -float("inf"), 1 << 60, 10**400, 1e300]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda v: repr(v)[:12])
def test_sizes(key: str, value: Any) -> None:
    assert key in assert_refused({**LLAMA, key: value})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_that_are_missing(key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    assert assert_refused(config) == f"config has no {key}"


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", 1.5, float("nan"), float("inf"), False, []])
def test_epsilon(value: Any) -> None:
    assert "rms_norm_eps" in assert_refused({**LLAMA, "rms_norm_eps": value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_flags(key: str, value: Any) -> None:
    assert key in assert_refused({**LLAMA, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "does not divide into 3 heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads, 3 key/value heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "4 attention heads, 8 key/value heads"),
        ({"num_attention_heads": 128, "num_key_value_heads": 1}, "does not divide into 128 heads"),
        ({"head_dim": 7}, "cannot be rotated in pairs"),
        ({"head_dim": 1}, "cannot be rotated in pairs"),
        ({"partial_rotary_factor": 0.01}, "cannot be rotated in pairs"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"num_local_experts": 8}, "experts"),
        ({"num_experts": "many"}, "num_experts"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {}}, "multimodal"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    assert message in assert_refused({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("mamba2", "recurrent"),
        ("jamba", "hybrid"),
        ("qwen3_next", "hybrid"),
        ("qwen2_5_vl", "multimodal"),
        ("llava", "multimodal"),
        ("bert", "encoder"),
        ("t5", "encoder-decoder"),
        ("made_up", "made_up"),
        ("x" * 5000, "xxx"),
    ],
)
def test_unsupported_kinds_are_named(kind: str, what: str) -> None:
    message = assert_refused({"model_type": kind}, UnsupportedModelError)
    assert what in message and "llama" in message


@pytest.mark.parametrize("config", [None, [], "llama", 7, {}, {"model_type": None}, {"architectures": ["Made"]}])
def test_not_a_config(config: Any) -> None:
    assert_refused(config)


@pytest.mark.parametrize(
    "section",
    [
        "linear",
        ["linear"],
        7,
        {"rope_type": 7},
        {"rope_type": "made_up"},
        {"rope_type": "mrope"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": -2},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear", "factor": 1e300},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": float("inf")},
        {"rope_type": "default", "rope_theta": 1e-300},
        {**ROPE, "high_freq_factor": 1.0},
        {**ROPE, "low_freq_factor": 0},
        {**ROPE, "original_max_position_embeddings": 0},
        {k: v for k, v in ROPE.items() if k != "factor"},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1},
        {"rope_type": "yarn", "factor": 4.0, "mscale": "x", "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": "no"},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**70},
        {"rope_type": "longrope"},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        {"rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8},
        {"rope_type": "longrope", "short_factor": ["1"] * 8, "long_factor": [1.0] * 8},
        {"rope_type": "longrope", "short_factor": [float("nan")] * 8, "long_factor": [1.0] * 8},
        {"rope_type": "longrope", "short_factor": "11111111", "long_factor": [1.0] * 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope(section: Any, key: str) -> None:
    assert_refused({**LLAMA, key: section})


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("mistral-window", {"sliding_window": -1}),
        ("mistral-window", {"sliding_window": "20"}),
        ("mistral-window", {"sliding_window": 1 << 40}),
        ("qwen2-sliding", {"layer_types": ["full_attention"]}),
        ("qwen2-sliding", {"layer_types": ["linear_attention"] * 3}),
        ("qwen2-sliding", {"layer_types": [["full_attention"]] * 3}),
        ("qwen2-sliding", {"layer_types": "sliding"}),
        ("qwen2-sliding", {"max_window_layers": -1}),
        ("qwen2-sliding", {"use_sliding_window": 1}),
        ("smollm3-nope", {"no_rope_layers": [1]}),
        ("smollm3-nope", {"no_rope_layers": [1, 0, 2, 1]}),
        ("smollm3-nope", {"no_rope_layers": {}}),
        ("smollm3-nope", {"no_rope_layer_interval": 0}),
        ("gemma2-window", {"query_pre_attn_scalar": 0}),
        ("gemma2-window", {"query_pre_attn_scalar": -4}),
        ("gemma2-window", {"attn_logit_softcapping": -1}),
        ("gemma2-window", {"final_logit_softcapping": "30"}),
        ("gemma2-window", {"use_bidirectional_attention": True}),
        ("gemma2-window", {"dtype": 32}),
        ("gemma3-v4", {"sliding_window_pattern": 0}),
        ("gemma3-v4", {"rope_local_base_freq": 0}),
        ("gemma3-v4", {"rope_parameters": {"rope_theta": 5.0}}),
        ("gemma3-v5", {"rope_parameters": {"sliding_attention": 3, "full_attention": {}}}),
        ("phi3-short", {"original_max_position_embeddings": 0}),
        ("phi3-short", {"rope_scaling": {**LONG, "type": "linear", "factor": 2.0}}),
        ("phi3-short", {"rope_scaling": {**LONG, "short_factor": LONG["short_factor"][:3]}}),
        ("phi3-short", {"original_max_position_embeddings": 1}),
        ("gpt2-plain", {"n_embd": 50}),
        ("gpt2-plain", {"n_head": 0}),
        ("gpt2-plain", {"n_positions": "128"}),
        ("gpt2-plain", {"n_inner": -4}),
        ("gpt2-plain", {"layer_norm_epsilon": 0}),
        ("gpt2-plain", {"add_cross_attention": True}),
        ("gpt2-plain", {"activation_function": "tanh"}),
    ],
)
def test_what_only_some_families_have(base: str, changes: dict[str, Any]) -> None:
    assert_refused({**BY_NAME[base], **changes})


@pytest.mark.parametrize("text", [None, 7, [], {"num_hidden_layers": 0}])
def test_multimodal_gemma3_needs_a_text_config(text: Any) -> None:
    assert_refused({"model_type": "gemma3", "text_config": text})


@pytest.mark.parametrize("wanted", [0, -1, 257, 1 << 70])
def test_contexts(wanted: int) -> None:
    assert "1 to 256" in assert_refused(LLAMA, InputError, max_context=wanted)
    assert plan_for(LLAMA, 256).max_context == 256


@pytest.mark.parametrize("value", ["2", -1, 1.5, True, [2, None], {"a": 1}, [1 << 40]])
def test_end_tokens(value: Any) -> None:
    for config in ({"eos_token_id": value}, {"generation_config": {"eos_token_id": value}}):
        with pytest.raises(ModelError, match="eos_token_id"):
            eos_token_ids(config)


def test_end_tokens_of_the_generation_config_come_first() -> None:
    assert eos_token_ids({"eos_token_id": 2, "generation_config": {"eos_token_id": [7, 2, 7]}}) == (7, 2)
    assert eos_token_ids({"eos_token_id": 2, "generation_config": {}}) == (2,)
    assert eos_token_ids({}) == ()


def test_the_context_of_extended_models() -> None:
    assert (default_context(PHI3), position_limit(PHI3)) == (128, 256)
    assert position_limit({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}) == 1024
    assert default_context(LLAMA) == 256


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 64)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["default", "yarn", "longrope", "llama3", "linear", "full_attention", "bfloat16"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "long_factor", "short_factor"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
KEYS = sorted({key for config in BY_NAME.values() for key in config} | {"generation_config", "architectures", "dtype"})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(BY_NAME)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_anywhere_gives_a_plan_or_one_line(name: str, changes: dict[str, Any]) -> None:
    try:
        plan = plan_for({**BY_NAME[name], **changes})
    except HaomiaoError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(plan, Plan)
        assert all(spec.rows > 0 and spec.cols > 0 for spec in plan.weights.values())

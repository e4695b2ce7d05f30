"""Configs of real models, as their hub pages have them: the plan holds exactly the parameters that the models have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from haomiao.models import plan as ops
from haomiao.models.plan import Plan
from haomiao.models.registry import default_context, plan_for, position_limit


def decoder(
    kind: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        **more,
    }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-2-7B": (6_738_415_616, decoder("llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096)),
    "Llama-3.2-1B": (
        1_235_814_400,
        decoder(
            "llama",
            2048,
            8192,
            16,
            32,
            8,
            128256,
            head_dim=64,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            max_position_embeddings=131072,
            eos_token_id=[128001, 128008, 128009],
        ),
    ),
    "SmolLM2-135M": (134_515_008, decoder("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)),
    "SmolLM3-3B": (
        3_075_098_624,
        decoder(
            "smollm3", 2048, 11008, 36, 16, 4, 128256, no_rope_layers=[1, 1, 1, 0] * 9, max_position_embeddings=65536
        ),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        decoder("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096, max_position_embeddings=32768),
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        decoder("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None, max_position_embeddings=32768),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        decoder(
            "qwen2",
            896,
            4864,
            24,
            14,
            2,
            151936,
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=32768,
            max_window_layers=24,
            max_position_embeddings=32768,
        ),
    ),
    "Qwen2.5-7B": (7_615_616_512, decoder("qwen2", 3584, 18944, 28, 28, 4, 152064, max_position_embeddings=131072)),
    "Qwen3-0.6B": (
        596_049_920,
        decoder(
            "qwen3",
            1024,
            3072,
            28,
            16,
            8,
            151936,
            head_dim=128,
            tie_word_embeddings=True,
            max_position_embeddings=40960,
        ),
    ),
    "gemma-2-2b": (
        2_614_341_888,
        decoder("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, max_position_embeddings=8192),
    ),
    "gemma-3-1b": (
        999_885_952,
        decoder(
            "gemma3_text",
            1152,
            6912,
            26,
            4,
            1,
            262144,
            head_dim=256,
            sliding_window=512,
            sliding_window_pattern=6,
            max_position_embeddings=32768,
        ),
    ),
    "gemma-3-4b (text)": (
        3_880_263_168,
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "siglip_vision_model"},
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
    ),
    "Phi-3-mini": (
        3_821_079_552,
        decoder("phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=2047, max_position_embeddings=4096),
    ),
    "Phi-4-mini": (
        3_836_021_760,
        decoder(
            "phi3",
            3072,
            8192,
            32,
            24,
            8,
            200064,
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            rope_scaling=LONGROPE,
            sliding_window=262144,
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
        ),
    ),
    "gpt2": (
        124_439_808,
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
}


def parameters(plan: Plan) -> int:
    """Numbers in the checkpoint: every source once."""
    shapes = {
        name: shape for spec in plan.weights.values() for name, shape in zip(spec.sources, spec.shapes, strict=True)
    }
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str) -> None:
    count, config = MODELS[name]
    assert parameters(plan_for(config)) == count


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_consistent(name: str) -> None:
    """Every buffer is written before it is read, in its width; every weight is used; layers ascend."""
    plan = plan_for(MODELS[name][1])
    written: set[str] = set()
    used: set[str] = set()
    layers = []
    for op in plan.ops:
        reads = [getattr(op, field) for field in ("source", "qkv", "buffer", "target") if hasattr(op, field)]
        assert set(reads) <= written and set(reads) <= set(plan.buffers)
        if isinstance(op, ops.Linear):
            spec = plan.weights[op.weight]
            assert (plan.buffers[op.out], plan.buffers[op.source]) == (spec.rows, spec.cols)
        if isinstance(op, ops.Glu):
            assert plan.buffers[op.source] == 2 * plan.buffers[op.out]
        if isinstance(op, ops.Attention):
            assert plan.buffers[op.out] == op.heads * op.head_dim
            assert plan.buffers[op.qkv] == op.v_offset + op.kv_heads * op.head_dim
            assert (plan.kv_heads[op.layer], plan.head_dims[op.layer]) == (op.kv_heads, op.head_dim)
            assert plan.windows[op.layer] == op.window
            layers.append(op.layer)
        if isinstance(op, ops.Rope):
            assert 2 * len(plan.ropes[op.rope].inv_freq) == plan.ropes[op.rope].dim <= op.head_dim
        written.add(getattr(op, "out", "x"))
        names = (getattr(op, field, None) for field in ("weight", "bias", "table", "positions"))
        used.update(name for name in names if name is not None)
    assert used == set(plan.weights)
    assert layers == list(range(plan.layers))
    assert isinstance(plan.ops[-1], ops.Head)


def test_habits_of_real_models() -> None:
    def attention(name: str) -> list[ops.Attention]:
        return [op for op in plan_for(MODELS[name][1]).ops if isinstance(op, ops.Attention)]

    assert {op.window for op in attention("Mistral-7B-v0.1")} == {4096}
    assert {op.window for op in attention("Mistral-7B-v0.3")} == {0}
    assert {op.window for op in attention("Qwen2.5-0.5B")} == {0}
    assert [op.window for op in attention("gemma-2-2b")][:4] == [4096, 0, 4096, 0]
    assert [op.window for op in attention("gemma-3-1b")][:7] == [512] * 5 + [0, 512]
    assert attention("gemma-2-2b")[0].softcap == 50.0 and attention("gemma-3-1b")[0].softcap == 0.0
    assert sum(isinstance(op, ops.Rope) for op in plan_for(MODELS["SmolLM3-3B"][1]).ops) == 2 * 27


def test_embedding_scale_is_rounded_to_the_checkpoints_type() -> None:
    def scale(name: str, **changes: Any) -> float:
        first = plan_for({**MODELS[name][1], **changes}).ops[0]
        assert isinstance(first, ops.Embed)
        return first.scale

    assert scale("gemma-3-1b") == float(np.float32(1152**0.5))
    assert scale("gemma-3-1b", torch_dtype="bfloat16") == 34.0
    assert scale("gemma-3-1b", dtype="float16") == float(np.float16(1152**0.5))
    assert scale("gemma-3-4b (text)") == 50.5
    assert scale("Qwen3-0.6B") == 1.0


def test_longrope_is_chosen_by_the_context() -> None:
    config = MODELS["Phi-4-mini"][1]
    short, long = plan_for(config), plan_for(config, 131072)
    assert (default_context(config), position_limit(config)) == (4096, 131072)
    assert (short.max_context, long.max_context) == (4096, 131072)
    assert short.ropes[0].inv_freq[0] == 1.0 and long.ropes[0].inv_freq[0] == 0.5
    assert short.ropes[0].attention_factor == long.ropes[0].attention_factor == pytest.approx(1.190238, abs=1e-6)
    assert short.ropes[0].dim == 96

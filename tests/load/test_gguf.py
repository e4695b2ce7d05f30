"""GGUF files come out under Hugging Face's names, orientations and config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haomiao.errors import ModelError, UnsupportedModelError
from haomiao.load.gguf import blocks
from haomiao.load.source import TensorSource, open_source
from tests.load.gguf_files import Gguf, Tensor, llama3_factors, tiny

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]


def opened(tmp_path: Path, file: Gguf) -> TensorSource:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(file.bytes())
    return open_source(path)


def values(file: Gguf, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


def to_gguf_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: halves of each head become pairs."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_there(tmp_path: Path, architecture: str) -> None:
    file = tiny(architecture)
    source = opened(tmp_path, file)
    assert len(source.names()) == len(file.tensors)
    assert source.config["tie_word_embeddings"] is True
    assert source.config["vocab_size"] == 64
    for name in source.names():
        value = source.read(name)
        assert value.dtype == np.float32 and value.shape == source.shape(name)
        assert source.dtype(name) == "f32" and source.quantized(name) is None


def test_llama(tmp_path: Path) -> None:
    file = tiny("llama", **{"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.model": "gpt2"})
    rng = np.random.default_rng(0)
    q, k, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 32), (16, 32), (32,)))
    file.add("blk.1.attn_q.weight", to_gguf_rows(q, 4))
    file.add("blk.1.attn_k.weight", to_gguf_rows(k, 2))
    file.add("blk.1.attn_q.bias", to_gguf_rows(bias, 4))
    file.add("output.weight", rng.standard_normal((64, 32)))
    source = opened(tmp_path, file)
    assert np.array_equal(source.read("model.layers.1.self_attn.q_proj.weight"), q)
    assert np.array_equal(source.read("model.layers.1.self_attn.k_proj.weight"), k)
    assert np.array_equal(source.read("model.layers.1.self_attn.q_proj.bias"), bias)
    assert np.array_equal(source.read("model.embed_tokens.weight"), values(file, "token_embd.weight"))
    assert np.array_equal(source.read("lm_head.weight"), values(file, "output.weight"))
    assert source.files["chat_template.jinja"] == b"{{ messages }}"
    assert source.files["tokenizer.gguf"] == tmp_path / "tiny.gguf"
    expected = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    assert {key: source.config[key] for key in expected} == expected


@pytest.mark.parametrize(("type_name", "number", "bits"), [("q4_0", 2, 4), ("q8_0", 8, 8)])
def test_codes_of_permuted_rows_are_exact(tmp_path: Path, type_name: str, number: int, bits: int) -> None:
    file = tiny("llama")
    block = blocks.TYPES[number]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (32, block.bytes)).astype(np.uint8)
    data[:, :2] = rng.normal(0, 0.1, (32, 1)).astype("<f2").view(np.uint8)
    for name in ("attn_q", "attn_output"):
        file.tensors[f"blk.0.{name}.weight"] = Tensor((32, 32), data.tobytes(), number)
    source = opened(tmp_path, file)
    for name in ("q_proj", "o_proj"):
        full = f"model.layers.0.self_attn.{name}.weight"
        exact = source.quantized(full)
        assert exact is not None and source.dtype(full) == type_name
        assert (exact.bits, exact.group, exact.codes.shape, exact.scales.shape) == (bits, 32, (32, 32), (32, 1))
        assert np.array_equal(exact.codes * exact.scales, source.read(full))
    assert not np.array_equal(
        source.read("model.layers.0.self_attn.q_proj.weight"), source.read("model.layers.0.self_attn.o_proj.weight")
    )


@pytest.mark.parametrize(("number", "block"), [(1, "f16"), (30, "bf16"), (12, "q4_k")])
def test_other_types_have_no_codes(tmp_path: Path, number: int, block: str) -> None:
    file = tiny("llama")
    kind = blocks.TYPES[number]
    file.tensors["token_embd.weight"] = Tensor((64, 256), bytes(64 * 256 // kind.elements * kind.bytes), number)
    source = opened(tmp_path, file)
    assert source.dtype("model.embed_tokens.weight") == block
    assert source.quantized("model.embed_tokens.weight") is None
    assert not source.read("model.embed_tokens.weight").any()


@pytest.mark.parametrize(("number", "name"), [(16, "iq2_xxs"), (24, "i8"), (39, "mxfp4")])
def test_types_that_are_not_read_are_named(tmp_path: Path, number: int, name: str) -> None:
    file = tiny("llama")
    kind = blocks.TYPES[number]
    file.tensors["token_embd.weight"] = Tensor((64, 256), bytes(64 * 256 // kind.elements * kind.bytes), number)
    with pytest.raises(UnsupportedModelError, match=f"token_embd.weight.*{name}"):
        opened(tmp_path, file).read("model.embed_tokens.weight")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_scaling_is_recognized(tmp_path: Path, factor: float) -> None:
    file = tiny("llama", **{"llama.attention.key_length": 128, "llama.attention.value_length": 128})
    file.metadata["llama.rope.freq_base"] = 500000.0
    file.add("rope_freqs.weight", llama3_factors(500000.0, 128, factor, 8192))
    source = opened(tmp_path, file)
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.names()


def test_other_rotary_tables_are_kept_as_they_are(tmp_path: Path) -> None:
    file = tiny("llama")
    file.add("rope_freqs.weight", np.ones(4))
    assert opened(tmp_path, file).config["rope_scaling"] is None
    file.add("rope_freqs.weight", np.array([1, 1, 2, 5]))
    scaling = opened(tmp_path, file).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["long_factor"] == scaling["short_factor"] == [1, 1, 2, 5]
    assert scaling["attention_factor"] == 1.0
    for wrong in (np.zeros(4), np.array([1, np.nan]), np.ones((2, 2))):
        file.add("rope_freqs.weight", wrong)
        with pytest.raises(ModelError, match="rope_freqs"):
            opened(tmp_path, file)


def test_linear_and_yarn(tmp_path: Path) -> None:
    linear = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    assert opened(tmp_path, tiny("qwen2", **linear)).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
        "qwen2.rope.scaling.yarn_beta_fast": 16.0,
    }
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    assert opened(tmp_path, tiny("qwen2", **yarn)).config["rope_scaling"] == expected
    yarn["qwen2.rope.scaling.attn_factor"] = 0.5
    scaled = opened(tmp_path, tiny("qwen2", **yarn)).config["rope_scaling"]
    assert scaled["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))
    with pytest.raises(UnsupportedModelError, match="'zigzag'"):
        opened(tmp_path, tiny("qwen2", **{"qwen2.rope.scaling.type": "zigzag"}))


def test_qwen(tmp_path: Path) -> None:
    file = tiny("qwen2")
    source = opened(tmp_path, file)
    assert source.config["model_type"] == "qwen2" and source.config["attention_bias"] is True
    name = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(source.read(f"{name}.weight"), values(file, "blk.0.attn_q.weight")), "no permutation"
    assert np.array_equal(source.read(f"{name}.bias"), values(file, "blk.0.attn_q.bias"))
    source = opened(tmp_path, tiny("qwen3"))
    assert source.config["model_type"] == "qwen3" and source.config["attention_bias"] is False
    assert source.shape("model.layers.1.self_attn.k_norm.weight") == (8,)


def test_gemma2(tmp_path: Path) -> None:
    file = tiny("gemma2", **{"gemma2.attention.sliding_window": 16, "gemma2.attn_logit_softcapping": 40.0})
    source = opened(tmp_path, file)
    for hf, gguf in (("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm")):
        expected = values(file, f"blk.0.{gguf}.weight") - 1
        assert np.array_equal(source.read(f"model.layers.0.{hf}.weight"), expected)
    expected = {
        "model_type": "gemma2",
        "sliding_window": 16,
        "attn_logit_softcapping": 40.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert {key: source.config[key] for key in expected} == expected
    assert opened(tmp_path, tiny("gemma2", layers=46)).config["query_pre_attn_scalar"] == 32 // 4


def test_gemma3(tmp_path: Path) -> None:
    metadata = {"gemma3.attention.sliding_window": 16, "gemma3.rope.scaling.type": "linear"}
    file = tiny("gemma3", layers=7, **metadata, **{"gemma3.rope.scaling.factor": 8.0})
    source = opened(tmp_path, file)
    assert np.array_equal(
        source.read("model.layers.3.self_attn.q_norm.weight"), values(file, "blk.3.attn_q_norm.weight") - 1
    )
    assert source.config["model_type"] == "gemma3_text"
    assert [kind == "full_attention" for kind in source.config["layer_types"]] == [False] * 5 + [True, False]
    assert source.config["rope_local_base_freq"] == 10000.0
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    everywhere = opened(tmp_path, tiny("gemma3"))
    assert everywhere.config["layer_types"] == ["full_attention"] * 2


def test_phi3(tmp_path: Path) -> None:
    metadata = {"phi3.rope.scaling.original_context_length": 32, "phi3.rope.scaling.attn_factor": 1.5}
    file = tiny("phi3", **metadata, **{"phi3.attention.sliding_window": 20})
    file.add("rope_factors_long.weight", np.array([1, 2, 3, 4]))
    file.add("rope_factors_short.weight", np.array([1, 1, 1, 1]))
    source = opened(tmp_path, file)
    assert np.array_equal(
        source.read("model.layers.0.self_attn.qkv_proj.weight"), values(file, "blk.0.attn_qkv.weight")
    )
    assert source.shape("model.layers.0.mlp.gate_up_proj.weight") == (96, 32)
    assert source.config["original_max_position_embeddings"] == 32 and source.config["sliding_window"] == 20
    assert source.config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [1, 2, 3, 4],
        "short_factor": [1, 1, 1, 1],
        "attention_factor": 1.5,
        "original_max_position_embeddings": 32,
    }


def test_gpt2(tmp_path: Path) -> None:
    file = tiny("gpt2")
    source = opened(tmp_path, file)
    weight = source.read("transformer.h.0.attn.c_attn.weight")
    assert weight.shape == source.shape("transformer.h.0.attn.c_attn.weight") == (32, 96)
    assert np.array_equal(weight, values(file, "blk.0.attn_qkv.weight").T)
    assert np.array_equal(source.read("transformer.h.1.ln_2.bias"), values(file, "blk.1.ffn_norm.bias"))
    assert source.read("transformer.wte.weight").shape == (64, 32)
    assert {key: source.config[key] for key in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions")} == {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 128,
    }


def test_every_token_that_ends_an_answer(tmp_path: Path) -> None:
    tokens = ["a", "b", "<|im_end|>", "<|endoftext|>", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, 3, 3, 1],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.bos_token_id": 1,
    }
    config = opened(tmp_path, tiny("qwen2", **metadata)).config
    assert config["generation_config"] == {"bos_token_id": 1, "eos_token_id": [3, 2]}
    assert config["eos_token_id"] == 3 and config["bos_token_id"] == 1
    with pytest.raises(ModelError, match="eos_token_id"):
        opened(tmp_path, tiny("qwen2", **{**metadata, "tokenizer.ggml.eos_token_id": 5}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "split"),
        ({"llama.attention.value_length": 16}, "different length"),
        ({"llama.attention.head_count": [4, 8]}, "differs from layer to layer"),
        ({"llama.attention.head_count": 0}, "head_count' must be"),
        ({"llama.block_count": 1}, r"blk\.1\..* of 1 layers"),
        ({"llama.rope.dimension_count": 10}, "rotated"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "finite"),
        ({"llama.embedding_length": "wide"}, "whole number"),
        ({"llama.attention.head_count": 5, "llama.attention.head_count_kv": 2}, None),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, metadata: dict[str, object], message: str | None) -> None:
    file = tiny("llama", **metadata)
    if message is None:  # only reading can show it
        with pytest.raises(ModelError, match="5 heads"):
            opened(tmp_path, file).read("model.layers.0.self_attn.q_proj.weight")
        return
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, file)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.ffn_gate_exps.weight", "blk.00.attn_q.weight", "mystery.weight", "blk.9.attn_q.weight"):
        file = tiny("llama")
        file.add(name, np.ones((4, 4)))
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            opened(tmp_path, file)
    file = tiny("llama")
    del file.tensors["token_embd.weight"]
    with pytest.raises(ModelError, match="token_embd"):
        opened(tmp_path, file)


def test_a_vocabulary_alone_is_no_model(shared: Path) -> None:
    for path in (shared / "data" / "tokenizers" / "conformance").glob("*.gguf"):
        with pytest.raises(ModelError, match="without tensors"):
            open_source(path)


def test_closed(tmp_path: Path) -> None:
    source = opened(tmp_path, tiny("llama"))
    source.close()
    source.close()
    assert list(source.names()) == []
    with pytest.raises(ModelError):
        source.read("model.norm.weight")

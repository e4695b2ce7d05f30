"""Random checkpoints: readable by others, the same bytes every time, and GGUF with the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_model.py"


def make(out: Path, shape: str, *flags: str) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), shape, "--layers", "1", "--vocab", "300", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_checkpoint_of_a_real_shape(tmp_path: Path) -> None:
    from safetensors import safe_open

    said = make(tmp_path / "a", "qwen2.5-0.5b")
    make(tmp_path / "b", "qwen2.5-0.5b")
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["tie_word_embeddings"]) == ("qwen2", 896, True)
    matrices = 0
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  safe_open is no dict
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            matrices += int(np.prod(shape)) if len(shape) == 2 else 0
    assert matrices == said["parameters"]


@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "smollm2-135m", "llama-3.2-1b"])
def test_gguf_holds_the_same_weights(tmp_path: Path, shape: str) -> None:
    gguf = pytest.importorskip("gguf")
    make(tmp_path, shape, "--gguf", "Q8_0", "--no-safetensors")
    reader = gguf.GGUFReader(tmp_path / "model-Q8_0.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert ("blk.0.attn_q.bias" in found) == (shape == "qwen2.5-0.5b")
    make(tmp_path, shape)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])["model.embed_tokens.weight"]
    begin, end = entry["data_offsets"]
    bf16 = np.frombuffer(raw[8 + size + begin : 8 + size + end], "<u2").astype(np.uint32) << 16
    embedding = bf16.view(np.float32).reshape(entry["shape"])
    stored = found["token_embd.weight"]
    dequantized = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.abs(dequantized - embedding).max() < 0.002  # half a step of 8 bits and of bf16


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_codes_that_are_drawn_have_the_same_deviation(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    make(tmp_path, "qwen2.5-0.5b", "--gguf", kind, "--no-safetensors", "--random-codes")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"model-{kind}.gguf").tensors}
    for name, shape in (("token_embd.weight", (300, 896)), ("blk.0.ffn_down.weight", (896, 4864))):
        weights = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert weights.shape == shape
        assert 0.019 < weights.std() < 0.021


def test_a_real_vocabulary_goes_into_both(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    alphabet = {chr(256 + index): index for index in range(200)}
    vocabulary = {**alphabet, "\u0100\u0101": 200}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["\u0100 \u0101"]}
    added = [{"id": 201, "content": "<|endoftext|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    make(tmp_path / "out", "qwen2.5-0.5b", "--gguf", "Q8_0", "--tokenizer", str(tmp_path))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    fields = gguf.GGUFReader(tmp_path / "out/model-Q8_0.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (tokens[200], tokens[201], tokens[202]) == ("\u0100\u0101", "<|endoftext|>", "[PAD202]")
    assert (types[0], types[201], types[202]) == (1, 3, 5)
    assert fields["tokenizer.ggml.merges"].contents() == ["\u0100 \u0101"]

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


@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "llama-3.2-1b"])
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

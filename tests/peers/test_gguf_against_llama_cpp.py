"""Every GGUF type: our answer against llama.cpp reading the same file, on the trained small model.

llama.cpp quantizes activations to 8 bits where we keep float32 at `full`, so the distance measured here is an upper
bound on what our reader adds; F32, F16 and BF16 files show the floor. `HAOMIAO_LLAMA_PYTHON` names the interpreter that
has llama-cpp-python (it lives in an environment of its own).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.nightly

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
# Mean KL(llama.cpp || ours) in nats per token over 192 held-out tokens; the floor is llama.cpp's own 8-bit activations.
MAX_KL = {
    "ALL_F32": 1e-5,
    "F16": 1e-4,
    "BF16": 1e-3,
}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")
MAX_KL_QUANTIZED = 5e-3


@pytest.fixture(scope="session")
def llama_python() -> str:
    python = os.environ.get("HAOMIAO_LLAMA_PYTHON")
    if not python:
        pytest.skip("HAOMIAO_LLAMA_PYTHON names no interpreter with llama-cpp-python")
    return python


@pytest.fixture(scope="session")
def float_gguf(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from gguf_writer import write_gguf

    from haomiao.load.source import open_source

    directory = shared / "data" / "trained"
    source = open_source(str(directory))
    tensors = {name: source.read(name) for name in source.names()}
    return write_gguf(directory, tmp_path_factory.mktemp("gguf") / "f32.gguf", tensors)


@pytest.fixture(scope="session")
def ids(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    from haomiao.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(shared / "data" / "trained")
    english = (shared / "data" / "text" / "en-books" / "valid.txt").read_text(encoding="utf-8")[20_000:24_000]
    chinese = (shared / "data" / "text" / "zh-modern" / "modern_valid.txt").read_text(encoding="utf-8")[2_000:4_000]
    text = tokenizer.encode(english)[:96] + tokenizer.encode(chinese)[:96]
    return {"text": text, "prompt": tokenizer.encode("Once upon a time there was")}


def mean_kl(expected: np.ndarray, actual: np.ndarray) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(actual)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("ftype", ["ALL_F32", "F16", "BF16", *QUANTIZED])
def test_same_answer_as_llama_cpp(
    ftype: str, llama_python: str, float_gguf: Path, ids: dict[str, list[int]], tmp_path: Path
) -> None:
    from haomiao.api import LLM

    model = float_gguf
    if ftype != "ALL_F32":
        model = tmp_path / f"{ftype}.gguf"
        subprocess.run([llama_python, WORKER, "quantize", float_gguf, model, ftype], check=True, capture_output=True)
    ids_file, out = tmp_path / "ids.json", tmp_path / "out.npz"
    ids_file.write_text(json.dumps(ids))
    subprocess.run([llama_python, WORKER, "logits", model, ids_file, out], check=True, capture_output=True)
    theirs = np.load(out)
    os.environ["HAOMIAO_CACHE"] = str(tmp_path / "cache")
    with LLM(model, point="full", threads=1) as llm:
        ours = llm.logits(ids["text"])
        greedy = llm.generate(ids["prompt"], max_tokens=len(theirs["greedy"]), ignore_eos=True).token_ids
    kl = mean_kl(theirs["logits"], ours)
    top1 = float((theirs["logits"].argmax(-1) == ours.argmax(-1)).mean())
    agreed = next((i for i, (a, b) in enumerate(zip(theirs["greedy"], greedy, strict=True)) if a != b), len(greedy))
    print(f"\n{ftype}: KL {kl:.2e} nats/token, top-1 {top1:.3f} over {len(ours)} tokens, greedy equal for {agreed}")
    assert kl <= MAX_KL.get(ftype, MAX_KL_QUANTIZED)
    assert top1 >= 0.95
    if ftype in MAX_KL:
        assert agreed == len(greedy)

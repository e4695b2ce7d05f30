"""Runs inside llama-cpp-python's own environment: quantizes a GGUF file, or prints what llama.cpp answers for it.

python llama_cpp_worker.py quantize IN.gguf OUT.gguf Q4_K_M
python llama_cpp_worker.py logits MODEL.gguf IDS.json OUT.npz   (float32 [tokens, vocab] and 64 greedy tokens)
python llama_cpp_worker.py follow MODEL.gguf IDS.json OUT.npz   (a list of sequences: float32 [tokens, vocab] of each)
python llama_cpp_worker.py tokenize MODEL.gguf TEXTS.json OUT.json   (ids of each text, special tokens recognised)
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

GREEDY_TOKENS = 64


def quantize(source: str, target: str, ftype: str) -> None:
    name = ftype if ftype.startswith("ALL_") else f"MOSTLY_{ftype}"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{name}")
    params.nthread = 1
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama_model_quantize returned {code}")


def logits(model: str, ids_file: str, out: str) -> None:
    ids = json.loads(Path(ids_file).read_text())
    llm = llama_cpp.Llama(
        model, n_ctx=1024, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, flash_attn=False
    )
    llm.eval(ids["text"])
    scores = np.array(llm.scores[: len(ids["text"])], dtype=np.float32)
    llm.reset()
    llm.eval(ids["prompt"])
    greedy = []
    for _ in range(GREEDY_TOKENS):
        token = int(np.argmax(llm.scores[llm.n_tokens - 1]))
        greedy.append(token)
        llm.eval([token])
    np.savez(out, logits=scores, greedy=np.array(greedy, dtype=np.int32))


def follow(model: str, ids_file: str, out: str) -> None:
    llm = llama_cpp.Llama(
        model, n_ctx=1024, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, flash_attn=False
    )
    found = {}
    for index, ids in enumerate(json.loads(Path(ids_file).read_text())):
        llm.reset()
        llm.eval(ids)
        found[str(index)] = np.array(llm.scores[: len(ids)], dtype=np.float32)
    np.savez(out, **found)


def tokenize(model: str, texts_file: str, out: str) -> None:
    llm = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    texts = json.loads(Path(texts_file).read_text())
    found = [llm.tokenize(text.encode("utf-8"), add_bos=True, special=True) for text in texts]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    {"quantize": quantize, "logits": logits, "follow": follow, "tokenize": tokenize}[sys.argv[1]](*sys.argv[2:])

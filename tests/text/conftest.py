"""Tokenizers that several tests read, loaded once: real ones where the data are there, and a tiny one made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from haomiao.text.decoding import byte_alphabet
from haomiao.text.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of all bytes, a few merges, three special tokens and one added token that is not special."""
    alphabet = sorted(byte_alphabet())
    words = ["he", "ll", "hell", "hello", "Ġw", "Ġwo", "Ä½"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("Ä", "½")]
    vocabulary = {token: id_ for id_, token in enumerate([*alphabet, *words])}
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<think>", special=False)])
    directory = tmp_path_factory.mktemp("tiny")
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258 + 7, 263]}))
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> Tokenizer:
    return Tokenizer(tiny_directory)


@pytest.fixture(scope="session")
def qwen(shared: Path) -> Tokenizer:
    return Tokenizer(shared / "data/tokenizers/qwen2.5")


@pytest.fixture(scope="session")
def llama(shared: Path) -> Tokenizer:
    """Llama 2's SentencePiece model."""
    return Tokenizer(shared / "data/tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="session")
def trained(shared: Path) -> Tokenizer:
    return Tokenizer(shared / "data/trained")


@pytest.fixture(scope="session")
def samples(shared: Path) -> list[str]:
    """Texts in both languages and llama.cpp's odd cases."""
    cases = (shared / "data/tokenizers/conformance/ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8")
    texts = cases.split("\n__ggml_vocab_test__\n")
    for folder in ("en-books", "zh-modern", "python-docs"):
        for path in sorted((shared / "data/text" / folder).rglob("*.txt"))[:4]:
            with path.open(encoding="utf-8", errors="replace") as file:
                texts.append(file.read(3000))
    return texts

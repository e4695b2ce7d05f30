"""Tokenizers of every kind of file: the right ids, the same text back, and content that stays content."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError, ModelError, ModelNotFoundError, UnsupportedModelError
from haomiao.models.open import embedded_path
from haomiao.text.tokenizer import Tokenizer


@cache
def load(path: Path) -> Tokenizer:
    """Several tests read the same large files."""
    return Tokenizer(path)


CONFORMANCE = ["gpt-2", "llama-bpe", "llama-spm", "qwen2"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("name", CONFORMANCE)
def test_gguf_gives_the_ids_of_llama_cpp(shared: Path, name: str) -> None:
    path = shared / f"data/tokenizers/conformance/ggml-vocab-{name}.gguf"
    tokenizer = load(path)
    texts = Path(f"{path}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text)
        assert ids == [int(word) for word in line.split()], repr(text)
        assert tokenizer.decode(ids) == text


@given(text=TEXT, special=st.booleans())
def test_encoding_beside_other_threads_gives_the_same_ids(text: str, special: bool) -> None:
    tokenizer = load(embedded_path())
    alone = tokenizer.encode(text, special)
    tokenizer.concurrent = True
    try:
        assert tokenizer.encode(text, special) == alone
    finally:
        tokenizer.concurrent = False


def test_gguf_special_tokens(shared: Path) -> None:
    folder = shared / "data/tokenizers/conformance"
    llama = load(folder / "ggml-vocab-llama-bpe.gguf")
    assert llama.add_bos and llama.encode("hi", special=True)[0] == llama.bos_id == 128000
    assert set(llama.eos_ids) == {128001, 128009}  # <|end_of_text|> is EOS, <|eot_id|> ends a turn
    qwen = load(folder / "ggml-vocab-qwen2.gguf")
    assert not qwen.add_bos and qwen.encode("hi", special=True) == qwen.encode("hi")
    assert qwen.token_id("</s>") not in qwen.eos_ids  # markup is a word of this vocabulary, not its end
    assert qwen.chat_template is not None and "<|im_start|>" in qwen.chat_template


def test_directory_reads_what_lies_beside_it(qwen: Tokenizer, tiny: Tokenizer) -> None:
    assert qwen.eos_ids[0] == qwen.token_id("<|im_end|>")
    assert qwen.bos_id is None and not qwen.add_bos
    assert qwen.chat_template is not None
    assert tiny.eos_ids == (265, 263)  # generation_config first, in its order; <|im_end|> is 265
    assert tiny.token_id("<|im_end|>") == 265


def test_special_text_in_content_is_text(qwen: Tokenizer, llama: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer in (qwen, llama, tiny):
        for text in tokenizer.added_tokens:
            ids = tokenizer.encode(f"a{text}b")
            assert tokenizer.special_ids.isdisjoint(ids), text
            assert tokenizer.decode(ids) == f"a{text}b"
    assert qwen.encode("<|im_end|>", special=True) == [qwen.token_id("<|im_end|>")]
    assert llama.encode("</s>", special=True) == [1, 2]


def test_bos_follows_the_declared_flag(tiny_directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((tiny_directory / name).read_bytes())
    config = {"bos_token": "<|endoftext|>", "add_bos_token": True, "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.add_bos and tokenizer.encode("", special=True) == [263, 265]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert Tokenizer(tmp_path).encode("", special=True) == []


def test_llama_files_agree(shared: Path, llama: Tokenizer, samples: list[str]) -> None:
    other = Tokenizer(shared / "data/tokenizers/llama2/tokenizer.json")
    gguf = Tokenizer(shared / "data/tokenizers/conformance/ggml-vocab-llama-spm.gguf")
    assert other.bos_id == llama.bos_id == gguf.bos_id == 1
    for text in samples:
        ids = llama.encode(text)
        assert ids == other.encode(text) == gguf.encode(text)
        assert llama.encode(text, special=True) == other.encode(text, special=True)
        assert llama.decode(ids) == other.decode(ids) == text


def test_vocab_and_merges_agree_with_tokenizer_json(
    shared: Path, qwen: Tokenizer, tmp_path: Path, samples: list[str]
) -> None:
    source = shared / "data/tokenizers/qwen2.5"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(source / name)
    built = Tokenizer(tmp_path)
    gpt2 = Tokenizer(shared / "data/tokenizers/gpt2")
    (tmp_path / "gpt2").mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / "gpt2" / name).symlink_to(shared / "data/tokenizers/gpt2" / name)
    built_gpt2 = Tokenizer(tmp_path / "gpt2")
    for text in samples:
        assert built.encode(text) == qwen.encode(text)
        assert built_gpt2.encode(text) == gpt2.encode(text)
    assert built.encode("<|im_end|>", special=True) == qwen.encode("<|im_end|>", special=True)


@pytest.mark.parametrize("name", ["qwen", "llama", "trained", "tiny"])
def test_saved_is_the_same_tokenizer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    text = "Hello 世界 <|im_end|> </s>\n\tx  y 😀"
    for special in (False, True):
        assert again.encode(text, special=special) == tokenizer.encode(text, special=special)
    assert again.eos_ids == tokenizer.eos_ids and again.bos_id == tokenizer.bos_id
    assert again.chat_template == tokenizer.chat_template
    assert again.special_ids == tokenizer.special_ids
    assert again.decode(again.encode(text)) == text
    assert Tokenizer(tmp_path / "tokenizer.json").encode("Hello 世界") == tokenizer.encode("Hello 世界")


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_text_survives_byte_level(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_text_survives_sentencepiece(llama: Tokenizer, text: str) -> None:
    if "\u2581" not in text:  # SentencePiece's own space mark is read as a space
        assert llama.decode(llama.encode(text)) == text


def test_lone_surrogates_are_refused_and_nul_is_text(tiny: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (tiny, llama):
        with pytest.raises(InputError, match="surrogate"):
            tokenizer.encode("a\ud800b")
        with pytest.raises(InputError, match="string"):
            tokenizer.encode(b"bytes")  # type: ignore[arg-type]
        assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40, "1", None])
def test_ids_outside_the_vocabulary_are_refused(tiny: Tokenizer, llama: Tokenizer, bad: object) -> None:
    for tokenizer in (tiny, llama):
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.decode([bad])  # type: ignore[list-item]


@pytest.mark.parametrize("unit", ["a", " ", "\n", "中", "1", "ab ", "'", " \n", "▁"])
def test_long_texts_do_not_take_quadratic_time(tiny: Tokenizer, llama: Tokenizer, unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for tokenizer in (tiny, llama):
        assert len(tokenizer.encode(text)) > 100


def test_threads_may_share_a_tokenizer(tiny: Tokenizer) -> None:
    text = "hello <|im_end|> wo"
    expected = {special: tiny.encode(text, special=special) for special in (False, True)}
    wrong: list[bool] = []

    def work(special: bool) -> None:
        wrong.extend(tiny.encode(text, special=special) != expected[special] for _ in range(300))

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 1200 and not any(wrong)


def test_what_is_missing_or_unknown_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Tokenizer(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match="not a tokenizer file"):
        Tokenizer(tmp_path / "x.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SomeTokenizer"}')
    with pytest.raises(UnsupportedModelError, match="SomeTokenizer"):
        Tokenizer(tmp_path)


def test_import_is_light() -> None:
    program = (
        "import sys, haomiao.text.tokenizer; print([m for m in ('jinja2', 'llguidance', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", CONFORMANCE)
def test_gguf_saved_is_the_same_tokenizer(shared: Path, name: str, tmp_path: Path, samples: list[str]) -> None:
    tokenizer = load(shared / f"data/tokenizers/conformance/ggml-vocab-{name}.gguf")
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert (again.bos_id, again.eos_ids, again.add_bos) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos)
    assert again.special_ids == tokenizer.special_ids and again.vocab_size == tokenizer.vocab_size
    assert again.chat_template == tokenizer.chat_template
    for text in [*samples[::3], "a<|im_end|></s><|eot_id|><|endoftext|>b"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
        assert again.decode(again.encode(text)) == text

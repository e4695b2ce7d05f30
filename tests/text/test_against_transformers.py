"""The same ids as transformers and sentencepiece give, on real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from haomiao.text.template import ChatTemplate, encode_chat
from haomiao.text.tokenizer import Tokenizer

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/gpt2", "trained"])
def test_directories(shared: Path, name: str, samples: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(shared / "data" / name / "tokenizer.json"))
    ours = Tokenizer(shared / "data" / name)
    for text in samples:
        ids = reference.encode(text, add_special_tokens=False)  # recognises special tokens, which some samples hold
        assert ours.encode_part(text, special=True) == ids
        assert ours.decode(ids, skip_special=False) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_chat(shared: Path, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    folder = shared / "data/tokenizers/qwen2.5"
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    reference.chat_template = qwen.chat_template
    talk = [
        {"role": "system", "content": " be brief\n"},
        {"role": "user", "content": "\n你好, <b>x</b> "},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
    ]
    template = ChatTemplate.of(qwen)
    text = reference.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert template.render(talk) == text
    assert encode_chat(qwen, template, talk) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["tokenizers/llama2/tokenizer.model", "stories260K/hf/tokenizer.model"])
def test_sentencepiece(shared: Path, name: str, samples: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared / "data" / name
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer(path)
    for text in samples:
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode(text, special=True) == reference.encode(text, add_bos=True)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"byte_fallback": True}, {"user_defined_symbols": ["<tool>", "ab"]}])
def test_trained_here(
    kind: str, options: dict[str, object], samples: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in samples for line in text.split("\n") if line.strip()] * 2
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=2000,
        model_type=kind,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        **options,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    saved = tmp_path_factory.mktemp("saved")
    ours.save(saved)
    again = Tokenizer(saved)
    for text in samples:
        expected = reference.encode(text)
        assert ours.encode(text) == again.encode(text) == expected

"""Texts that begin like earlier ones get the ids that they would get alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.models.open import embedded_path
from haomiao.text.beginnings import PIECE, Beginnings, parts_words
from haomiao.text.tokenizer import Tokenizer

PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text("ab '\n\t.1é中<|>_", max_size=40),
    st.sampled_from([" a word", "it's", "  two  spaces ", "e\u0301 ", "<|endoftext|>", "\r\n\r\n x"]),
)
TEXTS = st.lists(PARTS, min_size=20, max_size=60).map(" ".join)


@cache
def remembering(path: Path) -> tuple[Tokenizer, Beginnings]:
    tokenizer = Tokenizer(path)
    return tokenizer, Beginnings(tokenizer)


@given(text=TEXTS, end=PARTS, special=st.booleans())
def test_the_ids_are_those_of_the_text_alone(text: str, end: str, special: bool) -> None:
    tokenizer, beginnings = remembering(embedded_path())
    assert parts_words(tokenizer)
    for each in (text, text + end, text):
        assert beginnings.encode(each, special, b"") == tokenizer.encode_part(each, special)


@pytest.mark.parametrize(("name", "cut"), [("qwen2.5", True), ("gpt2", True), ("llama2", False)])
def test_only_where_words_are_parted_is_anything_cut(shared: Path, name: str, cut: bool) -> None:
    tokenizer, beginnings = remembering(shared / "data/tokenizers" / name)
    sentence = "The quick brown fox, 1,000 of them\n\n\tjumps\u00a0over a lazy dog's back; it won't stop. 毫秒 and "
    text = sentence * 20
    assert parts_words(tokenizer) == cut
    assert beginnings.encode(text, False, b"") == tokenizer.encode_part(text, False)


def test_pieces_are_remembered_for_one_salt_and_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haomiao.text.beginnings.MAX_CHARACTERS", 16 * PIECE)
    tokenizer = Tokenizer(embedded_path())
    beginnings = Beginnings(tokenizer)
    alone = tokenizer.encode_part

    def pieces(text: str, salt: bytes) -> int:
        """How many texts were encoded."""
        encoded: list[str] = []
        monkeypatch.setattr(tokenizer, "encode_part", lambda t, special: (encoded.append(t), alone(t, special))[1])
        beginnings.encode(text, True, salt)
        assert text.endswith(encoded[-1])
        return len(encoded)

    text = "word after word " * 64
    counts = [pieces(text, salt) for salt in (b"one", b"one", b"two", b"one")]
    assert counts == [counts[0], 1, counts[0], 1] and counts[0] > 2
    for index in range(20):
        pieces(f"number {index} of " + "many words " * 30, b"")
    assert pieces(text, b"one") == counts[0]

"""Incremental decoding says the same as decoding at once, in whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.text.detokenize import Detokenizer
from haomiao.text.tokenizer import Tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", ["tiny", "llama", "trained"])
def test_any_ids(name: str, request: pytest.FixtureRequest, data: st.DataObject) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.vocab_size, 600) - 1), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", ["qwen", "llama", "trained"])
def test_real_text_in_whole_characters(name: str, request: pytest.FixtureRequest, samples: list[str]) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in samples:
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_half_a_character_waits(tiny: Tokenizer) -> None:
    ids = [id_ for id_ in tiny.encode("中")]
    assert len(ids) == 3
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push(id_) for id_ in ids] == ["", "", "中"]
    assert detokenizer.push(ids[0]) == "" and detokenizer.flush() == "\ufffd" and detokenizer.flush() == ""


def test_the_space_after_a_prompt_is_kept(llama: Tokenizer) -> None:
    prompt, more = llama.encode("Once", special=True), llama.encode("upon")
    assert Detokenizer(llama).push(more[0]) == "upon"
    assert Detokenizer(llama, after=prompt).push(more[0]) == " upon"
    assert Detokenizer(llama, after=[1]).push(more[0]) == "upon"  # BOS alone is no text


def test_unknown_ids_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(InputError):
        Detokenizer(tiny).push(tiny.vocab_size)

"""Where an answer may be cut: sentence ends in the scripts that have them, and the tokens that make one."""

from __future__ import annotations

import numpy as np
import pytest

from haomiao.text.sentence import SentenceEnds, ends_sentence
from haomiao.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "It rained.",
        "It rained. \n",
        "Did it?",
        'She said: "No!"',
        "(It did.)",
        "**Bold.**",
        "天气很好。",
        "他说:「走吧!」",
        "真的吗？」",
        "और फिर।",
        "ماذا؟",
        "Wait…",
        "There were 3.\n",  # the end of a line is the end of a list's item, too
        "He is from the USA.",
    ],
)
def test_sentence_ends(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", '"', "...and", "It rained", "It rained,", "天气很好，", "There were 3.", "J.", "See e.g.", "a) b)"],
)
def test_places_that_are_none(text: str) -> None:
    assert not ends_sentence(text)


def test_the_mask_holds_tokens_that_end_a_sentence_by_themselves(tiny: Tokenizer) -> None:
    vocab_size = tiny.vocab_size + 7  # a model may have more rows than its tokenizer has tokens
    ends = SentenceEnds(tiny, vocab_size)
    bits = np.unpackbits(ends.mask().view(np.uint8), bitorder="little")
    masked = np.flatnonzero(bits)
    assert {tiny.decode([int(token_id)]) for token_id in masked} == {".", "!", "?"}
    assert len(bits) >= vocab_size > max(masked)
    assert ends.mask() is ends.mask()


def test_tokens_that_the_tokenizer_lacks_end_nothing(tiny: Tokenizer) -> None:
    ends = SentenceEnds(tiny, tiny.vocab_size + 7)
    answer = tiny.encode("hello.")
    assert ends.is_complete(answer)
    assert ends.is_complete([*answer, tiny.vocab_size + 3, -1])
    assert not ends.is_complete(tiny.encode("hello"))
    assert not ends.is_complete([])

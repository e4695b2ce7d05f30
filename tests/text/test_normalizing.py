"""SentencePiece's normalization: tables in the form its models carry, made here, against replacing by hand."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haomiao.errors import ModelError
from haomiao.text.normalizing import CharsMap, Normalizer
from haomiao.text.vocabulary import Vocabulary

TABLE = {"ｈ": "h", "ｈｉ": "hi!", "ﬀ": "ff", "①": "1", "é": "e\u0301", "\u3000": " ", "x": "", "ab": "ba"}


def charsmap(table: dict[str, str]) -> bytes:
    """A precompiled table: a double-array trie over UTF-8 (Yata et al., "A compact static double-array keeping
    character codes", 2007, in darts-clone's layout), then the replacements, each closed by a zero."""
    texts, places = b"", {}
    for key, value in table.items():
        places[key.encode()] = len(texts)
        texts += value.encode() + b"\0"
    units = {0: 0}
    bases: set[int] = set()  # no two nodes share one: only the label of a child is checked, not its parent

    def place(node: int, prefix: bytes) -> None:
        rest = {key[len(prefix) : len(prefix) + 1] for key in places if key.startswith(prefix)}
        labels = sorted(label[0] if label else 0 for label in rest)
        base = next(
            at for at in range(1, 1 << 20) if at not in bases and not any(at ^ label in units for label in labels)
        )
        bases.add(base)
        units[node] |= (node ^ base) << 10 | (256 if 0 in labels else 0)
        for label in labels:
            units[base ^ label] = label if label else 1 << 31 | places[prefix]
        for label in labels:
            if label:
                place(base ^ label, prefix + bytes([label]))

    place(0, b"")
    words = [units.get(at, 0x1FF) for at in range(max(units) + 1)]
    return struct.pack(f"<I{len(words)}I", 4 * len(words), *words) + texts


def by_hand(text: str) -> str:
    out, at = "", 0
    while at < len(text):
        key = max((key for key in TABLE if text.startswith(key, at)), key=len, default=None)
        out += text[at] if key is None else TABLE[key]
        at += 1 if key is None else len(key)
    return out


@given(st.text(alphabet=st.sampled_from(["ｈ", "ｉ", "ﬀ", "①", "é", "\u3000", "x", "a", "b", "c", "😀", "中", "\0"])))
def test_the_longest_match_is_replaced(text: str) -> None:
    assert CharsMap(charsmap(TABLE)).replace(text) == by_hand(text)


def test_what_is_verbatim_stays() -> None:
    assert CharsMap(charsmap(TABLE)).replace("①<①>①", re.compile("<.*?>")) == "1<①>1"


@pytest.mark.parametrize("cut", [1, 2])
def test_a_replacement_outside_the_table_is_one_error(cut: int) -> None:
    with pytest.raises(ModelError, match="outside the table"):
        CharsMap(charsmap({"a": "b"})[:-cut]).replace("a")


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, " hi  you ", "▁▁hi▁▁you▁"),
        ({"remove_extra_whitespaces": True}, " hi  you ", "▁hi▁you"),
        ({"remove_extra_whitespaces": True}, "  ", ""),
        ({"add_dummy_prefix": False}, "hi you", "hi▁you"),
        ({"whitespace_as_suffix": True}, "hi you", "hi▁you▁"),
        ({}, "ｈｉ\u3000①", "▁hi!▁1"),
    ],
)
def test_spaces_are_made_visible(options: dict[str, bool], text: str, expected: str) -> None:
    vocabulary = Vocabulary(["<unk>"], [2], [0.0], unk_id=0, charsmap=charsmap(TABLE), **options)
    assert Normalizer(vocabulary)(text) == expected

"""Samples: evenly taken, held out, never repeated; the default text is there in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.compress.text import FOLDER, read_texts, take_samples
from haomiao.errors import InputError


def count_up(text: str) -> list[int]:
    return [int(word) for word in text.split()[1:-1]]  # a slice may begin and end inside a word


@given(st.integers(40, 4000), st.integers(1, 40), st.integers(1, 10), st.integers(16, 40))
@settings(max_examples=40)
def test_nothing_is_taken_twice(words: int, samples: int, held: int, length: int) -> None:
    texts = {"a": " ".join(map(str, range(words))), "b": " ".join(map(str, range(10000, 10000 + words)))}
    try:
        taken = take_samples(texts, count_up, samples=samples, held=held, length=length)
    except InputError:
        assert words // length < 2
        return
    every = [*taken.calibration.reshape(-1), *taken.held_out.reshape(-1)]
    assert len(set(every)) == len(every)
    assert 1 <= len(taken.calibration) <= samples
    assert 1 <= len(taken.held_out) <= held
    assert taken.calibration.shape[1] == taken.held_out.shape[1] == length


def test_both_parts_hold_every_text() -> None:
    texts = {name: " ".join(map(str, range(start, start + 999))) for name, start in (("a", 0), ("b", 5000))}
    taken = take_samples(texts, count_up, samples=12, held=4, length=32)
    for part in (taken.calibration, taken.held_out):
        assert {int(row[0]) >= 5000 for row in part} == {False, True}


def test_the_default_text_is_small_and_in_two_languages() -> None:
    texts = read_texts([])
    assert set(texts) == {"en.txt", "zh.txt"}
    assert sum((FOLDER / name).stat().st_size for name in texts) <= 200_000
    assert sum("\u4e00" <= c <= "\u9fff" for c in texts["zh.txt"]) > 20_000
    assert (FOLDER / "README.md").read_text().count("licence") >= 1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_texts([tmp_path / "absent"])
    (tmp_path / "bad").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_texts([tmp_path / "bad"])
    with pytest.raises(InputError, match="more text"):
        take_samples({"a": "1 2 3"}, count_up, samples=4, held=1, length=16)
    with pytest.raises(InputError, match="at least 16"):
        take_samples({"a": "1 2 3"}, count_up, samples=4, held=1, length=4)


def test_a_long_text_is_not_tokenized_whole() -> None:
    sizes: list[int] = []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return [1] * (len(text) // 2)

    taken = take_samples({"a": "x" * 1_000_000}, encode, samples=8, held=2, length=16)
    assert sum(sizes) < 5000
    assert len(taken.calibration) + len(taken.held_out) >= 9

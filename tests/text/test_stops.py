"""Stop strings are found wherever tokens cut them, and nothing else is held back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haomiao.errors import InputError
from haomiao.text.detokenize import Detokenizer
from haomiao.text.stops import StopStrings
from haomiao.text.tokenizer import Tokenizer
from haomiao.types import StopMatcher


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is completed first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab<é中 ", max_size=40),
    stops=st.lists(st.text("ab<é中 ", min_size=1, max_size=4), max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_agrees_with_a_naive_search(tiny: Tokenizer, text: str, stops: list[str]) -> None:
    matcher = StopStrings(Detokenizer(tiny), stops)
    plain = Detokenizer(tiny)
    expected, stop = naive(text, stops)
    emitted = known = ""
    for id_ in tiny.encode(text):
        emitted += matcher.push(id_)
        known += plain.push(id_)
        if matcher.stopped is None:
            beginnings = {s[:size] for s in stops for size in range(1, len(s))}
            held = max((size for size in range(len(known) + 1) if known[len(known) - size :] in beginnings), default=0)
            assert emitted == known[: len(known) - held]
    emitted += matcher.flush()
    assert (emitted, matcher.stopped) == (expected, stop)
    if stop is not None:
        assert matcher.push(tiny.encode("a")[0]) == ""


def test_holds_back_only_what_may_begin_a_stop(tiny: Tokenizer) -> None:
    matcher: StopMatcher = StopStrings(Detokenizer(tiny), ["END", "Ex"])
    emitted = [matcher.push(id_) for id_ in tiny.encode("aENaENDb")]
    assert emitted == ["a", "", "", "ENa", "", "", "", ""]
    assert matcher.stopped == "END" and matcher.flush() == ""


def test_flush_gives_back_what_was_held(tiny: Tokenizer) -> None:
    matcher = StopStrings(Detokenizer(tiny), ["END"])
    assert "".join(matcher.push(id_) for id_ in tiny.encode("xEN")) == "x"
    assert matcher.flush() == "EN" and matcher.stopped is None


@pytest.mark.parametrize("stops", [[""], ["a"] * 17, ["a" * 1025], "ab", [1]])
def test_bad_stops_are_refused(tiny: Tokenizer, stops: list[str]) -> None:
    with pytest.raises(InputError):
        StopStrings(Detokenizer(tiny), stops)

"""Labelled data: what is read, and what is refused with one line."""

from __future__ import annotations

import pytest

from haomiao.errors import InputError
from haomiao.measure.task import read_questions


def test_json_lines_with_choices() -> None:
    text = (
        '{"prompt": "2+2=", "choices": ["3", "4"], "answer": 1}\n{"question": "x", "options": ["a", "b"], "label": "a"}'
    )
    first, second = read_questions(text, "t")
    assert (first.prompt, first.choices, first.answer) == ("2+2=", ("3", "4"), 1)
    assert (second.prompt, second.answer) == ("x", 0)


def test_labels_of_the_file_are_the_choices_and_the_template_makes_the_prompt() -> None:
    table = "play\tplay a song\nstop\tbe quiet\nplay\tmore music\n"
    questions = read_questions(table, "t", template="{text} ->", limit=2)
    assert [q.prompt for q in questions] == ["play a song ->", "be quiet ->"]
    assert {q.choices for q in questions} == {("play", "stop")}
    assert [q.answer for q in questions] == [0, 1]
    swapped = read_questions("a song\tplay\nbe quiet\tstop\nmore\tplay\n", "t")
    assert [q.prompt for q in swapped] == ["a song\n", "be quiet\n", "more\n"]
    labelled = read_questions('{"sentence": "好", "label": "Positive"}\n{"sentence": "坏", "label": "Negative"}', "t")
    assert [q.answer for q in labelled] == [1, 0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "0 lines"),
        ("{nonsense", "not JSON"),
        ('{"prompt": 1, "answer": 0}', "needs a prompt"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}', "2 to"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "not among"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": "z"}', "not among"),
        ('{"prompt": "a", "choices": ["x", ""], "answer": 0}', "not among"),
        ("one column", "neither"),
        ("{" + "[" * 100000, "not JSON"),
    ],
)
def test_refusals_name_the_line(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_questions(text, "t")


def test_the_template_must_use_the_text() -> None:
    with pytest.raises(InputError, match="template"):
        read_questions("a\tb\n", "t", template="nothing")

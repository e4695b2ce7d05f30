"""Labelled data: what is read, and what is refused with one line."""

from __future__ import annotations

import pytest

from haomiao.errors import InputError
from haomiao.measure.task import Fields, read_questions


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


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('label,content\nup,"profits rose, sharply"\ndown,losses\n', Fields("content", "label")),
        ('label,text\nup,"profits rose, sharply"\ndown,losses\n', Fields()),
        ("sentence\tlabel\nprofits rose, sharply\tup\nlosses\tdown\n", Fields()),
        ("1\tup\tprofits rose, sharply\n2\tdown\tlosses\n", Fields("3", "2")),
        ("id\tkind\tsaid\n1\tup\tprofits rose, sharply\n2\tdown\tlosses\n", Fields("said", "2")),
        ('{"said": "profits rose, sharply", "k": "up"}\n{"said": "losses", "k": "down"}', Fields("said", "k")),
    ],
)
def test_columns_and_keys_are_named(text: str, fields: Fields) -> None:
    first, second = read_questions(text, "t", fields=fields)
    assert (first.prompt, second.prompt) == ("profits rose, sharply\n", "losses\n")
    assert [question.choices[question.answer] for question in (first, second)] == ["up", "down"]


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("a\tb\tc\nd\te\tf\n", Fields(), "3 columns: say with --text-field"),
        ("text\tlabel\na\tup\nb\tup\n", Fields(), "every label is 'up'"),
        ("a\tb\tc\nd\te\n", Fields("1", "2"), "line 2 has another number"),
        ("a\tb\nd\te\n", Fields("1", "3"), "no column '3' among 2"),
        ("a\tb\nd\te\n", Fields("1", "1"), "say with"),
        ("a\tb\nd\te\n", Fields("said", "b"), "no column 'said'"),
        ('{"said": "x", "k": "up"}', Fields("said"), "line 1 needs"),
        ('a,"b\nc,d', Fields("1", "2"), "commas"),
    ],
)
def test_columns_that_are_not_there(text: str, fields: Fields, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(text, "t", fields=fields)

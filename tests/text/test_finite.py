"""What is recognized as few answers is all that the constraint allows, white space between JSON tokens aside."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from haomiao.errors import ConstraintError
from haomiao.text.constraint import GrammarConstraint, compile_constraint
from haomiao.text.finite import MAX_ANSWERS, all_answers, finite_texts
from haomiao.text.tokenizer import Tokenizer

MOOD = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "mood": {"$ref": "#/$defs/Mood", "description": "how it sounds"}},
    "required": ["sure", "mood"],
    "additionalProperties": False,
    "$defs": {"Mood": {"enum": ["good", "bad"], "title": "Mood", "type": "string"}},
}


def one_object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


@pytest.mark.parametrize(
    ("kind", "value", "texts"),
    [
        ("choice", ["yes", "no", "yes"], ["yes", "no"]),
        ("regex", "yes|no", ["yes", "no"]),
        ("regex", r"^(?:a\.b|c d|是)$", ["a.b", "c d", "是"]),
        ("regex", "one", ["one"]),
        ("json_schema", {"enum": ["a", 1, None, True, "灯"]}, ['"a"', "1", "null", "true", '"灯"']),
        ("json_schema", '{"type": "string", "enum": ["a", 1, "\\""]}', ['"a"', '"\\""']),
        ("json_schema", {"const": "x", "title": "X"}, ['"x"']),
        ("json_schema", {"type": "boolean"}, ["true", "false"]),
        ("json_schema", {"type": ["boolean", "null"]}, ["true", "false", "null"]),
        ("json_schema", {"anyOf": [{"type": "null"}, {"enum": [1, 2]}]}, ["null", "1", "2"]),
        (
            "json_schema",
            MOOD,
            [f'{{"sure":{sure},"mood":"{mood}"}}' for sure in ("true", "false") for mood in ("good", "bad")],
        ),
        (
            "json_schema",
            one_object("a", a={"const": 1}, b={"type": "boolean"}),
            ['{"a":1,"b":true}', '{"a":1,"b":false}', '{"a":1}'],
        ),
    ],
)
def test_few_answers_are_recognized(tiny: Tokenizer, kind: Any, value: Any, texts: list[str]) -> None:
    assert list(finite_texts(kind, value)) == texts
    found = all_answers(tiny, compile_constraint(tiny, kind, value), kind, value)
    assert [tiny.decode(ids) for ids in found] == texts


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_object", None),
        ("grammar", 'start: "a" | "b"'),
        ("choice", [str(number) for number in range(MAX_ANSWERS + 1)]),
        ("choice", ["a" * 2000]),
        ("regex", "yes|no?"),
        ("regex", "yes|"),
        ("regex", "[ab]"),
        ("regex", r"\d|a"),
        ("regex", "(?i)yes"),
        ("regex", "(a)|(b)"),
        ("regex", "(a\\)"),
        ("regex", "a\\"),
        ("json_schema", True),
        ("json_schema", "{"),
        ("json_schema", {}),
        ("json_schema", {"type": "string"}),
        ("json_schema", {"type": "string", "enum": ["a"], "pattern": "a"}),
        ("json_schema", {"enum": [1.5]}),
        ("json_schema", {"enum": [1 << 60]}),
        ("json_schema", {"enum": [["a"]]}),
        ("json_schema", {"enum": ["\x7f"]}),
        ("json_schema", {"enum": ["a"], "const": "a"}),
        ("json_schema", {"type": "music", "enum": ["a"]}),
        ("json_schema", {"type": [["string"]], "enum": ["a"]}),
        ("json_schema", {"type": "string", "enum": [1]}),
        ("json_schema", {"enum": []}),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"$ref": "#/$defs/a"}),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": ["a"]}),
        ("json_schema", {**MOOD, "additionalProperties": True}),
        ("json_schema", {"type": "object", "properties": {"a": {"type": "boolean"}}}),
        ("json_schema", one_object("b", a={"type": "boolean"})),
        ("json_schema", one_object(*"abcdefg", **{name: {"type": "boolean"} for name in "abcdefg"})),
    ],
)
def test_what_is_more_or_other_is_not(kind: Any, value: Any) -> None:
    assert finite_texts(kind, value) == ()


def test_a_schema_that_unfolds_without_end_costs_little() -> None:
    names = "abcdefghij"
    definitions: dict[str, Any] = {
        name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 50} for name, after in itertools.pairwise(names)
    }
    definitions["j"] = {"type": "boolean"}
    assert finite_texts("json_schema", {"$ref": "#/$defs/a", "$defs": definitions}) == ()
    members = {str(number): {"enum": list(range(60))} for number in range(60)}
    assert finite_texts("json_schema", one_object(*members, **members)) == ()


def test_a_tokenizer_that_begins_with_a_space(shared: Path) -> None:
    """Its own tokens of a text are refused by the grammar, which allows no space; the longest tokens are taken."""
    llama = Tokenizer(shared / "data/tokenizers/llama2/tokenizer.model")
    for kind, value in (("choice", ["yes", "no"]), ("json_schema", {"enum": ["a", True]})):
        found = all_answers(llama, compile_constraint(llama, kind, value), kind, value)  # type: ignore[arg-type]
        texts = [b"".join(map(llama.token_bytes, ids)).decode() for ids in found]
        assert texts == list(finite_texts(kind, value)) and texts


# ---- against the constraint itself ----------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-12, 12) | st.text('ab"\\é灯', max_size=2)


@st.composite
def leaves(draw: st.DrawFn) -> dict[str, Any]:
    form = draw(st.sampled_from(["enum", "const", "type", "typed"]))
    if form == "const":
        return {"const": draw(SCALARS), "description": "a note"}
    if form == "type":
        return {"type": draw(st.sampled_from(["boolean", "null", ["null", "boolean"]]))}
    values = draw(st.lists(SCALARS, min_size=1, max_size=4))
    types = draw(st.sampled_from(["string", "integer", "boolean", ["string", "null"]]))
    return {"enum": values} if form == "enum" else {"enum": values, "type": types}


@st.composite
def schemas(draw: st.DrawFn, depth: int = 1) -> dict[str, Any]:
    inner = leaves() if not depth else leaves() | schemas(depth - 1)
    form = draw(st.sampled_from(["leaf", "object", "any"]))
    if form == "leaf":
        return draw(leaves())
    if form == "any":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=2))}
    members = draw(st.dictionaries(st.sampled_from(["k", "kk", 'q"']), inner, max_size=2))
    required = [name for name in members if draw(st.booleans())]
    return one_object(*required, **members)


def spoken(tokenizer: Tokenizer, constraint: GrammarConstraint, spaces: bool, most: int) -> set[bytes]:
    """All answers that can be generated under a constraint; those with white space are left out unless `spaces`."""
    found: set[bytes] = set()
    seen: set[bytes] = set()
    to_do = [(b"", constraint)]
    while to_do and len(found) <= most:
        text, state = to_do.pop()
        if text in seen:
            continue
        seen.add(text)
        if state.is_complete():
            found.add(text)
        for id_ in map(int, np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))):
            data = tokenizer.token_bytes(id_)
            if id_ not in tokenizer.eos_ids and (spaces or data == data.strip()):
                longer = state.fork()
                assert longer.accept(id_)
                to_do.append((text + data, longer))
    return found


def check_all(tokenizer: Tokenizer, kind: Any, value: Any, spaces: bool) -> None:
    texts = finite_texts(kind, value)
    assume(texts)
    try:
        constraint = compile_constraint(tokenizer, kind, value)
    except ConstraintError:  # nothing can satisfy it
        assume(False)
    found = all_answers(tokenizer, constraint, kind, value)
    assert [tokenizer.decode(ids) for ids in found] == list(texts), "every one of them is taken whole"
    assert spoken(tokenizer, constraint, spaces, MAX_ANSWERS) == {text.encode() for text in texts}


SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@given(schema=schemas())
@SLOW
def test_a_schema_allows_nothing_else(tiny: Tokenizer, schema: dict[str, Any]) -> None:
    check_all(tiny, "json_schema", json.loads(json.dumps(schema)), spaces=False)


@given(literals=st.lists(st.text("ab.|\\( $^", min_size=1, max_size=4), min_size=1, max_size=5), form=st.integers(0, 3))
@SLOW
def test_a_pattern_allows_nothing_else(tiny: Tokenizer, literals: list[str], form: int) -> None:
    pattern = "|".join(re.escape(literal).replace("\\ ", " ") for literal in literals)
    check_all(tiny, "regex", (pattern, f"({pattern})", f"(?:{pattern})", f"^({pattern})$")[form], spaces=True)


@given(options=st.lists(st.text('ab"\\灯 ', min_size=1, max_size=4), min_size=1, max_size=5))
@SLOW
def test_a_choice_allows_nothing_else(tiny: Tokenizer, options: list[str]) -> None:
    check_all(tiny, "choice", options, spaces=True)
